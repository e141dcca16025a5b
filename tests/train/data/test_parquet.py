import pyarrow
import pytest
from pyarrow import parquet

from astrai_train.data.parquet import parquet_rows


def test_rows_come_as_they_were_written_and_without_nulls(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "你好"}, {"role": "tool", "name": "sum"}]},
        {"messages": [{"role": "assistant", "content": "3"}], "source": "a"},
    ]
    schema = pyarrow.Table.from_pylist(rows[::-1]).schema  # inferred from the first row
    schema = pyarrow.unify_schemas([pyarrow.Table.from_pylist(rows).schema, schema])
    table = pyarrow.Table.from_pylist([*rows, *([{"source": "b"}] * 1000)], schema=schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    read = list(parquet_rows(tmp_path / "a.parquet"))
    assert [row for row, _ in read[:3]] == [*rows, {"source": "b"}]
    assert len(read) == 1002
    assert read[0][1] == (tmp_path / "a.parquet").stat().st_size // 1002


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and not much else PAR1")
    with pytest.raises(ValueError, match=r"a.parquet is damaged or no Parquet file"):
        list(parquet_rows(file))
