"""Prompts for learning from rewards."""

import json

import pytest

from astrai_train.data.cli import main
from astrai_train.data.curriculum import generate
from astrai_train.data.curriculum.prompts import prompts, write_prompts


def test_a_prompt_ends_with_a_question_after_other_items():
    (record,) = prompts(["follow_up"], "val", 1, joined=3, seed=1)
    items = generate("follow_up", "val", 300, 1)
    assert [one["role"] for one in record["prompt"]] == ["user", "assistant"] * 5 + ["user"]
    last = [one for one in items if one.messages[:-1] == record["prompt"][-3:]]
    assert record["checker"] in [one.checker for one in last]


def test_the_files_share_no_question_and_are_always_the_same(tmp_path):
    files = write_prompts(tmp_path, ["dates", "units"], train=50, held_out=20, joined=1)
    first = [file.read_text() for file in files]
    asked = [{str(json.loads(line)["prompt"]) for line in text.splitlines()} for text in first]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert [len(text.splitlines()) for text in first] == [50, 20, 20]
    write_prompts(tmp_path, ["dates", "units"], train=50, held_out=20, joined=1)
    assert [file.read_text() for file in files] == first


def test_the_commands_say_what_they_wrote_and_what_is_wrong(tmp_path, capsys):
    out = str(tmp_path / "prompts")
    main(["prompts", "--out", out, "--tasks", "sorting", "--train", "5", "--held_out", "3"])
    assert "held_out.jsonl: 3 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["prompts", "--out", out, "--tasks", "sums"])
    assert "task='sums' is unknown; choose one of" in capsys.readouterr().err
