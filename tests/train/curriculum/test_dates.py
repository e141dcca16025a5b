import calendar
import datetime
import re
from random import Random

from astrai_train.data.curriculum.dates import date_after, is_leap_year, month_length, weekday


def _english(kind, count=300):
    items = (kind(Random(seed), "train") for seed in range(count))
    return [item for item in items if item.language == "en"]


def _integers(values):
    return [value for value in values if isinstance(value, int)]


def test_leap_years_agree_with_the_calendar():
    years = range(1800, 2201)
    assert [is_leap_year(y) for y in years] == [calendar.isleap(y) for y in years]


def test_dates_agree_with_the_calendar():
    months = "|".join(calendar.month_name[1:])
    for item in _english(date_after):
        question = item.messages[0]["content"]
        month, day = re.findall(rf"({months}) (\d+)", question)[0]
        n = int(re.findall(r"(\d+) days", question)[0])
        start = datetime.datetime.strptime(f"{month} {day} 2023", "%B %d %Y")
        end = start + datetime.timedelta(days=n)
        assert item.checker["accepted"] == [f"{end:%B} {end.day}"]


def test_weekdays_agree_with_the_calendar():
    for item in _english(weekday):
        start, n, sign = _integers(item.operands)
        monday = datetime.date(2024, 1, 1)
        end = monday + datetime.timedelta(days=start + sign * n)
        assert item.checker["accepted"] == [f"{end:%A}"]


def test_month_lengths_agree_with_the_calendar():
    for item in _english(month_length):
        year, month = _integers(item.operands)
        assert item.checker["expected"] == calendar.monthrange(year, month)[1]
