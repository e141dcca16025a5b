import json

import pytest

from astrai_train.data.curriculum import TASKS, check, mixture, write_curriculum
from astrai_train.data.curriculum.write import MAX_JOINED, conversations


def _records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_hold_checkable_chats(tmp_path):
    train, val, held_out = write_curriculum(tmp_path / "new", train=300, held_out=10, seed=0)
    for path in (train, val, held_out):
        for record in _records(path):
            assert set(record) == {"messages", "task", "language", "checker"}
            assert [m["role"] for m in record["messages"][-2:]] == ["user", "assistant"]
            assert check(record["checker"], record["messages"][-1]["content"])
    assert {record["task"] for record in _records(held_out)} == set(TASKS)
    assert sorted(path.name for path in train.parent.iterdir()) == [
        *("held_out.jsonl", "train.jsonl", "val.jsonl")
    ]


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first = write_curriculum(tmp_path / "a", train=100, held_out=5, seed=4)
    second = write_curriculum(tmp_path / "b", train=100, held_out=5, seed=4)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    train, *_ = write_curriculum(tmp_path, train=50, held_out=2, seed=0)
    before = train.read_bytes()

    def full(_fd):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_curriculum(tmp_path, train=50, held_out=2, seed=1)
    assert train.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_nonsense_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train=0"):
        write_curriculum(tmp_path, train=0, held_out=5, seed=0)


def test_training_asks_several_items_in_one_chat_and_loses_none():
    items = mixture(400, seed=0)
    chats = list(conversations(items, seed=0))
    assert [m for chat in chats for m in chat.messages] == [m for i in items for m in i.messages]
    expected = 400 * 2 / (1 + MAX_JOINED)
    assert expected * 0.85 < len(chats) < expected * 1.15
    assert all(check(chat.checker, chat.reply) for chat in chats)


def test_held_out_items_stand_alone(tmp_path):
    *_, held_out = write_curriculum(tmp_path, train=50, held_out=5, seed=0)
    turns = {len(r["messages"]) for r in _records(held_out) if r["task"] != "follow_up"}
    assert turns == {2}
