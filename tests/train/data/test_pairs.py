import numpy as np
import pytest

from astrai_train.data.pairs import DPODataset
from astrai_train.data.prepare import prepare
from astrai_train.data.storage import open_storage

PAIRS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "It is five, or so I think."},
    {"prompt": "你好", "chosen": "你好！有什么可以帮你？", "rejected": "no"},
    {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "One?"},
        ],
        "chosen": "One.",
        "rejected": "Two.",
    },
]


@pytest.fixture
def pairs(folder, write_lines, tokenizer):
    write_lines(folder / "pairs.jsonl", PAIRS)
    return open_storage(folder / "pairs.jsonl", stage="dpo", tokenizer=tokenizer)


def test_a_side_is_its_prompt_and_the_taught_answer_with_its_end(pairs, tokenizer):
    ids, trained = pairs.input_ids[0], pairs.trained[0]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}])
    assert ids[~trained].tolist() == prompt
    assert tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False) == "4<|im_end|>"
    assert pairs.trained[4].sum() == len(tokenizer.encode("One.")) + 1  # not the quoted "Hello."
    assert [pairs.place(side)[-6:] for side in range(4)] == ["line 1"] * 2 + ["line 2"] * 2
    assert pairs.content == "3 pairs"


def test_h5_holds_what_records_give(pairs, folder, tokenizer):
    out = folder / "pairs.h5"
    prepare([folder / "pairs.jsonl"], out, stage="dpo", tokenizer=folder / "tok", workers=1)
    stored = open_storage(out, stage="dpo", tokenizer=tokenizer)
    assert stored.lines.tolist() == pairs.lines.tolist()
    for name in ("input_ids", "trained"):
        for side in range(6):
            assert stored.columns[name][side].tolist() == pairs.columns[name][side].tolist()
    with pytest.raises(ValueError, match="was prepared for stage dpo, not sft"):
        open_storage(out, stage="sft", tokenizer=tokenizer)


def test_a_batch_packs_both_sides_into_rows_as_long_as_the_longest(pairs):
    dataset = DPODataset(pairs, 64, padding_id=0)
    dataset.reference = np.arange(6, dtype=np.float32).reshape(3, 2)
    batch = dataset.collate([dataset[2], dataset[0], None])
    lengths = pairs.input_ids.lengths
    assert batch["input_ids"].shape[1] == max(lengths[[0, 1, 4, 5]])
    assert batch["pairs"].tolist() == [2, 0]
    assert batch["reference"].tolist() == [[4, 5], [0, 1]]
    for document, side in enumerate([4, 5, 0, 1]):
        here = batch["document_ids"] == document
        assert batch["input_ids"][here].tolist() == pairs.input_ids[side].tolist()
        assert batch["position_ids"][here].tolist() == list(range(lengths[side]))
        labels = batch["labels"][here]
        assert labels[labels >= 0].tolist() == (pairs.input_ids[side][pairs.trained[side]].tolist())


def test_a_batch_without_pairs_is_one_row_of_padding(pairs):
    batch = DPODataset(pairs, 64, padding_id=0).collate([None, None])
    assert len(batch["pairs"]) == 0
    assert batch["input_ids"].shape[0] == 1
    assert (batch["document_ids"] == -1).all()
    assert (batch["labels"] == -100).all()


def test_pairs_with_a_side_too_long_are_refused_or_dropped(pairs):
    window = int(pairs.input_ids.lengths[:2].max())
    long = int(pairs.input_ids.lengths.max())
    assert window < long
    with pytest.raises(ValueError, match=rf"pairs\.jsonl line 2 has {long} tokens"):
        DPODataset(pairs, window, padding_id=0)
    dropped = DPODataset(pairs, window, padding_id=0, too_long="drop")
    assert dropped.pairs.tolist() == [0, 2][: len(dropped)]
    assert len(dropped) < 3


def test_answers_that_are_one_to_the_tokenizer_are_refused(folder, write_lines, tokenizer):
    same = [{"role": "assistant", "content": "4", "name": "a"}]
    write_lines(folder / "same.jsonl", [PAIRS[0], {"prompt": "a", "chosen": "4", "rejected": same}])
    with pytest.raises(ValueError, match=r"same\.jsonl line 2: .*are the same tokens"):
        open_storage(folder / "same.jsonl", stage="dpo", tokenizer=tokenizer)
