import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from astrai_train.data import records as records_file
from astrai_train.data.records import LeftOut, find_files, guess_stage, read_records


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_keep_their_line_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "一"}\n\n{"text": "b", "more": 1}\n')
    records = list(read_records(path))
    assert [(one.line, one.text()) for one in records] == [(1, "一"), (3, "b")]
    assert sum(one.size for one in records) + 1 == path.stat().st_size


def test_a_json_array_numbers_its_items(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a"}, {"text": ""}]')
    first, second = read_records(path)
    assert first.text() == "a"
    with pytest.raises(ValueError, match=r"a\.json item 2: the text is empty"):
        second.text()


def test_a_text_file_is_one_document_or_more(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n")
    records = list(read_records(path))
    assert [(one.line, one.text()) for one in records] == [(1, "one\r\n\ntwo"), (5, "three")]


def test_prompt_and_completion_are_a_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "1+1?", "completion": "2"}')
    (record,) = read_records(path)
    assert record.messages() == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    assert guess_stage(path) == "sft"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": oops}\n', "line 2 is not JSON: .* column 10"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 must be an object"),
        ("a.jsonl", b'{"text": "a"}\n\xc4\xe3\n', "line 2 is not UTF-8: byte 1 is 0xc4; .*iconv"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        ("a.json", '{"text": "a"}', "must hold a list"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "must hold a list.*named .jsonl"),
        ("a.parquet", "PAR1", "a.parquet is damaged or no Parquet"),
        ("a.h5", "", "already prepared"),
        ("a.csv", "", "cannot tell what it is"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_records(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "  "}', "line 1: the text is empty"),
        (
            '{"messages": []}',
            "line 1: stage seq wants .* found messages; this looks like stage sft",
        ),
        ('{"txt": "a"}', "line 1: stage seq wants .*, found txt$"),
    ],
)
def test_a_record_without_text_is_refused(tmp_path, line, message):
    (record,) = read_records(write(tmp_path / "a.jsonl", line))
    with pytest.raises(ValueError, match=message):
        record.text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "stage sft wants .*found text; this looks like stage seq"),
        ('{"messages": "hi"}', "messages must be a list"),
        ('{"messages": [{"content": "hi"}]}', "message 1 must be an object with a role"),
        ('{"prompt": "", "completion": "b"}', "the prompt is empty"),
        ('{"prompt": 3, "completion": "b"}', "prompt must be text or a list"),
    ],
)
def test_a_record_without_messages_is_refused(tmp_path, line, message):
    (record,) = read_records(write(tmp_path / "a.jsonl", line))
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        record.messages()


def test_folders_give_their_files_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    b, a = (write(tmp_path / "in" / name, "x") for name in ("b.txt", "a.jsonl"))
    write(tmp_path / "in" / "c.csv", "x")
    assert find_files([b, tmp_path / "in"]) == [b, a, b]
    with pytest.raises(ValueError, match="does not exist"):
        find_files([tmp_path / "nope.txt"])


def test_parquet_rows_are_records(tmp_path):
    rows = [{"text": "你好"}, {"text": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [record.content for record in records] == rows
    assert records[1].place == f"{tmp_path / 'a.parquet'} row 2"


def test_a_long_document_is_cut_at_line_ends_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(records_file, "LONGEST_DOCUMENT", 20)
    lines = ["12345\n", "678\n", "a very long line\n", "<|endoftext|>\n", "x\n"]
    (tmp_path / "a.txt").write_text("".join(lines))
    records = list(read_records(tmp_path / "a.txt"))
    assert [record.content["text"] for record in records] == [
        "12345\n678",
        "a very long line",
        "x",
    ]
    assert [record.line for record in records] == [1, 3, 5]
    assert [record.goes_on for record in records] == [True, False, False]
    assert "which were cut in 1 places" in caplog.text


def test_lines_that_are_no_record_can_be_left_out_and_are_told(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": oops}\n[1]\n\xc4\xe3\n{"text": "b"}\n')
    unusable: list[LeftOut] = []
    assert [record.line for record in read_records(file, unusable)] == [1, 5]
    assert [one.place for one in unusable] == [f"{file} line {n}" for n in (2, 3, 4)]
    assert "is not JSON" in unusable[0].reason
    assert "is not UTF-8" in unusable[2].reason


@given(
    st.lists(st.text("aé你🙂 \n", max_size=40), min_size=1, max_size=4),
    st.integers(16, 50),  # the mark is no longer than that
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_long_documents_are_cut_between_characters_and_nothing_is_lost(tmp_path, texts, longest):
    """A line may be longer than memory too: no more than a piece of it is read at once."""
    documents = [text.strip("\n ") for text in texts]
    documents = [text for text in documents if text] or ["a"]
    path = write(tmp_path / "a.txt", f"\n{records_file.DOCUMENT_END}\n".join(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            records_file, "LONGEST_DOCUMENT", max(longest, len(records_file.DOCUMENT_END) + 1)
        )
        found = list(read_records(path))
        longest = records_file.LONGEST_DOCUMENT
    joined = [""]
    for record in found:
        assert len(record.text().encode()) <= longest
        joined[-1] += record.text()
        if not record.goes_on:
            joined.append("")
    assert joined.pop() == ""
    # line ends at a cut are no part of either document
    assert [text.replace("\n", "") for text in joined] == [
        text.replace("\n", "") for text in documents
    ]


def test_a_character_that_the_end_of_a_file_cuts_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("你好".encode()[:-1])
    with pytest.raises(ValueError, match="line 1 is not UTF-8: byte 4"):
        list(read_records(tmp_path / "a.txt"))
