import json
from functools import partial

import pytest

from astrai_train.data import prepare as preparing
from astrai_train.data.left_out import left_out_file
from astrai_train.data.prepare import prepare
from astrai_train.data.record import Stage
from astrai_train.data.storage import H5Storage, open_storage


def run(folder, out="out.h5", inputs=("chats.jsonl",), stage: Stage = "sft", workers=1):
    paths = [folder / name for name in inputs]
    return prepare(paths, folder / out, stage=stage, tokenizer=folder / "tok", workers=workers)


def tokens(path):
    storage = H5Storage(path)
    return [storage.input_ids[n].tolist() for n in range(len(storage))]


def test_a_prepared_file_holds_what_the_records_hold(folder, tokenizer):
    assert run(folder, inputs=["chats.jsonl", "chats.jsonl"])
    read = H5Storage(folder / "out.h5")
    records = open_storage([folder / "chats.jsonl"] * 2, stage="sft", tokenizer=tokenizer)
    for n in range(6):
        assert read.input_ids[n].tolist() == records.input_ids[n].tolist()
        assert read.trained[n].tolist() == records.trained[n].tolist()
    assert read.place(4) == records.place(4) == f"{folder / 'chats.jsonl'} line 2"
    assert not list(folder.glob(".out*"))


def test_processes_and_parts_change_nothing(folder, monkeypatch):
    run(folder)
    monkeypatch.setattr(preparing, "_PART_RECORDS", 2)
    run(folder, "parts.h5")
    run(folder, "processes.h5", workers=2)
    assert (
        tokens(folder / "out.h5") == tokens(folder / "parts.h5") == tokens(folder / "processes.h5")
    )
    assert H5Storage(folder / "parts.h5").sources == H5Storage(folder / "out.h5").sources


def test_what_is_up_to_date_is_not_made_again(folder, texts, write_lines):
    assert run(folder)
    assert not run(folder)
    write_lines(folder / "chats.jsonl", [{"prompt": "a", "completion": "b"}])
    assert run(folder)
    assert len(tokens(folder / "out.h5")) == 1


def test_a_damaged_result_is_made_again(folder):
    run(folder)
    whole = (folder / "out.h5").read_bytes()
    (folder / "out.h5").write_bytes(whole[:1000])
    assert run(folder)
    assert (folder / "out.h5").read_bytes() == whole


def test_an_interrupted_run_goes_on_where_it_was(folder, monkeypatch):
    monkeypatch.setattr(preparing, "_PART_RECORDS", 1)
    make, made = preparing._make_part, []

    def interrupted(*part):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part)
        return make(*part)

    monkeypatch.setattr(preparing, "_make_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert not (folder / "out.h5").exists()
    again = []
    monkeypatch.setattr(preparing, "_make_part", lambda *a: again.append(a) or make(*a))
    run(folder)
    assert len(again) == 1
    assert len(tokens(folder / "out.h5")) == 3
    assert not list(folder.glob(".out*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_leaves_nothing_behind(folder, write_lines, workers):
    write_lines(folder / "bad.jsonl", [{"text": "a"}, {"text": " "}])
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2: the text is empty"):
        run(folder, inputs=["bad.jsonl"], stage="seq", workers=workers)
    assert not list(folder.glob("*.h5"))
    assert not list(folder.glob(".out*"))


def test_inputs_without_records_and_odd_names_are_refused(folder):
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no record"):
        run(folder, inputs=["empty.jsonl"])
    with pytest.raises(ValueError, match=r"out\.txt must end in \.h5"):
        run(folder, "out.txt")


def left_out(folder):
    file = left_out_file(folder / "out.h5")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def messy(folder):
    """Seven lines: two good chats, the first one again, and four that cannot be used."""
    good = ['{"prompt": "a", "completion": "b"}', '{"prompt": "你", "completion": "好"}']
    bad = ["oops", "[1]", '{"prompt": "a"}', '{"messages": []}']
    (folder / "chats.jsonl").write_text("\n".join([good[0], *bad[:2], good[0], *bad[2:], good[1]]))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("records", [1, 2, 8192])
def test_what_cannot_be_used_can_be_left_out_and_is_told(messy, monkeypatch, workers, records):
    monkeypatch.setattr(preparing, "_PART_RECORDS", records)
    paths = [messy / "chats.jsonl"]
    make = partial(prepare, paths, messy / "out.h5", stage="sft", tokenizer=messy / "tok")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        make(workers=workers)
    assert make(unusable="skip", workers=workers)
    assert H5Storage(messy / "out.h5").lines.tolist() == [1, 4, 7]
    told = {one["place"].rpartition(" ")[2]: one["reason"] for one in left_out(messy)}
    assert sorted(told) == ["2", "3", "5", "6"]
    assert "is not JSON" in told["2"]
    assert "completion" in told["5"]
    assert not make(unusable="skip", workers=workers)
    assert make(unusable="skip", duplicates="exact", workers=workers)
    assert H5Storage(messy / "out.h5").lines.tolist() == [1, 7]
    assert {"place": f"{paths[0]} line 4", "reason": "repeats an earlier record"} in left_out(messy)
    assert not list(messy.glob(".out*"))


def test_near_duplicates_are_left_out_over_files_and_parts(folder, monkeypatch):
    monkeypatch.setattr(preparing, "_PART_RECORDS", 1)
    text = " ".join(f"word{number}" for number in range(200))
    texts = [text, text.replace("word100", "other"), text[::-1]]
    for name, some in (("a", texts[:1]), ("b", texts[1:])):
        lines = [json.dumps({"text": one}) for one in some]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    kept = {}
    for duplicates in ("keep", "exact", "near"):
        prepare(
            paths,
            folder / "out.h5",
            stage="seq",
            tokenizer=folder / "tok",
            duplicates=duplicates,
            workers=1,
        )
        kept[duplicates] = len(H5Storage(folder / "out.h5"))
    assert kept == {"keep": 3, "exact": 3, "near": 2}
    assert [one["place"] for one in left_out(folder)] == [f"{paths[1]} line 1"]


def test_nothing_left_is_an_error(folder):
    (folder / "chats.jsonl").write_text("oops\n{}\n")
    with pytest.raises(ValueError, match=r"all 2 records were left out; see .*left_out.jsonl"):
        prepare(
            [folder / "chats.jsonl"],
            folder / "out.h5",
            stage="sft",
            tokenizer=folder / "tok",
            unusable="skip",
            workers=1,
        )
    assert len(left_out(folder)) == 2
