"""Days of the week, lengths of months, and dates some days away."""

from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.arithmetic import add, conclude, subtract
from astrai_train.data.curriculum.item import (
    Item,
    Language,
    Split,
    Wordings,
    chat,
    draw,
    split_of,
)

_DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_WEEKDAY = {
    ("en", 1): Wordings(
        train=(
            "Today is {day}. What day is it in {n} days?",
            "If today is {day}, what day will it be in {n} days?",
            "What day is {n} days after {day}?",
            "It is {day}. Which day comes {n} days later?",
            "Today is {day}. What day will it be {n} days from now?",
        ),
        held_out=(
            "It is {day} today. What day will it be in {n} days?",
            "Which day is {n} days after {day}?",
            "If it is {day} today, what day is it {n} days later?",
        ),
    ),
    ("en", -1): Wordings(
        train=(
            "Today is {day}. What day was it {n} days ago?",
            "If today is {day}, what day was it {n} days ago?",
            "What day is {n} days before {day}?",
            "It is {day}. Which day was it {n} days earlier?",
        ),
        held_out=(
            "It is {day} today. What day was it {n} days ago?",
            "Which day is {n} days before {day}?",
            "If it is {day} today, what day was it {n} days earlier?",
        ),
    ),
    ("zh", 1): Wordings(
        train=(
            "今天是{day}，{n}天后是星期几？",
            "如果今天是{day}，那么{n}天后是星期几？",
            "{day}过{n}天是星期几？",
            "今天{day}，再过{n}天是星期几？",
            "{day}的{n}天后是星期几？",
        ),
        held_out=(
            "如果今天是{day}，再过{n}天是星期几？",
            "请问今天是{day}，那么{n}天后是星期几？",
            "今天是{day}，过{n}天是星期几？",
        ),
    ),
    ("zh", -1): Wordings(
        train=(
            "今天是{day}，{n}天前是星期几？",
            "如果今天是{day}，那么{n}天前是星期几？",
            "{day}的{n}天前是星期几？",
            "今天{day}，{n}天以前是星期几？",
        ),
        held_out=(
            "如果今天是{day}，{n}天以前是星期几？",
            "请问今天是{day}，那么{n}天前是星期几？",
            "今天是{day}，请问{n}天前是星期几？",
        ),
    ),
}

_MONTH_LENGTH = {
    "en": Wordings(
        train=(
            "How many days are there in {month} {year}?",
            "How many days does {month} {year} have?",
            "How long is {month} {year}, in days?",
            "Tell me the number of days in {month} {year}.",
            "Please tell me the number of days in {month} {year}.",
            "Tell me how many days {month} {year} has.",
            "Can you tell me how many days there are in {month} {year}?",
        ),
        held_out=(
            "How many days are in {month} {year}?",
            "Please tell me how many days {month} {year} has.",
        ),
    ),
    "zh": Wordings(
        train=(
            "{year}年{month}有多少天？",
            "{year}年的{month}有几天？",
            "请问{year}年{month}有多少天？",
            "{year}年{month}一共有几天？",
            "请问{year}年的{month}有几天？",
            "请问{year}年{month}一共有几天？",
            "{year}年的{month}一共有多少天？",
            "请告诉我{year}年的{month}有多少天。",
            "{year}年{month}有几天？",
        ),
        held_out=(
            "请问{year}年的{month}一共有多少天？",
            "{year}年{month}这个月有几天？",
        ),
    ),
}

_DATE = {
    "en": Wordings(
        train=(
            "What date is {n} days after {date}?",
            "Today is {date}. What is the date in {n} days?",
            "What is the date {n} days after {date}?",
            "If today is {date}, what date will it be in {n} days?",
            "It is {date}. What will the date be {n} days later?",
            "Which date comes {n} days after {date}?",
            "It is {date} today. What is the date in {n} days?",
            "If it is {date} today, what date is it {n} days later?",
        ),
        held_out=(
            "Which date is {n} days after {date}?",
            "It is {date} today. What date will it be in {n} days?",
            "If today is {date}, what is the date {n} days later?",
        ),
    ),
    "zh": Wordings(
        train=(
            "{date}过{n}天是几月几日？",
            "今天是{date}，{n}天后是几月几日？",
            "{date}的{n}天后是几月几日？",
            "如果今天是{date}，那么{n}天后是几月几日？",
            "{date}再过{n}天是哪一天？",
            "请问{date}过{n}天是几月几日？",
            "请问{date}再过{n}天是哪一天？",
            "{date}的{n}天后是哪一天？",
            "请问今天是{date}，{n}天后是几月几日？",
        ),
        held_out=(
            "今天是{date}，再过{n}天是几月几日？",
            "请问{date}的{n}天后是哪一天？",
            "如果今天是{date}，过{n}天是几月几日？",
        ),
    ),
}


