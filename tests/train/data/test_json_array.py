import json
import tracemalloc

import pytest

from astrai_train.data import json_array
from astrai_train.data.json_array import json_items


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
def test_items_come_whole_wherever_the_file_is_cut(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_array, "_PIECE", piece)
    items = [{"text": 'a, ]"\\ 你好 😀'}, [1, [2]], "x", {"n": {"m": None}}, -1.5e3, True, {}]
    for indent in (None, 2):
        file = tmp_path / "a.json"
        file.write_text("\ufeff \n" + json.dumps(items, indent=indent, ensure_ascii=False) + "\n ")
        assert [item for item, _ in json_items(file)] == items
    (tmp_path / "a.json").write_text("[ ]")
    assert list(json_items(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "must hold a list of records"),
        ("", "must hold a list of records"),
        ("[1, 2", "no comma after item 2"),
        ("[1, 2,", "Expecting value in item 3"),
        ('[{"a": 1}, {"b": }]', "Expecting value in item 2"),
        ('[{"a": 1} {"b": 2}]', "no comma after item 1"),
        ("[1] [2]", "there is more after the list of 1 items"),
        ("[" * 100_000, "item 1 is nested too deeply"),
    ],
)
def test_what_is_no_list_says_where(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(json_items(file))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'["abc", "\xb0\xa1"]')
    with pytest.raises(ValueError, match=r"is not UTF-8 .*0xb0.*iconv"):
        list(json_items(file))


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = tmp_path / "a.json"
    with file.open("w") as output:
        output.write("[")
        output.write(",".join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)))
        output.write("]")
    tracemalloc.start()
    total = sum(size for _, size in json_items(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == pytest.approx(file.stat().st_size, rel=0.01)
    assert peak < file.stat().st_size / 3
