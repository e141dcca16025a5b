import numpy as np
import pytest

from astrai_train.data.prepare import prepare
from astrai_train.data.prompts import GRPODataset
from astrai_train.data.storage import open_storage

QUESTIONS = [
    {"prompt": "2+2?", "answer": "4", "about": {"kind": "sum", "难度": 1}},
    {"prompt": [{"role": "user", "content": "3+3?"}], "answer": "6"},
]
STORED = [
    {"prompt": "2+2?", "responses": ["4", "five", "4!"], "rewards": [1, 0, 0.5]},
    {"prompt": "你好", "responses": ["你好！", "no"], "rewards": [1.0, -1.0]},
]


@pytest.fixture
def open_lines(folder, write_lines, tokenizer):
    def open_(records, name="some.jsonl"):
        write_lines(folder / name, records)
        return open_storage(folder / name, stage="grpo", tokenizer=tokenizer)

    return open_


def test_a_prompt_ends_where_the_answer_begins_and_brings_its_columns(open_lines, tokenizer):
    dataset = GRPODataset(open_lines(QUESTIONS), 64, padding_id=0)
    batch = dataset.collate([dataset[1], None, dataset[0]])
    question = [{"role": "user", "content": "2+2?"}]
    assert batch["prompts"][1] == tokenizer.apply_chat_template(question)
    assert batch["columns"] == QUESTIONS[::-1]
    assert batch["indices"] == [1, 0]
    assert not dataset.is_stored


def test_h5_holds_what_records_give(open_lines, folder, tokenizer):
    for name, records in (("asked", QUESTIONS), ("stored", STORED)):
        lines, out = folder / f"{name}.jsonl", folder / f"{name}.h5"
        plain = open_lines(records, lines.name)
        prepare([lines], out, stage="grpo", tokenizer=folder / "tok", workers=1)
        prepared = open_storage(out, stage="grpo", tokenizer=tokenizer)
        assert prepared.content == plain.content == "2 prompts"
        ours, theirs = (GRPODataset(one, 64, padding_id=0) for one in (prepared, plain))
        for number in range(2):
            one, other = ours[number], theirs[number]
            assert one is not None
            assert other is not None
            assert one.columns == other.columns
            for pair in zip(one.sequences, other.sequences, strict=True):
                np.testing.assert_equal(*pair)


def test_stored_responses_are_packed_with_their_rewards_and_groups(open_lines):
    storage = open_lines(STORED)
    dataset = GRPODataset(storage, 64, padding_id=0)
    batch = dataset.collate([dataset[1], dataset[0]])
    assert batch["rewards"].tolist() == [1.0, -1.0, 1.0, 0.0, 0.5]
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1]
    assert batch["indices"].tolist() == [1, 0]
    for sequence, sample in enumerate([3, 4, 0, 1, 2]):
        here = batch["document_ids"] == sequence
        labels = batch["labels"][here]
        assert batch["input_ids"][here].tolist() == storage.input_ids[sample].tolist()
        assert labels[labels >= 0].tolist() == (
            storage.input_ids[sample][storage.trained[sample]].tolist()
        )


def test_two_single_prompts_in_files_of_one_name_stay_two(folder, write_lines, tokenizer):
    file = write_lines(folder / "one.jsonl", STORED[:1])
    storage = open_storage([file, file], stage="grpo", tokenizer=tokenizer)
    assert len(GRPODataset(storage, 64, padding_id=0)) == 2


def test_prompts_with_and_without_responses_do_not_mix(open_lines):
    with pytest.raises(ValueError, match=r"line 1 has responses, but .* line 2 has none"):
        GRPODataset(open_lines([STORED[0], QUESTIONS[0]]), 64, padding_id=0)


def test_a_prompt_longer_than_the_window_is_refused_by_its_line(open_lines):
    storage = open_lines([*QUESTIONS, {"prompt": "long " * 40}])
    with pytest.raises(ValueError, match=r"some\.jsonl line 3 has \d+ tokens"):
        GRPODataset(storage, 64, padding_id=0)
    assert len(GRPODataset(storage, 64, padding_id=0, too_long="drop")) == 2
