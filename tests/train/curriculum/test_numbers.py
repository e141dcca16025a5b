import pytest

from astrai_train.data.curriculum.numbers import chinese_numeral, english_numeral


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "零"),
        (2, "二"),
        (10, "十"),
        (12, "十二"),
        (20, "二十"),
        (37, "三十七"),
        (100, "一百"),
        (105, "一百零五"),
        (110, "一百一十"),
        (112, "一百一十二"),
        (999, "九百九十九"),
        (1000, "一千"),
        (1005, "一千零五"),
        (1050, "一千零五十"),
        (2300, "二千三百"),
    ],
)
def test_chinese_numerals(number, text):
    assert chinese_numeral(number) == text


def test_numerals_are_distinct():
    assert len({chinese_numeral(n) for n in range(10_000)}) == 10_000


def test_english_numerals():
    assert [english_numeral(n) for n in (0, 13, 20, 42)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty-two",
    ]


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="number=10000"):
        chinese_numeral(10_000)
    with pytest.raises(ValueError, match="number=-1"):
        english_numeral(-1)