def weekday(rng: Random, split: Split) -> Item:
    """The day of the week some days from a day, counted one by one."""
    start, n, sign, language = draw(
        split,
        lambda: (
            rng.randrange(7),
            rng.randint(2, 12),
            rng.choice((1, -1)),
            rng.choice(("en", "zh")),
        ),
        lambda operands: split_of("weekday", *operands),
    )
    names = _DAYS[language]
    wording = _WEEKDAY[language, sign].pick(rng, split)
    passed = [f"{i}{names[(start + sign * i) % 7]}" for i in range(1, n + 1)]
    answer = names[(start + sign * n) % 7]
    return Item(
        task="dates",
        language=language,
        messages=chat(
            wording.format(day=names[start], n=n),
            f"{' '.join(passed)}\n{conclude(answer, language)}",
        ),
        checker=checker.text(answer),
        split=split,
        operands=("weekday", start, n, sign, language),
        wording=wording,
    )


def is_leap_year(year: int) -> bool:
    """Whether February has 29 days."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def month_name(month: int, language: Language) -> str:
    """March or 3月 for 3."""
    return _MONTHS[month - 1] if language == "en" else f"{month}月"


def month_length(rng: Random, split: Split) -> Item:
    """The number of days in a month, which for February takes a look at the year."""

    def propose() -> tuple[int, int]:
        month = 2 if rng.random() < 0.4 else rng.randint(1, 12)
        return rng.randint(1901, 2099), month

    year, month = draw(split, propose, lambda operands: split_of("month", *operands))
    language = rng.choice(("en", "zh"))
    wording = _MONTH_LENGTH[language].pick(rng, split)
    days = _LENGTHS[month - 1]
    reason = ""
    if month == 2:
        leap = is_leap_year(year)
        days += leap
        if language == "en":
            reason = f"{year} is {'a' if leap else 'not a'} leap year.\n"
        else:
            reason = f"{year}年{'是' if leap else '不是'}闰年。\n"
    return Item(
        task="dates",
        language=language,
        messages=chat(
            wording.format(month=month_name(month, language), year=year),
            reason + conclude(str(days), language),
        ),
        checker=checker.number(days),
        split=split,
        operands=("month", year, month),
        wording=wording,
    )


def date_after(rng: Random, split: Split) -> Item:
    """The date some days after a date."""

    def propose() -> tuple[int, int, int]:
        month = rng.randint(1, 12)
        # the length of February depends on a year that is not given
        day = rng.randint(1, 14 if month == 2 else _LENGTHS[month - 1])
        return month, day, rng.randint(2, 14)

    # a held-out item must not show a held-out sum to training, so the sum decides
    month, day, n = draw(split, propose, lambda operands: add(operands[1], operands[2]).split)
    language = rng.choice(("en", "zh"))
    wording = _DATE[language].pick(rng, split)
    problem = add(day, n)
    lines = [problem.working, f"{day}+{n}={problem.result}"]
    length = _LENGTHS[month - 1]
    end_month, end_day = month, problem.result
    name = month_name(month, language)
    if problem.result > length:
        passed = subtract(problem.result, length)
        lines.append(f"{name} has {length} days." if language == "en" else f"{name}有{length}天。")
        lines.append(f"{problem.result}-{length}={passed.result}")
        end_month, end_day = month % 12 + 1, passed.result
    answer = date_text(end_month, end_day, language)
    return Item(
        task="dates",
        language=language,
        messages=chat(
            wording.format(date=date_text(month, day, language), n=n),
            "\n".join((*lines, conclude(answer, language))),
        ),
        checker=checker.text(answer),
        split=split,
        operands=("date", *problem.operands),
        wording=wording,
    )


def date_text(month: int, day: int, language: Language) -> str:
    """March 5 or 3月5日."""
    name = month_name(month, language)
    return f"{name} {day}" if language == "en" else f"{name}{day}日"


def dates(rng: Random, split: Split) -> Item:
    """One of the kinds above."""
    return rng.choice((weekday, month_length, date_after, date_after))(rng, split)
