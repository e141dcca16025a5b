from typing import cast

import pytest

from astrai_train.data.curriculum import (
    CLOSED_TASKS,
    TASKS,
    WEIGHTS,
    Split,
    check,
    generate,
    mixture,
)

OPEN_TASKS = [task for task in TASKS if task not in CLOSED_TASKS]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "val", "held_out"])
def test_reference_replies_pass_their_own_checker(task, split):
    for item in generate(task, split, 150, seed=1):
        assert check(item.checker, item.reply), item


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_held_out_has_200_distinct_items(task):
    items = generate(task, "held_out", 200, seed=3)
    assert len({str(item.messages) for item in items}) == 200


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_splits_share_no_operands(task):
    train = {item.operands for item in generate(task, "train", 4000, seed=0)}
    for split in ("val", "held_out"):
        assert train.isdisjoint(item.operands for item in generate(task, split, 200, seed=0))


@pytest.mark.parametrize("task", TASKS)
def test_training_and_held_out_share_no_wording(task):
    train = {item.wording for item in generate(task, "train", 4000, seed=0)}
    assert train.isdisjoint(item.wording for item in generate(task, "held_out", 30, seed=0))


def test_no_held_out_question_occurs_in_the_training_mixture():
    train = {item.messages[-2]["content"] for item in mixture(20_000, seed=0)}
    for task in OPEN_TASKS:
        if task == "follow_up":  # "By how much?" depends on what came before
            continue
        for item in generate(task, "held_out", 200, seed=0):
            assert item.messages[-2]["content"] not in train


def _shown(items, symbol):
    lines = (line for item in items for m in item.messages for line in m["content"].split("\n"))
    return {line for line in lines if symbol in line and line.replace(symbol, "").isdigit()}


@pytest.mark.parametrize("symbol", "+-×÷")
def test_no_working_in_training_shows_a_held_out_problem(symbol):
    held_out = _shown(generate("arithmetic_english", "held_out", 300, seed=0), symbol)
    assert held_out.isdisjoint(_shown(mixture(20_000, seed=0), symbol))


def test_the_same_arguments_give_the_same_items():
    assert generate("dates", "train", 50, seed=7) == generate("dates", "train", 50, seed=7)
    assert generate("dates", "train", 50, seed=7) != generate("dates", "train", 50, seed=8)


def test_mixture_holds_every_task_by_weight():
    tasks = [item.task for item in mixture(2000, seed=0)]
    assert set(WEIGHTS) == set(TASKS)
    expected = 2000 * WEIGHTS["sorting"] / sum(WEIGHTS.values())
    assert tasks.count("sorting") == pytest.approx(expected, abs=1)


def test_an_unknown_task_or_split_is_refused_by_name():
    with pytest.raises(ValueError, match="task='chess' is unknown; choose one of arithmetic"):
        generate("chess", "train", 1, seed=0)
    with pytest.raises(ValueError, match="split='test' is unknown"):
        generate("dates", cast(Split, "test"), 1, seed=0)


def test_more_held_out_items_than_exist_are_refused():
    with pytest.raises(ValueError, match="count=99999: units has only about"):
        generate("units", "held_out", 99_999, seed=0)
