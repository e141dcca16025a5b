import contextlib
import os

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.ragged import Ragged
from astrai_train.data.record import Stage
from astrai_train.data.storage import H5Storage, Header, Storage, open_storage, write_h5

HEADER = Header(stage="sft", tokenizer="a" * 64, template="b" * 64)
SAMPLES = st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=9), max_size=8)


def stored(ids, trained=None):
    columns = {
        "input_ids": Ragged.of(ids, np.uint32),
        "trained": Ragged.of(trained or [[1] * len(one) for one in ids], np.bool_),
    }
    lines = np.arange(1, len(ids) + 1)
    return Storage("sft", columns, [("a.jsonl", len(ids))] if ids else [], lines)


@given(SAMPLES, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read(tmp_path, ids, data):
    trained = [data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in ids]
    path = tmp_path / "new" / "a.h5"
    write_h5(path, HEADER, stored(ids, trained), "inputs")
    read = H5Storage(path)
    assert [read.input_ids[n].tolist() for n in range(len(read))] == ids
    assert [read.trained[n].tolist() for n in range(len(read))] == trained
    assert read.header == HEADER
    assert read.inputs == "inputs"
    assert read.num_trained_tokens == sum(map(sum, trained))
    assert [read.place(n) for n in range(len(ids))] == [
        f"a.jsonl line {n}" for n in range(1, len(ids) + 1)
    ]
    assert [one.name for one in path.parent.iterdir()] == ["a.h5"]


def test_values_are_a_view_of_the_file(tmp_path):
    write_h5(tmp_path / "a.h5", HEADER, stored([[1, 2], [3]]))
    (segment,) = H5Storage(tmp_path / "a.h5").input_ids.segments
    assert isinstance(segment, np.memmap)


def test_a_repacked_file_is_read_too(tmp_path):
    write_h5(tmp_path / "a.h5", HEADER, stored([[1, 2], [3]]))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        values = H5Storage(tmp_path / "a.h5").input_ids.flat(0, 3).copy()
        del file["input_ids/values"]
        file.create_dataset("input_ids/values", data=values, compression="gzip")
    assert H5Storage(tmp_path / "a.h5").input_ids[0].tolist() == [1, 2]


def test_every_cut_and_every_flipped_byte_of_a_column_is_noticed(tmp_path):
    path = tmp_path / "a.h5"
    write_h5(path, HEADER, stored([[1, 2, 3], [4, 5]]))
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.h5 is damaged.*prepare the records again"):
            H5Storage(path)
    path.write_bytes(whole)
    with h5py.File(path) as file:
        start = file["input_ids/values"].id.get_offset()
    for place in range(start, start + 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            H5Storage(path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, data):
    path = tmp_path / "a.h5"
    write_h5(path, HEADER, stored([[1, 2, 3], [4, 5]]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    read = None
    with contextlib.suppress(ValueError):  # and nothing else
        read = H5Storage(path)
    if read is not None:
        assert [read.input_ids[n].tolist() for n in range(2)] == [[1, 2, 3], [4, 5]]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_h5(tmp_path / "a.h5", HEADER, stored([[1]]))
    before = (tmp_path / "a.h5").read_bytes()

    def full(_fd):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_h5(tmp_path / "a.h5", HEADER, stored([[2]]))
    assert (tmp_path / "a.h5").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.h5"]


def test_another_format_version_is_named(tmp_path):
    write_h5(tmp_path / "a.h5", HEADER, stored([[1]]))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ValueError, match="format version 99, this program reads 1"):
        H5Storage(tmp_path / "a.h5")


def test_records_and_their_h5_are_the_same_samples(folder, tokenizer):
    names: list[tuple[str, Stage]] = [("texts", "seq"), ("chats", "sft")]
    for name, stage in names:
        records = open_storage(folder / f"{name}.jsonl", stage=stage, tokenizer=tokenizer)
        write_h5(folder / f"{name}.h5", Header.of(stage, tokenizer), records)
        read = open_storage(folder / f"{name}.h5", stage=stage, tokenizer=tokenizer)
        assert read.columns.keys() == records.columns.keys()
        for key, column in records.columns.items():
            assert np.array_equal(read.columns[key].offsets, column.offsets)
            assert np.array_equal(
                read.columns[key].flat(0, column.total), column.flat(0, column.total)
            )
        assert read.place(1) == records.place(1) == f"{folder / name}.jsonl line 2"


def test_several_files_are_one_sequence(folder, tokenizer, texts):
    path = folder / "texts.jsonl"
    one = open_storage(path, stage="seq", tokenizer=tokenizer)
    write_h5(folder / "texts.h5", Header.of("seq", tokenizer), one)
    two = open_storage([folder / "texts.h5", path], stage="seq", tokenizer=tokenizer)
    assert len(two) == 2 * len(texts)
    assert two.num_tokens == 2 * one.num_tokens
    assert two.place(len(texts)) == f"{path} line 1"


def test_what_changed_since_preparing_is_named(folder, tokenizer, texts):
    records = open_storage(folder / "chats.jsonl", stage="sft", tokenizer=tokenizer)
    path = folder / "chats.h5"
    write_h5(path, Header.of("sft", tokenizer), records)
    template = tokenizer.chat_template.source + "{# changed #}"
    same_ids = AutoTokenizer.train(texts * 3, 300, chat_template=template)
    other_ids = AutoTokenizer.train(texts * 3, 290)
    both = AutoTokenizer.train(texts * 3, 290, chat_template=template)

    def message(tokenizer):
        with pytest.raises(ValueError, match=r"chats\.h5 was prepared with") as caught:
            open_storage(path, stage="sft", tokenizer=tokenizer)
        return str(caught.value)

    assert "another chat template" in message(same_ids)
    assert "another tokenizer" not in message(same_ids)
    assert "another tokenizer" in message(other_ids)
    assert "chat template" not in message(other_ids)
    assert "another tokenizer" in message(both)
    assert "and another chat template" in message(both)
    with pytest.raises(ValueError, match="prepared for stage sft, not seq"):
        open_storage(path, stage="seq", tokenizer=tokenizer)


def test_a_template_does_not_matter_to_documents(folder, tokenizer, texts):
    records = open_storage(folder / "texts.jsonl", stage="seq", tokenizer=tokenizer)
    write_h5(folder / "texts.h5", Header.of("seq", tokenizer), records)
    template = tokenizer.chat_template.source + "{# changed #}"
    other = AutoTokenizer.train(texts * 3, 300, chat_template=template)
    assert len(open_storage(folder / "texts.h5", stage="seq", tokenizer=other)) == len(texts)


def test_nothing_to_train_on_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no sample"):
        open_storage(tmp_path / "a.jsonl", stage="seq", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"a\.h5 does not exist"):
        open_storage(tmp_path / "a.h5", stage="seq", tokenizer=tokenizer)
