"""Words, phrases and short sentences in the other language.

A held-out word is one whose direction was never asked for alone in training: the word itself
was, in the other direction and inside phrases, so only words that phrases use are held out. A
held-out phrase combines known words anew.
"""

from dataclasses import dataclass
from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.item import (
    Checker,
    Item,
    Language,
    Operands,
    Split,
    Wordings,
    chat,
    draw,
    split_of,
)
from astrai_train.data.curriculum.lexicon import (
    ADJECTIVES,
    NOUNS,
    SUBJECTS,
    VERBS,
    WORDS,
    with_article,
)
from astrai_train.data.curriculum.numbers import chinese_numeral, english_numeral

WORDINGS = {
    # (language of the question, language of the answer)
    ("en", "zh"): Wordings(
        train=(
            'What is "{text}" in Chinese?',
            'How do you say "{text}" in Chinese?',
            'Translate "{text}" into Chinese.',
            'What is the Chinese for "{text}"?',
            'Say "{text}" in Chinese.',
            'Please translate into Chinese: "{text}"',
            'Can you translate "{text}" into Chinese?',
            'Please say "{text}" in Chinese.',
            'Tell me what "{text}" is in Chinese.',
            'Give me the Chinese for "{text}".',
            'How can I say "{text}" in Chinese?',
            'Please tell me the Chinese word for "{text}".',
            'Translate "{text}" to Chinese, please.',
            'Put "{text}" into Chinese.',
        ),
        held_out=(
            'How would you say "{text}" in Chinese?',
            'Please translate "{text}" into Chinese.',
            'Tell me the Chinese for "{text}".',
        ),
    ),
    ("zh", "zh"): Wordings(
        train=(
            '"{text}"用中文怎么说？',
            '"{text}"的中文是什么？',
            '把"{text}"翻译成中文。',
            '"{text}"是什么意思？',
            '翻译成中文："{text}"',
            '请把"{text}"译成中文。',
            '请问"{text}"的中文是什么？',
            '请将"{text}"翻译成中文。',
            '"{text}"翻译成中文是什么？',
            '告诉我"{text}"用中文怎么说。',
            '请翻译成中文："{text}"',
        ),
        held_out=(
            '请把"{text}"翻译成中文。',
            '请问"{text}"用中文怎么说？',
        ),
    ),
    ("en", "en"): Wordings(
        train=(
            'What is "{text}" in English?',
            'How do you say "{text}" in English?',
            'Translate "{text}" into English.',
            'What is the English for "{text}"?',
            'What does "{text}" mean?',
            'Please translate into English: "{text}"',
            'Can you translate "{text}" into English?',
            'Please say "{text}" in English.',
            'Tell me what "{text}" is in English.',
            'Give me the English for "{text}".',
            'How can I say "{text}" in English?',
            'Please tell me the English word for "{text}".',
            'Translate "{text}" to English, please.',
        ),
        held_out=(
            'Please translate "{text}" into English.',
            'Tell me the English for "{text}".',
            'How would you say "{text}" in English?',
        ),
    ),
    ("zh", "en"): Wordings(
        train=(
            '"{text}"用英文怎么说？',
            '"{text}"的英文是什么？',
            '把"{text}"翻译成英文。',
            '"{text}"用英语怎么说？',
            '翻译成英文："{text}"',
            '请把"{text}"译成英文。',
            '请问"{text}"的英文是什么？',
            '请将"{text}"翻译成英文。',
            '"{text}"翻译成英文是什么？',
            '告诉我"{text}"用英文怎么说。',
            '请翻译成英文："{text}"',
        ),
        held_out=(
            '请把"{text}"翻译成英文。',
            '请问"{text}"用英文怎么说？',
        ),
    ),
}


_IN_PHRASES = frozenset(word.english for word in (*NOUNS, *ADJECTIVES, *VERBS))


def _word(rng: Random) -> tuple[Operands, str, str]:
    word = rng.choice(WORDS)
    return ("word", word.english), word.english, word.chinese


def _described(rng: Random) -> tuple[Operands, str, str]:
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    return (
        ("described", adjective.english, noun.english),
        f"{adjective.english} {noun.english}",
        f"{adjective.attribute}{noun.chinese}",
    )


def _counted(rng: Random) -> tuple[Operands, str, str]:
    count, noun = rng.randint(2, 10), rng.choice(NOUNS)
    numeral = "两" if count == 2 else chinese_numeral(count)
    return (
        ("counted", count, noun.english),
        f"{english_numeral(count)} {noun.plural}",
        f"{numeral}{noun.measure}{noun.chinese}",
    )


def _sentence(rng: Random) -> tuple[Operands, str, str]:
    subject, verb, noun = rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(NOUNS)
    return (
        ("sentence", subject.english, verb.english, noun.english),
        f"{subject.english.capitalize()} {verb.english} {noun.plural}",
        f"{subject.chinese}{verb.chinese}{noun.chinese}",
    )


def _owner(operands: Operands, answer_language: Language) -> Split:
    """A word is held out in one direction only; a phrase in both."""
    if operands[0] != "word":
        return split_of(*operands)
    if operands[1] not in _IN_PHRASES:
        return "train"  # a model does not learn a direction from the other one alone
    owner = split_of(*operands, "en")
    if answer_language == "en":
        return owner
    return split_of(*operands, "zh") if owner == "train" else "train"


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A text and its translation."""

    operands: Operands
    source: str
    target: str
    answer_language: Language

    @property
    def reply(self) -> str:
        """The translation as an answer."""
        return self.target + ("." if self.answer_language == "en" else "。")

    @property
    def checker(self) -> Checker:
        """Accepts the translation; an English noun phrase also with its article."""
        accepted = [self.target]
        if self.answer_language == "en" and self.operands[0] == "described":
            accepted += [with_article(self.target), f"the {self.target}"]
        return checker.exact(*accepted)


def draw_phrase(rng: Random, split: Split, answer_language: Language) -> Phrase:
    """A word, phrase or sentence that the split owns in this direction."""
    kind = rng.choice((_word, _described, _counted, _sentence))
    operands, english, chinese = draw(
        split, lambda: kind(rng), lambda candidate: _owner(candidate[0], answer_language)
    )
    source, target = (chinese, english) if answer_language == "en" else (english, chinese)
    return Phrase(
        operands=(*operands, answer_language),
        source=source,
        target=target,
        answer_language=answer_language,
    )


def translate(rng: Random, split: Split) -> Item:
    """A word, phrase or sentence into English or Chinese."""
    phrase = draw_phrase(rng, split, rng.choice(("en", "zh")))
    wording = WORDINGS[rng.choice(("en", "zh")), phrase.answer_language].pick(rng, split)
    return Item(
        task="translation",
        language=phrase.answer_language,
        messages=chat(wording.format(text=phrase.source), phrase.reply),
        checker=phrase.checker,
        split=split,
        operands=phrase.operands,
        wording=wording,
    )
