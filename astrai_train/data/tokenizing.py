"""Records to token ids: what a stage keeps of a record.

seq keeps `input_ids`, ended by the end-of-text token. sft keeps `input_ids` and `trained`, which
says of each token whether training teaches it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.ragged import Ragged
from astrai_train.data.records import Record, Stage

Answers = Literal["all", "last"]
"""Which answers of a conversation are taught."""

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


def end_of_text_id(tokenizer: AutoTokenizer) -> int:
    """The token that ends a document; `eos_token` often ends a turn of a chat instead.

    Raises:
        ValueError: the tokenizer has none.
    """
    for name in _END_OF_TEXT:
        ids = tokenizer.encode_rendered(name)
        if len(ids) == 1 and ids[0] in tokenizer.control_ids:
            return ids[0]
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no token to end a document with: "
            "name its eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_id


def token_dtype(tokenizer: AutoTokenizer) -> type[np.integer]:
    """The narrowest type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def column_names(stage: Stage) -> tuple[str, ...]:
    """What `encode_records` gives for a stage."""
    return ("input_ids",) if stage == "seq" else ("input_ids", "trained")


def encode_records(
    records: Sequence[Record], stage: Stage, tokenizer: AutoTokenizer, answers: Answers = "all"
) -> dict[str, Ragged]:
    """The columns of a stage, one sequence a record.

    Raises:
        ValueError: a record is not of the stage, or nothing in it is taught; says file and line.
    """
    if stage == "seq":
        return {"input_ids": Ragged.of(_encode_texts(records, tokenizer), token_dtype(tokenizer))}
    chats = [_encode_chat(record, tokenizer, answers) for record in records]
    return {
        "input_ids": Ragged.of((ids for ids, _ in chats), token_dtype(tokenizer)),
        "trained": Ragged.of((trained for _, trained in chats), np.bool_),
    }


def _encode_texts(records: Sequence[Record], tokenizer: AutoTokenizer) -> list[list[int]]:
    texts = [record.text() for record in records]
    end = end_of_text_id(tokenizer)
    try:
        documents = tokenizer.encode_batch(texts)
    except ValueError:
        documents = [_encode_text(record, tokenizer) for record in records]
    return [[*ids, end] for ids in documents]


def _encode_text(record: Record, tokenizer: AutoTokenizer) -> list[int]:
    try:
        return tokenizer.encode(record.text())
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None


def _encode_chat(
    record: Record, tokenizer: AutoTokenizer, answers: Answers
) -> tuple[list[int], list[bool]]:
    messages = record.messages()
    try:
        ids, trained = tokenizer.encode_chat_with_mask(
            messages, answers, tools=record.content.get("tools")
        )
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None
    if not any(trained):
        raise ValueError(f"{record.place}: no token of it would be trained")
    return ids, trained
