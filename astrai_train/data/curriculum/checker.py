r"""Judges a reply from its text alone.

A checker is a plain dictionary, so that it travels with the record:

| kind | fields | the reply is right when |
|---|---|---|
| `exact` | `accepted` | the whole reply is one of the accepted texts |
| `number` | `expected`, `form`, `unit` | it concludes with this number, written in this form |
| `text` | `accepted` | it concludes with one of the accepted texts |
| `sequence` | `expected` | the last line holds these integers, in this order, and no other |

To *conclude* is to end with `The answer is X.` or `答案是X。` on the last line, said exactly once
in a reply of at most 400 characters: working may precede it, but listing candidates or
answering twice is wrong.

Normalisation, before anything is compared: Unicode NFKC (full-width forms become ASCII), case
folding, runs of white space become one space, quotation marks vanish, and so do white space,
full stops and exclamation marks at the end.
"""

import re
import unicodedata

from astrai_train.data.curriculum.item import Checker
from astrai_train.data.curriculum.numbers import chinese_numeral

MAX_REPLY = 400

_CONCLUSION = re.compile(r"the answer is|答案是")
_QUOTES = str.maketrans("", "", "\"'“”‘’「」『』`")
_INTEGER = re.compile(r"-?\d+")


def normalise(text: str) -> str:
    """The text as it is compared, see the module's docstring."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_QUOTES)
    return " ".join(text.split()).rstrip(" .。!")


def conclusion(reply: str) -> str | None:
    """The normalised X of a reply that ends with `The answer is X.`, None without one."""
    if len(reply) > MAX_REPLY or len(_CONCLUSION.findall(normalise(reply))) != 1:
        return None
    said = _CONCLUSION.split(_last_line(reply))
    return said[1].strip() if len(said) == 2 else None


def _last_line(reply: str) -> str:
    return normalise(reply.strip().rpartition("\n")[2])


def check(checker: Checker, reply: str) -> bool:
    """Whether the reply is right."""
    match checker["kind"], checker.get("expected"), checker.get("accepted"):
        case "exact", None, list(accepted):
            return normalise(reply) in {normalise(str(text)) for text in accepted}
        case "text", None, list(accepted):
            return conclusion(reply) in {normalise(str(text)) for text in accepted}
        case "number", int(expected), None:
            written = chinese_numeral(expected) if checker["form"] == "chinese" else str(expected)
            answer = conclusion(reply)
            # 7 m and 7m are one answer, 7 1 and 71 are not
            return answer in {f"{written}{gap}{checker['unit']}".strip() for gap in ("", " ")}
        case "sequence", list(expected), None:
            integers = [int(number) for number in _INTEGER.findall(_last_line(reply))]
            return len(reply) <= MAX_REPLY and integers == expected
        case _:
            raise ValueError(f"checker={checker!r} is of no known kind; see checker.py.")


def exact(*accepted: str) -> Checker:
    """The whole reply must be one of these."""
    return {"kind": "exact", "accepted": list(accepted)}


def number(expected: int, form: str = "digits", unit: str = "") -> Checker:
    """The reply must conclude with this number (and unit)."""
    return {"kind": "number", "expected": expected, "form": form, "unit": unit}


def text(*accepted: str) -> Checker:
    """The reply must conclude with one of these."""
    return {"kind": "text", "accepted": list(accepted)}


def sequence(expected: list[int]) -> Checker:
    """The last line must hold exactly these integers."""
    return {"kind": "sequence", "expected": expected}
