"""What a file teaches: its text with trained tokens bright, the others dim, lost ones red."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.style import Style
from rich.text import Text

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.packing import (
    IGNORED,
    PADDING,
    Row,
    num_stream_rows,
    pack_samples,
    samples_row,
    stream_row,
)
from astrai_train.data.records import LONGEST_DOCUMENT
from astrai_train.data.storage import Storage
from astrai_train.data.tokenizing import end_of_text_id
from astrai_train.data.truncation import Truncation

_TRAINED = Style(color="green", bold=True)
_MASKED = Style(dim=True)
_LOST = Style(color="red", strike=True)
_CUT = Style(color="red", bold=True)
_HEADING = Style(color="blue", bold=True)
_EDGE = "\n┄┄┄\n"
"""Between the documents of a row."""


def summary(storage: Storage, tokenizer: AutoTokenizer) -> dict[str, str]:
    """Counts of a file, as words to print."""
    lengths = storage.input_ids.lengths
    trained = storage.num_trained_tokens
    tokens = storage.num_tokens
    sizes = np.array(tokenizer.token_byte_lengths)
    size = sum(int(sizes[segment].sum()) for segment in storage.input_ids.segments)
    control = sum(
        int(np.isin(segment, list(tokenizer.control_ids)).sum())
        for segment in storage.input_ids.segments
    )
    count, what = storage.content.split()
    return {
        "stage": storage.stage,
        what: count,
        "tokens": f"{tokens:,}, of them {control:,} control tokens",
        "trained": f"{trained:,} tokens, {trained / max(tokens, 1):.1%}",
        "text": f"{size:,} bytes, {size / max(tokens - control, 1):.2f} bytes per token",
        "length": f"median {int(np.median(lengths)):,}, longest {int(lengths.max()):,} tokens "
        f"({storage.place(int(lengths.argmax()))})",
    } | ({"cut": _describe_cuts(storage)} if storage.cuts else {})


def _describe_cuts(storage: Storage) -> str:
    place = storage.place(storage.cuts[0])
    return (
        f"documents of text files were longer than {LONGEST_DOCUMENT:,} bytes and were cut in "
        f"{len(storage.cuts):,} places, at the end of {place} first; no token is lost"
    )


def show_samples(
    storage: Storage, tokenizer: AutoTokenizer, first: int, count: int, marks: bool
) -> Iterator[Text]:
    """Samples as they are in the file.

    Args:
        storage: the file.
        tokenizer: what it was made with.
        first: number of the first sample, from 0.
        count: how many.
        marks: put trained text between ⟦ and ⟧, for where colours are not seen.
    """
    for sample in range(first, min(first + count, len(storage))):
        ids = storage.input_ids[sample].tolist()
        trained = (
            storage.trained[sample].tolist()
            if storage.stage != "seq"
            else [number > 0 for number in range(len(ids))]
        )
        yield _head(storage, sample).append_text(_painted(ids, trained, tokenizer, marks))


def show_too_long(
    storage: Storage, tokenizer: AutoTokenizer, cut: Truncation, count: int, marks: bool
) -> Iterator[Text]:
    """Samples that rows are too short for, tokens beyond the window in red; see `show_samples`.

    Args:
        storage: the file, whose samples stay whole.
        tokenizer: what it was made with.
        cut: what is too long in it.
        count: how many samples to show.
        marks: put text beyond the window between ⟪ and ⟫ too.
    """
    for sample in cut.samples[:count].tolist():
        ids, trained = storage.input_ids[sample].tolist(), storage.trained[sample].tolist()
        window, beyond = cut.window, max(len(ids) - cut.window, 0)
        text = _head(storage, sample)
        text.right_crop(1)
        why = (
            f"{beyond:,} beyond the window, {sum(trained[window:]):,} of them trained"
            if beyond
            else "left out with another of its record"
        )
        text.append(f": {why}\n", _CUT)
        text.append_text(_painted(ids[:window], trained[:window], tokenizer, marks))
        if beyond:
            lost = tokenizer.decode(ids[window:], skip_special_tokens=False)
            text.append(f"⟪{lost}⟫" if marks else lost, _LOST)
        yield text
    if (more := len(cut.samples) - count) > 0:
        yield Text(f"{more:,} more are too long; --count shows so many", _CUT)


def _head(storage: Storage, sample: int) -> Text:
    length = len(storage.input_ids[sample])
    text = Text(f"sample {sample}, {storage.place(sample)}, {length} tokens", _HEADING)
    if sample in storage.cuts:
        text.append(": ✂ its document was too long and goes on in the next sample", _CUT)
    return text.append("\n")


def show_rows(
    storage: Storage,
    tokenizer: AutoTokenizer,
    window: int,
    first: int,
    count: int,
    marks: bool,
) -> Iterator[Text]:
    """Rows as training sees them, documents packed into windows; see `show_samples`."""
    rows, number_of_rows = _rows(storage, tokenizer, window, first, count)
    for number, row in enumerate(rows, first):
        documents = row["document_ids"]
        used = int((documents != PADDING).sum())
        trained = int((row["labels"] != IGNORED).sum())
        text = Text()
        text.append(
            f"row {number} of {number_of_rows}, {used} of {window} positions used, "
            f"{trained} trained\n",
            _HEADING,
        )
        # the label of a position belongs to the token after it
        is_label = np.concatenate([[False], row["labels"][:-1] != IGNORED])
        for document in range(documents.max() + 1):
            here = documents == document
            ids = row["input_ids"][here].tolist()
            text.append(_EDGE if document else "", _MASKED)
            text.append_text(_painted(ids, is_label[here].tolist(), tokenizer, marks))
        if storage.stage == "seq":
            text = _with_cuts(text, storage, number * window, window)
        yield text


def _with_cuts(text: Text, storage: Storage, start: int, window: int) -> Text:
    """Say where a document came from another row, and where one goes on in the next."""
    offsets = storage.input_ids.offsets
    stop = min(start + window, storage.input_ids.total)
    begun, goes_on = (
        int(np.searchsorted(offsets, place, side="right")) - 1 for place in (start, stop)
    )
    if start > offsets[begun]:
        seen = (
            f"✂ {start - offsets[begun]:,} tokens of {storage.place(begun)} are in earlier rows\n"
        )
        split = text.plain.index("\n") + 1
        text = Text.assemble(text[:split], (seen, _CUT), text[split:])
    if stop < storage.input_ids.total and stop > offsets[goes_on]:
        left, place = offsets[goes_on + 1] - stop, storage.place(goes_on)
        text.append(f"\n✂ {left:,} tokens of {place} follow in later rows", _CUT)
    return text


def _rows(
    storage: Storage, tokenizer: AutoTokenizer, window: int, first: int, count: int
) -> tuple[Iterator[Row], int]:
    padding = end_of_text_id(tokenizer)
    ids = storage.input_ids
    if storage.stage == "seq":
        number = num_stream_rows(ids, window)
        wanted = range(first, min(first + count, number))
        return (stream_row(ids, row, window, padding) for row in wanted), number
    kept = np.setdiff1d(np.arange(len(storage)), Truncation.of(storage, window).samples)
    packs = pack_samples(ids.lengths[kept].tolist(), window)
    wanted = range(first, min(first + count, len(packs)))
    return (
        samples_row(ids, storage.trained, kept[packs[row].tolist()].tolist(), window, padding)
        for row in wanted
    ), len(packs)


def _painted(ids: list[int], trained: list[bool], tokenizer: AutoTokenizer, marks: bool) -> Text:
    text = Text()
    for taught, run in groupby(zip(ids, trained, strict=True), lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        if marks and taught:
            words = f"⟦{words}⟧"
        text.append(words, _TRAINED if taught else _MASKED)
    return text
