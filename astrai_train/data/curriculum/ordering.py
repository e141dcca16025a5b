"""Which of two numbers is larger or smaller, and numbers in order."""

from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.item import (
    Item,
    Language,
    Split,
    Wordings,
    chat,
    draw,
    split_of,
)

COMPARE = {
    ("en", "larger"): Wordings(
        train=(
            "Which is larger, {a} or {b}?",
            "Which number is larger: {a} or {b}?",
            "Which is bigger, {a} or {b}?",
            "Which one is greater, {a} or {b}?",
            "Tell me the larger of {a} and {b}.",
            "Of {a} and {b}, which is the bigger one?",
            "Compare {a} and {b}. Which is larger?",
            "Which number is greater, {a} or {b}?",
            "Which of {a} and {b} is bigger?",
            "Of {a} and {b}, which is larger?",
            "Of {a} and {b}, which number is greater?",
            "Tell me which is larger, {a} or {b}.",
            "Please tell me which is bigger: {a} or {b}.",
            "Please tell me which number is larger, {a} or {b}.",
        ),
        held_out=(
            "Which number is bigger, {a} or {b}?",
            "Of {a} and {b}, which number is larger?",
            "Please tell me which is larger, {a} or {b}.",
        ),
    ),
    ("en", "smaller"): Wordings(
        train=(
            "Which is smaller, {a} or {b}?",
            "Which number is smaller: {a} or {b}?",
            "Which is less, {a} or {b}?",
            "Which one is smaller, {a} or {b}?",
            "Tell me the smaller of {a} and {b}.",
            "Of {a} and {b}, which is the smaller one?",
            "Compare {a} and {b}. Which is smaller?",
            "Which number is lower, {a} or {b}?",
            "Which of {a} and {b} is less?",
            "Of {a} and {b}, which is smaller?",
            "Of {a} and {b}, which number is lower?",
            "Tell me which is smaller, {a} or {b}.",
            "Please tell me which is less: {a} or {b}.",
            "Please tell me which number is smaller, {a} or {b}.",
        ),
        held_out=(
            "Which number is less, {a} or {b}?",
            "Of {a} and {b}, which number is smaller?",
            "Please tell me which is smaller, {a} or {b}.",
        ),
    ),
    ("zh", "larger"): Wordings(
        train=(
            "{a}和{b}哪个大？",
            "{a}和{b}哪个更大？",
            "{a}和{b}，哪个数大？",
            "{a}与{b}相比，哪个大？",
            "比较{a}和{b}，哪个大？",
            "请问{a}和{b}哪个大一些？",
            "{a}大还是{b}大？",
            "{a}和{b}，哪个大？",
            "{a}和{b}，哪个更大？",
            "{a}与{b}哪个更大？",
            "{a}与{b}，哪个数大一些？",
            "请问{a}和{b}哪个数更大？",
            "请告诉我{a}和{b}哪个大。",
            "请比较{a}与{b}，哪个大？",
            "在{a}和{b}中，哪个数更大？",
            "{a}、{b}，哪个数更大？",
        ),
        held_out=(
            "{a}和{b}，哪个数更大？",
            "请比较{a}和{b}，哪个更大？",
            "{a}与{b}哪个数大一些？",
        ),
    ),
    ("zh", "smaller"): Wordings(
        train=(
            "{a}和{b}哪个小？",
            "{a}和{b}哪个更小？",
            "{a}和{b}，哪个数小？",
            "{a}与{b}相比，哪个小？",
            "比较{a}和{b}，哪个小？",
            "请问{a}和{b}哪个小一些？",
            "{a}小还是{b}小？",
            "{a}和{b}，哪个小？",
            "{a}和{b}，哪个更小？",
            "{a}与{b}哪个更小？",
            "{a}与{b}，哪个数小一些？",
            "请问{a}和{b}哪个数更小？",
            "请告诉我{a}和{b}哪个小。",
            "请比较{a}与{b}，哪个小？",
            "在{a}和{b}中，哪个数更小？",
            "{a}、{b}，哪个数更小？",
        ),
        held_out=(
            "{a}和{b}，哪个数更小？",
            "请比较{a}和{b}，哪个更小？",
            "{a}与{b}哪个数小一些？",
        ),
    ),
}

