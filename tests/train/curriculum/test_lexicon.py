from collections import Counter

import pytest

from astrai_train.data.curriculum.lexicon import NOUNS, WORDS, with_article


@pytest.mark.parametrize("side", ["english", "chinese"])
def test_every_word_has_one_translation(side):
    repeated = [text for text, n in Counter(getattr(w, side) for w in WORDS).items() if n > 1]
    assert repeated == []


def test_the_lexicon_is_of_use():
    assert len(WORDS) > 350
    assert all(word.english.isascii() and not word.chinese.isascii() for word in WORDS)


def test_plurals_and_articles():
    plurals = {noun.english: noun.plural for noun in NOUNS}
    assert [plurals[word] for word in ("box", "story", "toy", "child", "bus", "sheep")] == [
        *("boxes", "stories", "toys", "children", "buses", "sheep")
    ]
    assert (with_article("apple"), with_article("university")) == ("an apple", "a university")
