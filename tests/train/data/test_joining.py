"""Parts become one file, as if all had been written at once, and in little memory."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from astrai_train.data.joining import join_h5
from astrai_train.data.left_out import LeftOutFile
from astrai_train.data.ragged import Ragged
from astrai_train.data.records import LeftOut, read_records
from astrai_train.data.storage import H5Storage, Header, Storage, write_h5

RECORDS = {
    "seq": [{"text": "one"}, {"text": "two 你好"}, {"text": "three"}],
    "dpo": [{"prompt": f"{n}?", "chosen": "yes" * n, "rejected": "no"} for n in range(1, 4)],
    "grpo": [
        {"prompt": "1?", "responses": ["a", "b"], "rewards": [0, 1]},
        {"prompt": "2?", "responses": ["a", "bc", "d"], "rewards": [0, 1, 2]},
        {"prompt": "3?", "responses": ["e", "f"], "rewards": [0, 1], "more": "好"},
    ],
}


@pytest.mark.parametrize("stage", RECORDS)
def test_parts_are_joined_to_the_file_that_all_records_make(tmp_path, tokenizer, stage):
    files = []
    for number, record in enumerate(RECORDS[stage]):
        # the second part goes on with the file of the first
        file = tmp_path / f"{max(number, 1)}.jsonl"
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        files.append(file)
    records = [one for file in dict.fromkeys(files) for one in read_records(file)]
    header = Header.of(stage, tokenizer)
    write_h5(tmp_path / "whole.h5", header, Storage.of_records(records, stage, tokenizer), "x")
    paths = []
    for record in records:
        paths.append(tmp_path / f"part-{len(paths)}.h5")
        write_h5(paths[-1], header, Storage.of_records([record], stage, tokenizer), "x")
    join_h5(paths, tmp_path / "joined.h5", header, "x")
    whole, joined = H5Storage(tmp_path / "whole.h5"), H5Storage(tmp_path / "joined.h5")
    assert joined.fingerprint == whole.fingerprint
    assert joined.sources == whole.sources
    assert joined.lines.tolist() == whole.lines.tolist()
    assert joined.num_trained_tokens == whole.num_trained_tokens > 0
    with h5py.File(tmp_path / "whole.h5") as one, h5py.File(tmp_path / "joined.h5") as other:
        assert dict(one.attrs) == dict(other.attrs)
        for name in whole.columns:
            assert dict(one[name].attrs) == dict(other[name].attrs)
            assert whole.columns[name].segments[0].dtype == joined.columns[name].segments[0].dtype


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer):
    """Joining 160 MB of tokens, opening and checking them takes no more than a tenth of that."""
    header = Header.of("seq", tokenizer)
    values = np.arange(1 << 23, dtype=np.uint16)
    offsets = np.arange(0, len(values) + 1, 1 << 10)
    ids = Ragged([values], offsets)
    lines = np.arange(len(ids))
    part = Storage("seq", {"input_ids": ids}, [("a.jsonl", len(ids))], lines)
    write_h5(tmp_path / "part.h5", header, part, "x")
    code = f"""
import resource
from pathlib import Path
from astrai_train.data.joining import join_h5
from astrai_train.data.storage import H5Storage
folder = Path({str(tmp_path)!r})
header = H5Storage(folder / "part.h5").header
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
join_h5([folder / "part.h5"], folder / "one.h5", header, "x")
before = peak()
join_h5([folder / "part.h5"] * 10, folder / "ten.h5", header, "x")
assert H5Storage(folder / "ten.h5").num_tokens == 10 * {len(values)}
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16_000  # in units of 1,024 bytes


def test_the_list_of_what_is_left_out_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "list.jsonl"
    one = LeftOut(place="a.jsonl line 1", reason="你")
    with LeftOutFile(file) as some:
        some.extend([one, one])
    assert file.read_text(encoding="utf-8").count('"reason": "你"') == 2
    with pytest.raises(ZeroDivisionError), LeftOutFile(file) as other:
        other.extend(LeftOut(place=str(1 // n), reason="") for n in (1, 0))
    assert len(file.read_text().splitlines()) == 2
    with LeftOutFile(file):
        pass
    assert not list(tmp_path.iterdir())