SORT = {
    ("en", "up"): Wordings(
        train=(
            "Sort these numbers from smallest to largest: {numbers}",
            "Sort from small to large: {numbers}",
            "Put these numbers in ascending order: {numbers}",
            "Arrange {numbers} from smallest to largest.",
            "Sort {numbers} in ascending order.",
            "Order these numbers from small to large: {numbers}",
            "Please arrange {numbers} in ascending order.",
            "Put {numbers} in ascending order.",
            "Sort these numbers in ascending order: {numbers}",
            "Arrange from small to large: {numbers}",
            "Put these numbers in order from small to large: {numbers}",
            "Arrange these numbers from smallest to largest: {numbers}",
            "Please sort these numbers from small to large: {numbers}",
            "Order {numbers} from smallest to largest.",
            "Please put {numbers} in order from smallest to largest.",
        ),
        held_out=(
            "Please sort {numbers} from smallest to largest.",
            "Arrange these numbers in ascending order: {numbers}",
            "Put {numbers} in order from small to large.",
        ),
    ),
    ("en", "down"): Wordings(
        train=(
            "Sort these numbers from largest to smallest: {numbers}",
            "Sort from large to small: {numbers}",
            "Put these numbers in descending order: {numbers}",
            "Arrange {numbers} from largest to smallest.",
            "Sort {numbers} in descending order.",
            "Order these numbers from large to small: {numbers}",
            "Please arrange {numbers} in descending order.",
            "Put {numbers} in descending order.",
            "Sort these numbers in descending order: {numbers}",
            "Arrange from large to small: {numbers}",
            "Put these numbers in order from large to small: {numbers}",
            "Arrange these numbers from largest to smallest: {numbers}",
            "Please sort these numbers from large to small: {numbers}",
            "Order {numbers} from largest to smallest.",
            "Please put {numbers} in order from largest to smallest.",
        ),
        held_out=(
            "Please sort {numbers} from largest to smallest.",
            "Arrange these numbers in descending order: {numbers}",
            "Put {numbers} in order from large to small.",
        ),
    ),
    ("zh", "up"): Wordings(
        train=(
            "把这些数从小到大排列：{numbers}",
            "从小到大排序：{numbers}",
            "请把{numbers}从小到大排列。",
            "将{numbers}按从小到大的顺序排列。",
            "把{numbers}从小到大排序。",
            "按升序排列：{numbers}",
            "请把这些数从小到大排列：{numbers}",
            "请将这些数从小到大排序：{numbers}",
            "将{numbers}从小到大排列。",
            "把{numbers}按从小到大的顺序排列。",
            "请按从小到大的顺序排列：{numbers}",
            "请把{numbers}从小到大排序。",
            "将这些数从小到大排列：{numbers}",
        ),
        held_out=(
            "请把这些数从小到大排序：{numbers}",
            "将这些数按从小到大的顺序排列：{numbers}",
            "请将{numbers}从小到大排列。",
        ),
    ),
    ("zh", "down"): Wordings(
        train=(
            "把这些数从大到小排列：{numbers}",
            "从大到小排序：{numbers}",
            "请把{numbers}从大到小排列。",
            "将{numbers}按从大到小的顺序排列。",
            "把{numbers}从大到小排序。",
            "按降序排列：{numbers}",
            "请把这些数从大到小排列：{numbers}",
            "请将这些数从大到小排序：{numbers}",
            "将{numbers}从大到小排列。",
            "把{numbers}按从大到小的顺序排列。",
            "请按从大到小的顺序排列：{numbers}",
            "请把{numbers}从大到小排序。",
            "将这些数从大到小排列：{numbers}",
        ),
        held_out=(
            "请把这些数从大到小排序：{numbers}",
            "将这些数按从大到小的顺序排列：{numbers}",
            "请将{numbers}从大到小排列。",
        ),
    ),
}


def compared(answer: int, which: str, language: Language) -> str:
    """73 is larger."""
    if language == "en":
        return f"{answer} is {which}."
    return f"{answer}更{'大' if which == 'larger' else '小'}。"


def pair_owner(pair: tuple[int, int]) -> Split:
    """The split that owns the comparison of two numbers."""
    return split_of("compare", min(pair), max(pair))


def compare(rng: Random, split: Split) -> Item:
    """The larger or the smaller of two numbers."""
    limit = rng.choice((99, 99, 999))

    def propose() -> tuple[int, int]:
        a, b = rng.sample(range(1, limit + 1), 2)
        return a, b

    a, b = draw(split, propose, pair_owner)
    language: Language = rng.choice(("en", "zh"))
    which = rng.choice(("larger", "smaller"))
    answer = max(a, b) if which == "larger" else min(a, b)
    wording = COMPARE[language, which].pick(rng, split)
    reply = compared(answer, which, language)
    return Item(
        task="comparing",
        language=language,
        messages=chat(wording.format(a=a, b=b), reply),
        checker=checker.exact(reply, str(answer)),
        split=split,
        operands=("compare", min(a, b), max(a, b)),
        wording=wording,
    )


def joined(numbers: list[int], language: Language) -> str:
    """The numbers as a list in a sentence."""
    return (", " if language == "en" else "，").join(map(str, numbers))


def draw_numbers(rng: Random, split: Split) -> list[int]:
    """Three to five different numbers up to 99."""
    length = rng.randint(3, 5)
    return draw(
        split,
        lambda: rng.sample(range(1, 100), length),
        lambda numbers: split_of("sort", *sorted(numbers)),
    )


def sort(rng: Random, split: Split) -> Item:
    """Numbers in ascending or descending order."""
    numbers = draw_numbers(rng, split)
    language: Language = rng.choice(("en", "zh"))
    direction = rng.choice(("up", "down"))
    wording = SORT[language, direction].pick(rng, split)
    expected = sorted(numbers, reverse=direction == "down")
    return Item(
        task="sorting",
        language=language,
        messages=chat(
            wording.format(numbers=joined(numbers, language)), joined(expected, language)
        ),
        checker=checker.sequence(expected),
        split=split,
        operands=("sort", *sorted(numbers)),
        wording=wording,
    )
