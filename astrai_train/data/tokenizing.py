"""Records to token ids: what a stage keeps of a record.

    stage   samples of a record              columns
    seq     the document                     input_ids, ended by the end-of-text token
    sft     the conversation                 input_ids, trained
    dpo     two: with its chosen answer,     input_ids, trained
            then with its rejected one
    grpo    the prompt; or one for each      input_ids, trained, columns
            stored response, prompt included

`trained` says of each token whether training teaches it: the answers' tokens and the ends of their
turns. `columns` is what reward functions are told, as JSON in UTF-8; it stands with the first
sample of a record and is empty at the others.
"""

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.ragged import Ragged
from astrai_train.data.record import Messages, Record, Stage

Answers = Literal["all", "last"]
"""Which answers of a conversation are taught."""

_Sample = tuple[list[int], list[bool]]

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
    match stage:
        case "seq":
            return ("input_ids",)
        case "sft" | "dpo":
            return ("input_ids", "trained")
        case "grpo":
            return ("input_ids", "trained", "columns")


def num_samples(record: Record, stage: Stage) -> int:
    """How many samples `encode_records` makes of a record."""
    match stage:
        case "seq" | "sft":
            return 1
        case "dpo":
            return 2
        case "grpo":
            return len(record.content.get("responses", ())) or 1


def encode_records(
    records: Sequence[Record], stage: Stage, tokenizer: AutoTokenizer, answers: Answers = "all"
) -> dict[str, Ragged]:
    """The columns of a stage, the samples of one record after those of another.

    Raises:
        ValueError: a record is not of the stage, or nothing in it is taught; says file and line.
    """
    if stage == "seq":
        return {"input_ids": Ragged.of(_encode_texts(records, tokenizer), token_dtype(tokenizer))}
    samples: list[_Sample] = []
    columns: list[bytes] = []
    for record in records:
        match stage:
            case "sft":
                samples.append(_encode_chat(record, tokenizer, answers))
            case "dpo":
                samples += _encode_pair(record, tokenizer)
            case "grpo":
                some, told = _encode_question(record, tokenizer)
                samples += some
                columns += [told, *[b""] * (len(some) - 1)]
    encoded = {
        "input_ids": Ragged.of((ids for ids, _ in samples), token_dtype(tokenizer)),
        "trained": Ragged.of((trained for _, trained in samples), np.bool_),
    }
    if stage == "grpo":
        encoded["columns"] = Ragged.of(map(list, columns), np.uint8)
    return encoded


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


def _encode_chat(record: Record, tokenizer: AutoTokenizer, answers: Answers) -> _Sample:
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


def _encode_pair(record: Record, tokenizer: AutoTokenizer) -> list[_Sample]:
    pair = record.pair()
    both = [
        _encode_completion(record, pair.prompt, completion, name, tokenizer)
        for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    if both[0] == both[1]:
        raise ValueError(f"{record.place}: chosen and rejected are the same tokens; remove it")
    return both


def _encode_question(record: Record, tokenizer: AutoTokenizer) -> tuple[list[_Sample], bytes]:
    question = record.question()
    told = json.dumps(question.columns, ensure_ascii=False).encode()
    if question.responses:
        return [
            _encode_completion(record, question.prompt, response, f"response {number}", tokenizer)
            for number, response in enumerate(question.responses, 1)
        ], told
    try:
        ids = tokenizer.apply_chat_template(question.prompt, tools=record.content.get("tools"))
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None
    return [(ids, [False] * len(ids))], told


def _encode_completion(
    record: Record, prompt: Messages, completion: Messages, what: str, tokenizer: AutoTokenizer
) -> _Sample:
    """A prompt and what continues it, up to the last trained token."""
    tools = record.content.get("tools")
    is_single = sum(message["role"] == "assistant" for message in completion) == 1
    try:
        ids, trained = tokenizer.encode_chat_with_mask(
            [*prompt, *completion], "last" if is_single else "all", tools=tools
        )
        if not is_single:
            # answers that the prompt quotes are read, not taught
            start = len(tokenizer.apply_chat_template(prompt, tools=tools))
            trained = [False] * start + trained[start:]
    except ValueError as error:
        raise ValueError(f"{record.place}: {what}: {error}") from None
    if not any(trained):
        raise ValueError(f"{record.place}: no token of {what} would be trained")
    end = len(trained) - trained[::-1].index(True)
    return ids[:end], trained[:end]
