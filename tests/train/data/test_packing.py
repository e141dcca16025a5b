"""Rows against the documents they were made of, read back token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai_train.data.packing import (
    IGNORED,
    PADDING,
    empty_row,
    num_stream_rows,
    pack_samples,
    samples_row,
    stream_row,
)
from astrai_train.data.ragged import Ragged

PAD = 7
DOCUMENTS = st.lists(
    st.lists(st.integers(10, 99), min_size=1, max_size=30), min_size=1, max_size=12
)
WINDOWS = st.integers(2, 16)


def fragments(row):
    """The pieces of a row: (tokens, labels, positions) of each document in it."""
    ids = row["document_ids"]
    used = ids != PADDING
    assert not np.any(used[1:] & ~used[:-1]), "padding comes last"
    assert np.all(row["input_ids"][~used] == PAD)
    assert np.all(row["labels"][~used] == IGNORED)
    assert sorted(set(ids[used].tolist())) == list(range(ids.max() + 1))
    for document in range(ids.max() + 1):
        here = ids == document
        yield tuple(row[key][here].tolist() for key in ("input_ids", "labels", "position_ids"))


def test_a_stream_by_hand():
    row, last = (
        stream_row(Ragged.of([[1, 2, 3], [4, 5], [6]], np.uint16), n, 4, PAD) for n in (0, 1)
    )
    assert row["input_ids"].tolist() == [1, 2, 3, 4]
    assert row["labels"].tolist() == [2, 3, IGNORED, 5]
    assert row["position_ids"].tolist() == [0, 1, 2, 0]
    assert row["document_ids"].tolist() == [0, 0, 0, 1]
    assert last["input_ids"].tolist() == [5, 6, PAD, PAD]
    assert last["labels"].tolist() == [IGNORED] * 4
    assert last["document_ids"].tolist() == [0, 1, PADDING, PADDING]


@given(DOCUMENTS, WINDOWS)
def test_a_stream_holds_each_token_once_and_labels_stay_inside(documents, window):
    stream = Ragged.of(documents, np.uint16)
    rows = [stream_row(stream, n, window, PAD) for n in range(num_stream_rows(stream, window))]
    pieces = [piece for row in rows for piece in fragments(row)]
    flat = [token for tokens, _, _ in pieces for token in tokens]
    assert flat == [token for document in documents for token in document]
    labels = [label for _, labels, _ in pieces for label in labels]
    wanted = [label for document in documents for label in [*document[1:], IGNORED]]
    assert labels == wanted
    assert all(positions == list(range(len(positions))) for _, _, positions in pieces)
    assert all(
        values.dtype == np.int64 and values.shape == (window,) for values in rows[0].values()
    )


@st.composite
def samples(draw):
    window = draw(st.integers(2, 24))
    lengths = draw(st.lists(st.integers(1, window), min_size=1, max_size=20))
    ids = [[100 * n + t for t in range(length)] for n, length in enumerate(lengths, 1)]
    trained = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    return window, ids, trained


@given(samples())
def test_packed_samples_are_whole_and_only_taught_tokens_are_labels(case):
    window, ids, trained = case
    packs = pack_samples([len(one) for one in ids], window)
    columns = Ragged.of(ids, np.uint32), Ragged.of(trained, np.bool_)
    seen = {}
    for n in range(len(packs)):
        row = samples_row(*columns, packs[n].tolist(), window, PAD)
        seen.update(zip(packs[n].tolist(), fragments(row), strict=True))
    assert sorted(seen) == list(range(len(ids)))
    for sample, (tokens, labels, positions) in seen.items():
        assert tokens == ids[sample]
        assert positions == list(range(len(tokens)))
        taught = zip(tokens[1:], trained[sample][1:], strict=True)
        assert labels == [t if on else IGNORED for t, on in taught] + [IGNORED]


@given(st.lists(st.integers(1, 32), max_size=60))
def test_packing_is_the_best_fit_that_a_plain_search_finds(lengths):
    rows, rooms = [], []
    for sample, length in enumerate(lengths):
        fitting = [(room, made, n) for n, (room, made) in enumerate(rooms) if room >= length]
        if fitting:
            room, _, n = min(fitting)
            rows[n].append(sample)
            rooms[n] = (room - length, sample)
        else:
            rows.append([sample])
            rooms.append((32 - length, sample))
    packs = pack_samples(lengths, 32)
    assert [packs[n].tolist() for n in range(len(packs))] == rows


def test_packing_refuses_what_no_row_holds():
    with pytest.raises(ValueError, match="sample 1 of 9 tokens in a window of 8"):
        pack_samples([8, 9], 8)


def test_an_empty_row_trains_nothing():
    row = empty_row(3, PAD)
    assert list(fragments(row)) == []
    assert row["input_ids"].tolist() == [PAD] * 3
