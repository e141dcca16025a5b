"""Conversion between units with a fixed set of factors."""

from dataclasses import dataclass
from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.arithmetic import conclude, divide, multiply
from astrai_train.data.curriculum.item import Item, Language, Split, Wordings, chat, draw, split_of


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One large unit is `factor` small ones."""

    large: dict[Language, str]
    small: dict[Language, str]
    factor: int


def _table(text: str) -> tuple[Conversion, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(
        Conversion(large={"en": a, "zh": b}, small={"en": c, "zh": d}, factor=int(factor))
        for a, b, factor, c, d in rows
    )


_CONVERSIONS = _table("""
metres 米 100 centimetres 厘米
metres 米 10 decimetres 分米
centimetres 厘米 10 millimetres 毫米
kilometres 千米 1000 metres 米
kilograms 千克 1000 grams 克
tonnes 吨 1000 kilograms 千克
litres 升 1000 millilitres 毫升
yuan 元 10 jiao 角
yuan 元 100 fen 分
hours 小时 60 minutes 分钟
minutes 分钟 60 seconds 秒
days 天 24 hours 小时
weeks 星期 7 days 天
years 年 12 months 个月
""")

_WORDINGS = {
    "en": Wordings(
        train=(
            "How many {to} are {n} {source}?",
            "How many {to} are there in {n} {source}?",
            "Convert {n} {source} to {to}.",
            "What is {n} {source} in {to}?",
            "{n} {source} = ? {to}",
            "Please change {n} {source} into {to}.",
        ),
        held_out=(
            "Please convert {n} {source} into {to}.",
            "How many {to} is {n} {source}?",
            "Tell me how many {to} there are in {n} {source}.",
        ),
    ),
    "zh": Wordings(
        train=(
            "{n}{source}等于多少{to}？",
            "{n}{source}是多少{to}？",
            "把{n}{source}换算成{to}。",
            "{n}{source}有多少{to}？",
            "请问{n}{source}等于几{to}？",
            "{n}{source}=？{to}",
        ),
        held_out=(
            "请把{n}{source}换算成{to}。",
            "请问{n}{source}是多少{to}？",
            "{n}{source}换算成{to}是多少？",
        ),
    ),
}


def _limit(factor: int) -> int:
    """Largest number of large units: appending zeros is easy, 24 hours a day are not."""
    if factor in (10, 100, 1000):
        return 99
    return {7: 40, 12: 12, 24: 9, 60: 12}[factor]


def _owner(conversion: Conversion, n: int) -> Split:
    """A product that arithmetic also asks for, as 37×7, belongs where arithmetic has it."""
    if conversion.factor in (7, 24) and max(n, conversion.factor) > 12:
        return multiply(max(n, conversion.factor), min(n, conversion.factor)).split
    return split_of("units", conversion.large["en"], conversion.small["en"], n)


def _steps(n: int, factor: int, *, down: bool) -> list[str]:
    """The working: down multiplies n by the factor, up divides to get n."""
    result = n * factor
    if not down:
        if factor == 7:
            return [*divide(result, 7).working.split("\n"), f"{result}÷7={n}"]
        if factor == 60:
            return [f"{n * 6}=6×{n}", f"{result}÷60={n}"]
        return [f"{result}÷{factor}={n}"]
    if factor in (7, 24):
        return [*multiply(max(n, factor), min(n, factor)).steps, f"{n}×{factor}={result}"]
    if factor == 60:
        return [f"{n}×6={n * 6}", f"{n}×60={result}"]
    return [f"{n}×{factor}={result}"]


def convert(rng: Random, split: Split) -> Item:
    """A whole number of one unit in another."""

    def propose() -> tuple[Conversion, int]:
        conversion = rng.choice(_CONVERSIONS)
        return conversion, rng.randint(2, _limit(conversion.factor))

    conversion, n = draw(split, propose, lambda operands: _owner(*operands))
    down = rng.random() < 0.5
    language: Language = rng.choice(("en", "zh"))
    source, target = conversion.large[language], conversion.small[language]
    given, answer = n, n * conversion.factor
    if not down:
        source, target, given, answer = target, source, answer, given
    unit = f" {target}" if language == "en" else target
    wording = _WORDINGS[language].pick(rng, split)
    steps = _steps(n, conversion.factor, down=down)
    return Item(
        task="units",
        language=language,
        messages=chat(
            wording.format(n=given, source=source, to=target),
            "\n".join((*steps, conclude(f"{answer}{unit}", language))),
        ),
        checker=checker.number(answer, unit=target),
        split=split,
        operands=("units", conversion.large["en"], conversion.small["en"], n),
        wording=wording,
    )
