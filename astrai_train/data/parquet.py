"""Parquet files row by row, a small batch of them in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROWS = 256


def parquet_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows, without columns that are null in them, and about how many bytes each takes.

    Raises:
        ValueError: the file is damaged or no Parquet.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, memory_map=True) as file:
            size = path.stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    # a column stands for all rows; a record has only what it was given
                    yield (
                        {name: _given(value) for name, value in row.items() if value is not None},
                        size,
                    )
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or no Parquet file ({reason})") from error


def _given(value: Any) -> Any:
    """Without the nulls that a list of messages has where only some of them have a field."""
    if isinstance(value, dict):
        return {name: _given(child) for name, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_given(child) for child in value]
    return value
