import pytest

from astrai_train.data import prepare as preparing
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
