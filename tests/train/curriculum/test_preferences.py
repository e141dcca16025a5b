import json

import pytest

from astrai_train.data.curriculum import TASKS, check, generate, pairs, write_pairs
from astrai_train.data.record import Record

ITEMS = [item for task in TASKS for item in generate(task, "train", 30, 0)]


def test_each_item_has_a_right_and_a_wrong_answer_by_its_own_checker():
    made = list(pairs(ITEMS, 0))
    assert len(made) == len(ITEMS)
    for item, pair in zip(ITEMS, made, strict=True):
        prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
        assert isinstance(prompt, list)
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        assert prompt + chosen == item.messages
        assert check(item.checker, chosen[0]["content"])
        assert not check(item.checker, rejected[0]["content"])


def test_a_slip_leaves_the_working_as_it_was():
    (pair,) = pairs([item for item in ITEMS if "=" in item.reply][:1], 0)
    chosen, rejected = pair["chosen"], pair["rejected"]
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    lines = chosen[0]["content"].splitlines(), rejected[0]["content"].splitlines()
    assert lines[0][:-1] == lines[1][:-1]
    assert lines[0][-1] != lines[1][-1]


def test_files_hold_records_of_stage_dpo_and_are_the_same_again(tmp_path):
    files = write_pairs(tmp_path / "one", 40, 2, seed=3)
    again = write_pairs(tmp_path / "two", 40, 2, seed=3)
    for file, other in zip(files, again, strict=True):
        assert file.read_bytes() == other.read_bytes()
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            record = Record(file=file, line=number, content=json.loads(line), size=0)
            assert record.stage == "dpo"
            assert record.pair().chosen[0]["role"] == "assistant"
    with pytest.raises(ValueError, match="pairs=0 must be at least 1"):
        write_pairs(tmp_path, 0, 2, seed=3)
