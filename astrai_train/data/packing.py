"""Documents into rows of one window, so that no position is wasted on padding.

T: positions of a row, the window
n: tokens of a row before padding

A row of a stream (stage seq) and a row of whole samples (stage sft) are the same four arrays of
shape (T,):

    input_ids     a a a a b b b .       labels[t] is what position t must predict: already shifted
    labels        a a a - b b - -       - is -100: the end of a document, an untaught token, padding
    position_ids  0 1 2 3 0 1 2 0       restart with each document, and where a row cuts one
    document_ids  0 0 0 0 1 1 1 .       . is -1: padding
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from astrai_train.data.ragged import Array, Ragged

IGNORED = -100
"""Label of a position that is not trained."""
PADDING = -1
"""Document id of a position that holds no token."""

Row = dict[str, NDArray[np.int64]]


def empty_row(window: int, padding_id: int) -> Row:
    """A row of padding alone: it weighs nothing and keeps ranks in step."""
    return {
        "input_ids": np.full(window, padding_id, dtype=np.int64),
        "labels": np.full(window, IGNORED, dtype=np.int64),
        "position_ids": np.zeros(window, dtype=np.int64),
        "document_ids": np.full(window, PADDING, dtype=np.int64),
    }


def num_stream_rows(stream: Ragged, window: int, stride: int | None = None) -> int:
    """How many rows a stream of documents is cut into; the last may be padded."""
    return max(0, -(-(stream.total - window) // (stride or window))) + (stream.total > 0)


def stream_row(
    stream: Ragged, row: int, window: int, padding_id: int, stride: int | None = None
) -> Row:
    """Row `row` of documents laid end to end.

    The label of its last position is the first token of the next row, where the document goes on
    there: each token but the first of a document is a label once, or oftener where rows overlap.

    Args:
        stream: the documents.
        row: its number.
        window: T.
        padding_id: the token in positions that hold none.
        stride: tokens from the start of a row to that of the next; None is the window.
    """
    start = row * (stride or window)
    stop = min(start + window, stream.total)
    tokens = stream.flat(start, min(stop + 1, stream.total))
    places = np.arange(start, start + len(tokens))
    documents = np.searchsorted(stream.offsets, places, side="right") - 1
    return _assemble(tokens, documents, None, stop - start, window, padding_id)


def samples_row(
    input_ids: Ragged, trained: Ragged, samples: Sequence[int], window: int, padding_id: int
) -> Row:
    """One row of whole samples, with the labels of taught tokens."""
    ids = [input_ids[sample] for sample in samples]
    tokens = np.concatenate(ids)
    documents = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    taught = np.concatenate([trained[sample] for sample in samples])
    return _assemble(tokens, documents, taught, len(tokens), window, padding_id)


def batch_rows(documents: Sequence[tuple[Array, Array]], padding_id: int) -> Row:
    """Rows for one batch of whole documents, as long as the longest of them.

    Args:
        documents: token ids and which of them are taught, both (length,).
        padding_id: the token in positions that hold none.

    Returns:
        The four arrays, (rows, T). Here `document_ids` number the documents of the batch, not
        those of a row. Without any document there is one row of padding.
    """
    lengths = [len(ids) for ids, _ in documents]
    window = max([2, *lengths])
    longest_first = sorted(range(len(documents)), key=lambda document: -lengths[document])
    packs = pack_samples([lengths[document] for document in longest_first], window)
    rows: list[Row] = []
    for number in range(len(packs)):
        members = [longest_first[one] for one in packs[number]]
        tokens = np.concatenate([documents[one][0] for one in members])
        taught = np.concatenate([documents[one][1] for one in members])
        place = np.repeat(np.array(members), [lengths[one] for one in members])
        row = _assemble(tokens, place, taught, len(tokens), window, padding_id)
        row["document_ids"][: len(tokens)] = place
        rows.append(row)
    rows = rows or [empty_row(window, padding_id)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _assemble(
    tokens: Array,
    documents: NDArray[np.int64],
    taught: Array | None,
    n: int,
    window: int,
    padding_id: int,
) -> Row:
    """Shift and number the first `n` tokens; there may be one more, to be a label."""
    row = empty_row(window, padding_id)
    tokens = tokens.astype(np.int64)  # -100 does not fit into what files hold
    is_label = documents[1:] == documents[:-1]
    begins = np.flatnonzero(np.concatenate([[True], ~is_label]))[: len(tokens)]
    if taught is not None:
        is_label = is_label & taught[1:]
    row["labels"][: len(is_label)] = np.where(is_label, tokens[1:], IGNORED)
    places = np.arange(n)
    document = np.searchsorted(begins, places, side="right") - 1
    row["input_ids"][:n] = tokens[:n]
    row["position_ids"][:n] = places - begins[document]
    row["document_ids"][:n] = document
    return row


def pack_samples(lengths: Sequence[int], window: int) -> Ragged:
    """Best fit: each sample, in order, goes into the fullest row that still has room for it.

    Among rows with the same room the oldest is taken, so the result depends on the lengths alone.

    Returns:
        For each row the numbers of its samples, ascending.

    Raises:
        ValueError: a sample is longer than the window.
    """
    rows: list[list[int]] = []
    rows_with_room: list[deque[int]] = [deque() for _ in range(window + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r tokens
    for sample, length in enumerate(lengths):
        if length > window:
            raise ValueError(f"sample {sample} of {length} tokens in a window of {window}")
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].popleft()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(sample)
        else:
            room, row = window, len(rows)
            rows.append([sample])
        if left := room - length:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return Ragged.of(rows, np.int64)
