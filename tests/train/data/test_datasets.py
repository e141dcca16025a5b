import logging

import numpy as np
import pytest
import torch

from astrai_train.data.datasets import SEQDataset, SFTDataset
from astrai_train.data.packing import IGNORED, PADDING
from astrai_train.data.storage import open_storage


def test_rows_decode_to_the_documents(folder, tokenizer, texts):
    storage = open_storage(folder / "texts.jsonl", stage="seq", tokenizer=tokenizer)
    rows = SEQDataset(storage, 16, 0)
    assert all(
        row[key].dtype == torch.int64 for row in (rows[0], rows[len(rows) - 1]) for key in row
    )
    ids = torch.cat(
        [rows[n]["input_ids"][rows[n]["document_ids"] != PADDING] for n in range(len(rows))]
    )
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == "".join(one + "<|endoftext|>" for one in texts)
    labels = sum(int((rows[n]["labels"] != IGNORED).sum()) for n in range(len(rows)))
    assert labels == storage.num_trained_tokens == storage.num_tokens - len(texts)


def test_chats_are_packed_whole(folder, tokenizer, chats):
    storage = open_storage([folder / "chats.jsonl"] * 3, stage="sft", tokenizer=tokenizer)
    rows = SFTDataset(storage, 120, 0)
    samples = [sample for n in range(len(rows)) for sample in rows.samples(n)]
    assert len(rows) < len(samples)
    assert sorted(samples) == list(range(3 * len(chats)))
    labels = sum(int((rows[n]["labels"] != IGNORED).sum()) for n in range(len(rows)))
    assert labels == storage.num_trained_tokens


def test_a_chat_longer_than_the_window_names_its_line(folder, tokenizer, caplog):
    storage = open_storage(folder / "chats.jsonl", stage="sft", tokenizer=tokenizer)
    longest = int(storage.input_ids.lengths.max())
    window = longest - 1
    with pytest.raises(ValueError, match=rf"line 2 has {longest} tokens, .*window_size {window} "):
        SFTDataset(storage, window, 0)
    with caplog.at_level(logging.WARNING):
        rows = SFTDataset(storage, window, 0, too_long="drop")
    assert rows.num_dropped == 1
    assert [sample for n in range(len(rows)) for sample in rows.samples(n)] == [0, 2]
    assert "1 of 3 samples" in caplog.text
    with pytest.raises(ValueError, match="every sample is longer"):
        SFTDataset(storage, 2, 0, too_long="drop")


def test_no_row_is_a_row_of_padding(folder, tokenizer):
    rows = SEQDataset(open_storage(folder / "texts.jsonl", stage="seq", tokenizer=tokenizer), 4, 9)
    assert rows[None]["input_ids"].tolist() == [9] * 4
    assert rows[None]["labels"].tolist() == [IGNORED] * 4
    with pytest.raises(IndexError):
        rows[-1]
    with pytest.raises(ValueError, match="window_size must be at least 2, not 1"):
        SEQDataset(rows.storage, 1, 0)
    assert np.array_equal(rows[0]["input_ids"], rows.row(0)["input_ids"])
