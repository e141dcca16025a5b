import re

import pytest

from astrai_train.data.curriculum import TASKS, check, checker, generate


def _corruptions(reply):
    """Wrong replies made from a right one."""
    yield ""
    yield reply + " " + reply
    yield reply + "\n" + "7"
    yield "maybe " + reply[: len(reply) // 2]
    yield " ".join(map(str, range(1000)))
    # the conclusion with another digit, numeral or name in it
    conclusion_starts = reply.rfind("\n") + 1
    for found, other in (("[0-8]", "9"), ("[一二三四五六]", "七"), ("[a-z](?=[.。])", "x")):
        conclusion = re.sub(found, other, reply[conclusion_starts:])
        if conclusion != reply[conclusion_starts:]:
            yield reply[:conclusion_starts] + conclusion


@pytest.mark.parametrize("task", TASKS)
def test_corrupted_replies_fail(task):
    for item in generate(task, "val", 60, seed=0):
        for wrong in _corruptions(item.reply):
            assert not check(item.checker, wrong), (item.checker, wrong)


@pytest.mark.parametrize(
    "reply", ["The answer is 82.", "7+5=12\nthe answer is 82", "答案是82。", "答案是８２"]
)
def test_number_reads_the_conclusion(reply):
    assert check(checker.number(82), reply)


@pytest.mark.parametrize(
    "reply",
    [
        "82",
        "The answer is 182.",
        "The answer is 8 2.",
        "The answer is 81 or 82.",
        "The answer is 81. The answer is 82.",
        "The answer is 82.\nThe answer is 83.",
        "The answer is 82 or not.",
        "The answer is\n82",
        "答案是八十二。",
        " ".join(map(str, range(400))) + "\nThe answer is 82.",
    ],
)
def test_number_refuses_everything_else(reply):
    assert not check(checker.number(82), reply)


def test_number_takes_its_unit_with_or_without_a_space():
    metres = checker.number(7, unit="metres")
    assert check(metres, "The answer is 7 metres.")
    assert check(metres, "The answer is 7metres.")
    assert not check(metres, "The answer is 7.")
    assert not check(metres, "The answer is 7 centimetres.")


def test_chinese_numerals_are_their_own_form():
    assert check(checker.number(82, "chinese"), "37+45\n答案是八十二。")
    assert not check(checker.number(82, "chinese"), "答案是82。")


def test_exact_forgives_only_what_is_documented():
    cat = checker.exact("a cat")
    assert check(cat, " “A  Cat”! ")
    assert not check(cat, "a cat, a dog")


def test_sequence_wants_exactly_these_integers():
    numbers = checker.sequence([3, 12, 45])
    assert check(numbers, "3，12，45")
    assert not check(numbers, "3, 12, 45, 45")
    assert not check(numbers, "12, 3, 45")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="of no known kind"):
        check({"kind": "vibes"}, "good")
