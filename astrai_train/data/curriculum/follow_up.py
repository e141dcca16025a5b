"""A second question that only makes sense after the first."""

from random import Random

from astrai_train.data.curriculum import arithmetic, checker, ordering, translation
from astrai_train.data.curriculum.item import (
    Item,
    Language,
    Split,
    Wordings,
    chat,
    common,
    draw,
)

_CALCULATE = {
    ("en", "+"): Wordings(
        train=(
            "And add {b} to that?",
            "Now add {b}.",
            "Plus {b}?",
            "Add {b} to the result.",
            "And plus {b}?",
            "What if I add {b} more?",
        ),
        held_out=("Now add {b} to that.", "And if I add {b} to the result?"),
    ),
    ("en", "-"): Wordings(
        train=(
            "And subtract {b} from that?",
            "Now subtract {b}.",
            "Minus {b}?",
            "Subtract {b} from the result.",
            "And minus {b}?",
            "What if I take {b} away?",
        ),
        held_out=("Now subtract {b} from that.", "And if I take {b} away from the result?"),
    ),
    ("zh", "+"): Wordings(
        train=(
            "再加{b}呢？",
            "再加上{b}等于多少？",
            "结果加{b}是多少？",
            "再加{b}。",
            "那再加{b}呢？",
        ),
        held_out=("那么结果再加{b}呢？", "那再加上{b}是多少？"),
    ),
    ("zh", "-"): Wordings(
        train=(
            "再减{b}呢？",
            "再减去{b}等于多少？",
            "结果减{b}是多少？",
            "再减{b}。",
            "那再减{b}呢？",
        ),
        held_out=("那么结果再减{b}呢？", "那再减去{b}是多少？"),
    ),
}

_REVERSE = {
    ("en", "up"): Wordings(
        train=(
            "Now from smallest to largest.",
            "And in ascending order?",
            "And from small to large?",
            "Now sort them from small to large.",
        ),
        held_out=("And now from smallest to largest?", "Now put them in ascending order."),
    ),
    ("en", "down"): Wordings(
        train=(
            "Now from largest to smallest.",
            "And in descending order?",
            "And from large to small?",
            "Now sort them from large to small.",
        ),
        held_out=("And now from largest to smallest?", "Now put them in descending order."),
    ),
    ("zh", "up"): Wordings(
        train=("那从小到大呢？", "再从小到大排列。", "改成从小到大。", "从小到大呢？"),
        held_out=("那么从小到大排列呢？", "现在从小到大排序。"),
    ),
    ("zh", "down"): Wordings(
        train=("那从大到小呢？", "再从大到小排列。", "改成从大到小。", "从大到小呢？"),
        held_out=("那么从大到小排列呢？", "现在从大到小排序。"),
    ),
}

_DIFFERENCE = {
    "en": Wordings(
        train=("By how much?", "How much larger is it?", "What is the difference?"),
        held_out=("How big is the difference?", "And by how much is it larger?"),
    ),
    "zh": Wordings(
        train=("大多少？", "大了多少？", "它们相差多少？", "差多少？"),
        held_out=("那么大多少？", "它们差多少？"),
    ),
}

_AND = {
    "en": Wordings(
        train=(
            'And "{text}"?',
            'What about "{text}"?',
            'Now "{text}".',
            'And what is "{text}"?',
            'And how about "{text}"?',
            'Then what about "{text}"?',
            'And how do you say "{text}"?',
        ),
        held_out=('And what about "{text}"?', 'How about "{text}"?'),
    ),
    "zh": Wordings(
        train=(
            '那"{text}"呢？',
            '"{text}"呢？',
            '还有"{text}"？',
            '那么"{text}"怎么说？',
            '那"{text}"怎么说？',
            '还有"{text}"怎么说？',
            '"{text}"又怎么说？',
        ),
        held_out=('那么"{text}"呢？', '还有"{text}"呢？'),
    ),
}


def _calculate(rng: Random, split: Split, language: Language) -> Item:
    """And add 5 to that?"""
    symbol = rng.choice("+-")

    def propose() -> tuple[arithmetic.Problem, arithmetic.Problem]:
        first = arithmetic.propose(rng, rng.choice("+-"))
        if symbol == "-" and first.result > 1:
            return first, arithmetic.subtract(first.result, rng.randint(1, min(99, first.result)))
        return first, arithmetic.add(first.result, rng.randint(1, 99))

    first, second = draw(split, propose, lambda pair: common(pair[0].split, pair[1].split))
    opening = arithmetic.wordings(first, language).pick(rng, split)
    wording = _CALCULATE[language, second.symbol].pick(rng, split)
    return Item(
        task="follow_up",
        language=language,
        messages=chat(
            opening.format(a=first.a, b=first.b),
            arithmetic.reply(first, language),
            wording.format(b=second.b),
            arithmetic.reply(second, language),
        ),
        checker=checker.number(second.result),
        split=split,
        operands=(*first.operands, *second.operands),
        wording=wording,
    )


def _reverse(rng: Random, split: Split, language: Language) -> Item:
    """Now from largest to smallest."""
    numbers = ordering.draw_numbers(rng, split)
    direction = rng.choice(("up", "down"))
    first = sorted(numbers, reverse=direction == "up")
    second = first[::-1]
    opening = ordering.SORT[language, "down" if direction == "up" else "up"].pick(rng, split)
    wording = _REVERSE[language, direction].pick(rng, split)
    return Item(
        task="follow_up",
        language=language,
        messages=chat(
            opening.format(numbers=ordering.joined(numbers, language)),
            ordering.joined(first, language),
            wording,
            ordering.joined(second, language),
        ),
        checker=checker.sequence(second),
        split=split,
        operands=("sort", *sorted(numbers)),
        wording=wording,
    )


def _difference(rng: Random, split: Split, language: Language) -> Item:
    """By how much?"""

    def propose() -> arithmetic.Problem:
        a, b = rng.sample(range(1, 100), 2)
        return arithmetic.subtract(max(a, b), min(a, b))

    problem = draw(
        split,
        propose,
        lambda problem: common(problem.split, ordering.pair_owner((problem.a, problem.b))),
    )
    pair = [problem.a, problem.b]
    rng.shuffle(pair)
    opening = ordering.COMPARE[language, "larger"].pick(rng, split)
    wording = _DIFFERENCE[language].pick(rng, split)
    return Item(
        task="follow_up",
        language=language,
        messages=chat(
            opening.format(a=pair[0], b=pair[1]),
            ordering.compared(problem.a, "larger", language),
            wording,
            arithmetic.reply(problem, language),
        ),
        checker=checker.number(problem.result),
        split=split,
        operands=problem.operands,
        wording=wording,
    )


def _another(rng: Random, split: Split, language: Language) -> Item:
    """And "dog"?"""
    answer_language: Language = rng.choice(("en", "zh"))
    first = translation.draw_phrase(rng, split, answer_language)
    second = translation.draw_phrase(rng, split, answer_language)
    opening = translation.WORDINGS[language, answer_language].pick(rng, split)
    wording = _AND[language].pick(rng, split)
    return Item(
        task="follow_up",
        language=answer_language,
        messages=chat(
            opening.format(text=first.source),
            first.reply,
            wording.format(text=second.source),
            second.reply,
        ),
        checker=second.checker,
        split=split,
        operands=second.operands,
        wording=wording,
    )


def follow_up(rng: Random, split: Split) -> Item:
    """One of the kinds above."""
    language: Language = rng.choice(("en", "zh"))
    kind = rng.choice((_calculate, _calculate, _reverse, _difference, _another))
    return kind(rng, split, language)
