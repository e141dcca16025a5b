"""How often a letter is in an English word, and how many characters are in a Chinese text.

The reply says what it counts and goes through the text with a running count. Nothing
stands between them, so that a letter is the same token wherever it is.
"""

from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.arithmetic import conclude
from astrai_train.data.curriculum.item import Item, Split, Wordings, chat, draw, split_of
from astrai_train.data.curriculum.lexicon import WORDS

_LETTERS = {
    "en": Wordings(
        train=(
            'How many times does the letter "{letter}" appear in "{word}"?',
            'How many "{letter}" are there in "{word}"?',
            'How many letters "{letter}" are in the word "{word}"?',
            'Count the letter "{letter}" in "{word}".',
            'How often is "{letter}" in "{word}"?',
            'Count how many "{letter}" the word "{word}" has.',
            'In the word "{word}", how many "{letter}" are there?',
        ),
        held_out=(
            'How many times is the letter "{letter}" in the word "{word}"?',
            'Please count the letter "{letter}" in the word "{word}".',
            'How often does "{letter}" appear in the word "{word}"?',
        ),
    ),
    "zh": Wordings(
        train=(
            '单词"{word}"里有几个字母"{letter}"？',
            '"{word}"里有几个"{letter}"？',
            '"{word}"这个单词有多少个字母"{letter}"？',
            '数一数"{word}"里有几个"{letter}"。',
            '字母"{letter}"在"{word}"里出现了几次？',
        ),
        held_out=(
            '请数一数单词"{word}"里有几个字母"{letter}"。',
            '"{letter}"在单词"{word}"里出现了几次？',
            '单词"{word}"里有多少个"{letter}"？',
        ),
    ),
}

_CHARACTERS = {
    "zh": Wordings(
        train=(
            "“{text}”有几个字？",
            "“{text}”一共有多少个字？",
            "数一数“{text}”有几个字。",
            "请问“{text}”里有几个字？",
            "“{text}”这句话有多少个字？",
        ),
        held_out=(
            "请数一数“{text}”一共有几个字。",
            "“{text}”这句话里有几个字？",
            "请问“{text}”有多少个字？",
        ),
    ),
    "en": Wordings(
        train=(
            "How many characters are in “{text}”?",
            "How many Chinese characters does “{text}” have?",
            "Count the characters in “{text}”.",
            "How many characters are there in “{text}”?",
        ),
        held_out=(
            "Please count the Chinese characters in “{text}”.",
            "How many Chinese characters are in “{text}”?",
            "How many characters does “{text}” have?",
        ),
    ),
}

_OCCURRENCES = {
    "zh": Wordings(
        train=(
            "“{text}”里有几个“{character}”？",
            "“{text}”里有多少个“{character}”字？",
            "数一数“{text}”里有几个“{character}”。",
            "“{character}”在“{text}”里出现了几次？",
        ),
        held_out=(
            "请数一数“{text}”里有几个“{character}”字。",
            "请问“{text}”里有多少个“{character}”？",
        ),
    ),
    "en": Wordings(
        train=(
            "How many “{character}” are in “{text}”?",
            "How many times does “{character}” appear in “{text}”?",
            "Count “{character}” in “{text}”.",
        ),
        held_out=(
            "Please count “{character}” in “{text}”.",
            "How many times is “{character}” in “{text}”?",
        ),
    ),
}

_SPELLABLE = tuple(
    word.english for word in WORDS if word.english.isalpha() and 3 <= len(word.english) <= 9
)
_CHARACTERS_KNOWN = tuple(sorted({character for word in WORDS for character in word.chinese}))


def _running_count(text: str, wanted: str | None) -> tuple[str, int]:
    """Every character followed by how many wanted ones (or any, for None) came so far."""
    count = 0
    steps = []
    for character in text:
        count += wanted is None or character == wanted
        steps.append(f"{character}{count}")
    return "".join(steps), count


def letters(rng: Random, split: Split) -> Item:
    """How often a letter occurs in an English word."""

    def propose() -> tuple[str, str]:
        word = rng.choice(_SPELLABLE)
        absent = rng.random() < 0.2
        return word, rng.choice("abcdefghijklmnoprstuwy" if absent else word)

    word, letter = draw(split, propose, lambda pair: split_of("letters", *pair))
    language = rng.choice(("en", "zh"))
    wording = _LETTERS[language].pick(rng, split)
    steps, count = _running_count(word, letter)
    return Item(
        task="counting_letters",
        language=language,
        messages=chat(
            wording.format(word=word, letter=letter),
            f"{letter}\n{steps}\n{conclude(str(count), language)}",
        ),
        checker=checker.number(count),
        split=split,
        operands=("letters", word, letter),
        wording=wording,
    )


def characters(rng: Random, split: Split) -> Item:
    """How many characters a Chinese text has, or how often one of them occurs."""
    single = rng.random() < 0.5

    def propose() -> tuple[str, str]:
        wanted, *others = rng.sample(_CHARACTERS_KNOWN, rng.randint(3, 7))
        text = [*others, *[wanted] * rng.randint(1, 3)]
        rng.shuffle(text)
        return "".join(text), wanted if single else ""

    text, character = draw(split, propose, lambda pair: split_of("characters", pair[0]))
    language = rng.choice(("zh", "en"))
    wordings = _OCCURRENCES if single else _CHARACTERS
    wording = wordings[language].pick(rng, split)
    steps, count = _running_count(text, character or None)
    counted = character or ("all" if language == "en" else "全部")
    return Item(
        task="counting_characters",
        language=language,
        messages=chat(
            wording.format(text=text, character=character),
            f"{counted}\n{steps}\n{conclude(str(count), language)}",
        ),
        checker=checker.number(count),
        split=split,
        operands=("characters", text),
        wording=wording,
    )
