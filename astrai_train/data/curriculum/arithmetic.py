"""Sums, differences, products and quotients, worked out digit by digit as at school.

The working is the same in every language, so that what is learned in one helps the others.
Facts that a working may show (single digits, the times table up to 12) always belong to
training; held-out questions need them for operands that no training item shows.
"""

from dataclasses import dataclass
from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.item import (
    Item,
    Language,
    Operands,
    Split,
    Wordings,
    chat,
    draw,
    split_of,
)
from astrai_train.data.curriculum.numbers import chinese_numeral


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operation on two numbers."""

    symbol: str
    a: int
    b: int
    result: int
    steps: tuple[str, ...]

    @property
    def operands(self) -> Operands:
        """What identifies the problem: 37+45 and 45+37 are the same."""
        if self.symbol in "+×":
            return (self.symbol, min(self.a, self.b), max(self.a, self.b))
        return (self.symbol, self.a, self.b)

    @property
    def split(self) -> Split:
        """The split that owns the problem."""
        return "train" if self._is_basic else split_of(*self.operands)

    @property
    def working(self) -> str:
        """The problem and its steps, one a line."""
        return "\n".join((f"{self.a}{self.symbol}{self.b}", *self.steps))

    @property
    def _is_basic(self) -> bool:
        if self.symbol == "+":
            return self.a < 10 and self.b < 10
        if self.symbol == "-":
            # 28 to 31 are what dates subtract when they pass the end of a month
            return (self.b < 10 and self.result < 10) or 28 <= self.b <= 31
        if self.symbol == "×":
            return self.a <= 12 and self.b <= 12
        return self.result <= 12 and self.b <= 12


def add(a: int, b: int) -> Problem:
    """37+45: 7+5=12, 3+4+1=8."""
    steps = []
    place, carry = 1, 0
    while place <= max(a, b):
        terms = [n // place % 10 for n in (a, b) if place == 1 or n >= place] + [carry] * carry
        total = sum(terms)
        if len(terms) > 1:
            steps.append(f"{'+'.join(map(str, terms))}={total}")
        carry = total // 10
        place *= 10
    return Problem(symbol="+", a=a, b=b, result=a + b, steps=tuple(steps))


def subtract(a: int, b: int) -> Problem:
    """82-45: 12-5=7, 8-1-4=3; a must not be smaller than b."""
    steps = []
    place, borrow = 1, 0
    while place <= a:
        terms = [a // place % 10] + [1] * borrow
        if place == 1 or b >= place:
            terms.append(b // place % 10)
        missing = terms[0] < sum(terms[1:])
        terms[0] += 10 * missing
        if len(terms) > 1:
            steps.append(f"{'-'.join(map(str, terms))}={terms[0] - sum(terms[1:])}")
        borrow = int(missing)
        place *= 10
    return Problem(symbol="-", a=a, b=b, result=a - b, steps=tuple(steps))


def multiply(a: int, b: int) -> Problem:
    """37×4: 7×4=28, 3×4=12, 12+2=14; beyond the times table b must be a single digit."""
    steps = []
    if a > 12:
        units, tens = a % 10 * b, a // 10 * b
        steps = [f"{a % 10}×{b}={units}", f"{a // 10}×{b}={tens}"]
        if units >= 10:
            steps.append(f"{tens}+{units // 10}={tens + units // 10}")
    else:
        steps = [f"{a}×{b}={a * b}"]
    return Problem(symbol="×", a=a, b=b, result=a * b, steps=tuple(steps))


def divide(a: int, b: int) -> Problem:
    """148÷4: 14=4×3+2, 28=4×7; a must be a multiple of b."""
    quotient = a // b
    steps = [f"{a}={b}×{quotient}"]
    if quotient > 12:
        tens, rest = divmod(a // 10, b)
        steps = [
            f"{a // 10}={b}×{tens}" + (f"+{rest}" if rest else ""),
            f"{rest * 10 + a % 10}={b}×{quotient % 10}",
        ]
    return Problem(symbol="÷", a=a, b=b, result=quotient, steps=tuple(steps))


def reply(problem: Problem, language: Language, form: str = "digits", unit: str = "") -> str:
    """The working and the conclusion."""
    result = chinese_numeral(problem.result) if form == "chinese" else str(problem.result)
    return f"{problem.working}\n{conclude(result + unit, language)}"


def conclude(answer: str, language: Language) -> str:
    """The last line of a worked reply."""
    return f"The answer is {answer}." if language == "en" else f"答案是{answer}。"


def _stories(text: str, **slots: tuple[str | tuple[str, ...], ...]) -> tuple[str, ...]:
    """The text with every combination of fillers.

    A slot `box_boxes=(("bag", "bags"), ...)` fills {box} and {boxes} together.
    """
    stories = [text]
    for slot, fillers in slots.items():
        filled: list[str] = []
        for filler in fillers:
            words = (filler,) if isinstance(filler, str) else filler
            for story in stories:
                for name, word in zip(slot.split("_"), words, strict=True):
                    story = story.replace("{" + name + "}", word)
                filled.append(story)
        stories = filled
    return tuple(stories)


_ENGLISH = {
    "+": Wordings(
        train=(
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "{a} + {b} = ?",
            "{a}+{b}=?",
            "{a}+{b}",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
            "Please add {b} to {a}.",
            "What is the sum of {a} and {b}?",
            "Calculate {a} + {b}.",
            "Can you tell me what {a} plus {b} is?",
            "Tom has {a} apples and buys {b} more. How many apples does he have now?",
            "There are {a} boys and {b} girls in the school. How many children are there?",
            "I read {a} pages yesterday and {b} pages today. How many pages is that?",
            "A pen costs {a} yuan and a book costs {b} yuan. How much do they cost together?",
            "Can you tell me how much {a} plus {b} is?",
            "Tell me what {a} + {b} is.",
            "Please tell me what {a} plus {b} is.",
            "Can you calculate {a} + {b} for me?",
            "Can you add {b} to {a}?",
            "Please work out {a} plus {b}.",
            "Please calculate {a} + {b}.",
            *_stories(
                "{name} has {a} {thing} and buys {b} more. How many {thing} are there now?",
                name=("Jack", "Lily", "Mary"),
                thing=("pencils", "cards", "eggs", "books"),
            ),
        ),
        held_out=(
            "Can you add {a} and {b} for me?",
            "Tell me how much {a} + {b} is.",
            "Please calculate {a} plus {b}.",
            "Ann has {a} books and buys {b} more. How many books does she have now?",
        ),
    ),
    "-": Wordings(
        train=(
            "What is {a} - {b}?",
            "What is {a} minus {b}?",
            "{a} - {b} = ?",
            "{a}-{b}=?",
            "{a}-{b}",
            "How much is {a} minus {b}?",
            "Subtract {b} from {a}.",
            "Please take {b} away from {a}.",
            "What is the difference between {a} and {b}?",
            "Calculate {a} - {b}.",
            "Can you tell me what {a} minus {b} is?",
            "Tom has {a} apples and eats {b} of them. How many apples are left?",
            "There are {a} birds in a tree and {b} fly away. How many birds are left?",
            "A book has {a} pages and I read {b} of them. How many pages are left?",
            "Can you tell me how much {a} minus {b} is?",
            "Tell me what {a} - {b} is.",
            "Please tell me what {a} minus {b} is.",
            "Can you calculate {a} - {b} for me?",
            "Can you take {b} from {a} for me?",
            "Please work out {a} minus {b}.",
            "Please calculate {a} - {b}.",
            "Please subtract {b} from {a}.",
            *_stories(
                "{name} has {a} {thing} and {gives} {b} of them. How many {thing} are left?",
                name=("Jack", "Lily"),
                thing=("pencils", "cards", "cakes"),
                gives=("sells", "loses", "gives a friend"),
            ),
        ),
        held_out=(
            "Can you subtract {b} from {a} for me?",
            "Tell me how much {a} - {b} is.",
            "Please calculate {a} minus {b}.",
            "Ann has {a} books and gives away {b} of them. How many books are left?",
        ),
    ),
    "×": Wordings(
        train=(
            "What is {a} × {b}?",
            "What is {a} times {b}?",
            "{a} × {b} = ?",
            "{a}×{b}=?",
            "{a}*{b}",
            "How much is {a} times {b}?",
            "Multiply {a} by {b}.",
            "What is the product of {a} and {b}?",
            "Calculate {a} × {b}.",
            "Can you tell me what {a} times {b} is?",
            "A box holds {a} apples. How many apples are in {b} boxes?",
            "A book costs {a} yuan. How much do {b} books cost?",
            "Can you tell me how much {a} times {b} is?",
            "Tell me what {a} × {b} is.",
            "Please tell me what {a} times {b} is.",
            "Can you calculate {a} × {b} for me?",
            "Can you multiply {a} and {b}?",
            "Please work out {a} times {b}.",
            "Please calculate {a} × {b}.",
            "Please multiply {a} by {b}.",
            *_stories(
                "A {box} holds {a} {thing}. How many {thing} are in {b} {boxes}?",
                box_boxes=(("basket", "baskets"), ("truck", "trucks"), ("room", "rooms")),
                thing=("eggs", "books", "pens", "oranges"),
            ),
        ),
        held_out=(
            "Can you multiply {a} by {b} for me?",
            "Tell me how much {a} × {b} is.",
            "Please calculate {a} times {b}.",
            "A bag holds {a} oranges. How many oranges are in {b} bags?",
        ),
    ),
    "÷": Wordings(
        train=(
            "What is {a} ÷ {b}?",
            "What is {a} divided by {b}?",
            "{a} ÷ {b} = ?",
            "{a}÷{b}=?",
            "{a}/{b}",
            "How much is {a} divided by {b}?",
            "Divide {a} by {b}.",
            "Calculate {a} ÷ {b}.",
            "Can you tell me what {a} divided by {b} is?",
            "{b} children share {a} apples equally. How many apples does each child get?",
            "Can you tell me how much {a} divided by {b} is?",
            "Tell me what {a} ÷ {b} is.",
            "Please tell me what {a} divided by {b} is.",
            "Can you calculate {a} ÷ {b} for me?",
            "Can you divide {a} by {b}?",
            "Please work out {a} divided by {b}.",
            "Please calculate {a} ÷ {b}.",
            "Please divide {a} by {b}.",
            *_stories(
                "{b} {people} share {a} {thing} equally. How many {thing} does each {one} get?",
                people_one=(("boys", "boy"), ("students", "student"), ("workers", "worker")),
                thing=("pencils", "cakes", "eggs", "books"),
            ),
        ),
        held_out=(
            "Can you divide {a} by {b} for me?",
            "Tell me how much {a} ÷ {b} is.",
            "Please calculate {a} divided by {b}.",
            "{b} friends share {a} oranges equally. How many oranges does each friend get?",
        ),
    ),
}

_CHINESE = {
    "+": Wordings(
        train=(
            "{a}加{b}等于多少？",
            "{a}加{b}等于几？",
            "{a}加{b}是多少？",
            "{a}加上{b}等于多少？",
            "请问{a}加{b}等于多少？",
            "计算{a}加{b}。",
            "{a}和{b}的和是多少？",
            "求{a}与{b}的和。",
            "把{a}和{b}加起来。",
            "你知道{a}加{b}等于多少吗？",
            "小明有{a}个苹果，又买了{b}个，现在一共有多少个？",
            "学校里有{a}个男孩和{b}个女孩，一共有多少个孩子？",
            "昨天我读了{a}页书，今天读了{b}页，一共读了多少页？",
            "请计算{a}加{b}。",
            "请问{a}加上{b}等于几？",
            "请问{a}和{b}的和是多少？",
            "请把{a}和{b}加起来。",
            "{a}和{b}加起来等于多少？",
            "请求出{a}与{b}的和。",
            *_stories(
                "{name}有{a}{thing}，又{gets}了{b}{unit}，现在一共有多少{unit}？",
                name=("小丽", "小刚", "小华", "老王"),
                thing_unit=(("支铅笔", "支"), ("张卡片", "张"), ("块饼干", "块"), ("本词典", "本")),
                gets=("买",),
            ),
            *_stories(
                "{name}有{a}本书，又{gets}了{b}本，一共有多少本书？",
                name=("小丽", "小军"),
                gets=("借", "拿"),
            ),
        ),
        held_out=(
            "请计算{a}加{b}等于多少。",
            "请问{a}加上{b}是多少？",
            "请把{a}和{b}加起来，等于多少？",
            "小红有{a}本书，又买了{b}本，现在一共有多少本？",
        ),
    ),
    "-": Wordings(
        train=(
            "{a}减{b}等于多少？",
            "{a}减{b}等于几？",
            "{a}减{b}是多少？",
            "{a}减去{b}等于多少？",
            "请问{a}减{b}等于多少？",
            "计算{a}减{b}。",
            "{a}和{b}的差是多少？",
            "求{a}与{b}的差。",
            "从{a}里减去{b}。",
            "你知道{a}减{b}等于多少吗？",
            "小明有{a}个苹果，吃了{b}个，还剩多少个？",
            "树上有{a}只鸟，飞走了{b}只，还剩多少只？",
            "一本书有{a}页，我读了{b}页，还剩多少页？",
            "请计算{a}减{b}。",
            "请问{a}减去{b}等于几？",
            "请问{a}和{b}的差是多少？",
            "请从{a}里减去{b}。",
            "{a}减去{b}以后等于多少？",
            "请求出{a}与{b}的差。",
            *_stories(
                "{name}有{a}{thing}，{loses}{b}{unit}，还剩多少{unit}？",
                name=("小丽", "小华", "老王"),
                thing_unit=(("支铅笔", "支"), ("张卡片", "张"), ("块饼干", "块")),
                loses=("送给别人", "送给弟弟"),
            ),
            *_stories(
                "{name}有{a}本书，{loses}{b}本，还剩多少本书？",
                name=("小丽", "小军"),
                loses=("丢了", "卖了", "借给同学"),
            ),
        ),
        held_out=(
            "请计算{a}减{b}等于多少。",
            "请问{a}减去{b}是多少？",
            "请从{a}里减去{b}，等于多少？",
            "小红有{a}本书，送给别人{b}本，还剩多少本？",
        ),
    ),
    "×": Wordings(
        train=(
            "{a}乘{b}等于多少？",
            "{a}乘{b}等于几？",
            "{a}乘{b}是多少？",
            "{a}乘以{b}等于多少？",
            "请问{a}乘{b}等于多少？",
            "计算{a}乘{b}。",
            "{a}和{b}的积是多少？",
            "求{a}与{b}的积。",
            "你知道{a}乘{b}等于多少吗？",
            "一个盒子装{a}个苹果，{b}个盒子一共装多少个？",
            "一本书{a}元，买{b}本一共要多少元？",
            "请计算{a}乘{b}。",
            "请问{a}乘以{b}等于几？",
            "请问{a}和{b}的积是多少？",
            "请把{a}乘以{b}。",
            "{a}和{b}相乘等于多少？",
            "请求{a}和{b}的积。",
            *_stories(
                "一个{box}装{a}{thing}，{b}个{box}一共装多少{unit}？",
                box=("篮子", "柜子", "箱", "碗"),
                thing_unit=(("个橙子", "个"), ("支铅笔", "支"), ("块饼干", "块"), ("个鸡蛋", "个")),
            ),
        ),
        held_out=(
            "请计算{a}乘{b}等于多少。",
            "请问{a}乘以{b}是多少？",
            "请求出{a}与{b}的积。",
            "一个包装{a}个橙子，{b}个包一共装多少个？",
        ),
    ),
    "÷": Wordings(
        train=(
            "{a}除以{b}等于多少？",
            "{a}除以{b}等于几？",
            "{a}除以{b}是多少？",
            "请问{a}除以{b}等于多少？",
            "计算{a}除以{b}。",
            "求{a}除以{b}的商。",
            "你知道{a}除以{b}等于多少吗？",
            "{a}个苹果平均分给{b}个孩子，每个孩子分到多少个？",
            "请计算{a}除以{b}。",
            "请问{a}除以{b}等于几？",
            "{a}除以{b}的商是多少？",
            "请把{a}除以{b}。",
            "请求{a}除以{b}的商。",
            "把{a}除以{b}，等于几？",
            *_stories(
                "{a}{thing}平均分给{b}个{people}，每个{people}分到多少{unit}？",
                people=("学生", "工人", "男孩"),
                thing_unit=(("个橙子", "个"), ("支铅笔", "支"), ("块饼干", "块"), ("个鸡蛋", "个")),
            ),
        ),
        held_out=(
            "请计算{a}除以{b}等于多少。",
            "请问{a}除以{b}的商是多少？",
            "请把{a}除以{b}，等于多少？",
            "{a}个橙子平均分给{b}个朋友，每个朋友分到多少个？",
        ),
    ),
}

_CHINESE_SYMBOLS = {
    "+": ("计算{a}+{b}。", "{a}+{b}等于多少？", "请问{a} + {b} 等于几？"),
    "-": ("计算{a}-{b}。", "{a}-{b}等于多少？", "请问{a} - {b} 等于几？"),
    "×": ("计算{a}×{b}。", "{a}×{b}等于多少？", "请问{a} × {b} 等于几？"),
    "÷": ("计算{a}÷{b}。", "{a}÷{b}等于多少？", "请问{a} ÷ {b} 等于几？"),
}


def propose(rng: Random, symbol: str) -> Problem:
    """A problem of moderate size with this symbol."""
    if symbol == "+":
        return add(rng.randint(1, 99), rng.randint(1, 99))
    if symbol == "-":
        a = rng.randint(2, 99)
        return subtract(a, rng.randint(1, a))
    basic = rng.random() < 0.3
    quotient = rng.randint(2, 12) if basic else rng.randint(13, 99)
    factor = rng.randint(2, 12) if basic else rng.randint(2, 9)
    if symbol == "×":
        return multiply(quotient, factor)
    return divide(quotient * factor, factor)


def draw_problem(rng: Random, split: Split, symbols: str = "+++---××÷") -> Problem:
    """A problem that the split owns; a symbol given twice comes twice as often."""
    symbol = rng.choice(symbols)
    return draw(split, lambda: propose(rng, symbol), lambda problem: problem.split)


def wordings(problem: Problem, language: Language) -> Wordings:
    """Ways to ask for this problem."""
    return (_ENGLISH if language == "en" else _CHINESE)[problem.symbol]


def english(rng: Random, split: Split) -> Item:
    """Arithmetic asked in English."""
    problem = draw_problem(rng, split)
    wording = wordings(problem, "en").pick(rng, split)
    return Item(
        task="arithmetic_english",
        language="en",
        messages=chat(wording.format(a=problem.a, b=problem.b), reply(problem, "en")),
        checker=checker.number(problem.result),
        split=split,
        operands=problem.operands,
        wording=wording,
    )


def chinese(rng: Random, split: Split) -> Item:
    """Arithmetic asked in Chinese, numbers in digits."""
    problem = draw_problem(rng, split)
    wording = wordings(problem, "zh").pick(rng, split)
    if split != "held_out" and rng.random() < 0.25:
        wording = rng.choice(_CHINESE_SYMBOLS[problem.symbol])
    return Item(
        task="arithmetic_chinese",
        language="zh",
        messages=chat(wording.format(a=problem.a, b=problem.b), reply(problem, "zh")),
        checker=checker.number(problem.result),
        split=split,
        operands=problem.operands,
        wording=wording,
    )


def numerals(rng: Random, split: Split) -> Item:
    """Arithmetic asked and answered in Chinese numerals."""
    problem = draw_problem(rng, split)
    wording = wordings(problem, "zh").pick(rng, split)
    question = wording.format(a=chinese_numeral(problem.a), b=chinese_numeral(problem.b))
    return Item(
        task="arithmetic_numerals",
        language="zh",
        messages=chat(question, reply(problem, "zh", "chinese")),
        checker=checker.number(problem.result, "chinese"),
        split=split,
        operands=problem.operands,
        wording=wording,
    )
