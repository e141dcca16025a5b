"""Numbers as Chinese and English words."""

_DIGITS = "零一二三四五六七八九"
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
    *("seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def chinese_numeral(number: int) -> str:
    """Chinese numeral of 0..9999: 12 is 十二, 112 is 一百一十二, 105 is 一百零五."""
    if not 0 <= number <= 9999:
        raise ValueError(f"number={number} has no numeral here; use 0 to 9999.")
    if number < 10:
        return _DIGITS[number]
    if number < 20:
        return "十" + (_DIGITS[number % 10] if number % 10 else "")
    text = ""
    gap = False
    for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // place % 10
        if digit == 0:
            gap = bool(text)
            continue
        text += ("零" if gap else "") + _DIGITS[digit] + name
        gap = False
    return text


def english_numeral(number: int) -> str:
    """English word of 0..99: 42 is forty-two."""
    if not 0 <= number <= 99:
        raise ValueError(f"number={number} has no word here; use 0 to 99.")
    if number < 20:
        return _SMALL[number]
    tens, units = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[units]}" if units else "")
