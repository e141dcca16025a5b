"""What training and serving agree on when one asks the other for text: token ids in, token ids out.

Nothing here knows text: stop strings travel through, and an engine with a tokenizer honours them.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from typing import cast


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The form a completion must have; one of the four fields says which.

    Raises:
        ValueError: none is given, or several, or one is of the wrong type.
    """

    json_schema: str | None = None
    """A JSON schema as text; the completion is JSON that it allows."""
    regex: str | None = None
    """The whole completion matches it; without look-around and back references."""
    choice: tuple[str, ...] | None = None
    """The completion is one of these."""
    grammar: str | None = None
    """A grammar in Lark's notation whose first rule is `start`."""

    def __post_init__(self) -> None:
        names = ("json_schema", "regex", "choice", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a structure needs one of {', '.join(names)}, not {given or 'none'}")
        if given == ["choice"]:
            object.__setattr__(self, "choice", _strings("choice", self.choice))
            if not self.choice or not all(self.choice):
                raise ValueError(f"choice must be made of non-empty strings, not {self.choice!r}")
        elif not isinstance(value := getattr(self, given[0]), str):
            raise ValueError(f"{given[0]} must be a string, not {value!r:.80}")

    @classmethod
    def of_json(cls, schema: Mapping[str, object] | bool | None = None) -> "Structure":
        """JSON that a schema allows; any JSON object without one."""
        return cls(json_schema=json.dumps({"type": "object"} if schema is None else schema))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next tokens of one task are chosen.

    Raises:
        ValueError: a value is of the wrong type or out of its range; the message names the field.
    """

    max_tokens: int | None = None
    """Most new tokens; None means up to the end of the context."""
    min_tokens: int = 0
    """Stop tokens cannot be chosen before so many new tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token of the output so far."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Makes the draws reproducible, whatever else is in the batch; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Text that ends the completion and is not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion beside those of the model."""
    ignore_eos: bool = False
    """Go on past the model's own stop tokens."""
    logprobs: int | None = None
    """None: none; k: the log-probability of each chosen token and of the k most likely ones."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first; such a prompt is computed whole."""
    control_texts: tuple[tuple[int, str], ...] = ()
    """What these control tokens are written as in the text; others have no text."""
    structure: Structure | None = None
    """The form the completion must have: other tokens cannot be chosen. The model's stop tokens can
    where the form is complete, and end it; `min_tokens` and `ignore_eos` only put that off."""

    def __post_init__(self) -> None:
        self._check_types()
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", self.min_tokens >= 0, "at least 0")
        self._require("temperature", 0 <= self.temperature <= 100, "from 0 to 100")
        self._require("top_k", self.top_k >= 0, "at least 0 (0 keeps all)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        self._require("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 (1: none)")
        self._require("presence_penalty", -100 <= self.presence_penalty <= 100, "from -100 to 100")
        self._require("frequency_penalty", -100 <= self.frequency_penalty <= 100, "-100 to 100")
        self._require("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        wanted = self.prompt_logprobs
        self._require("prompt_logprobs", wanted is None or wanted >= 0, "at least 0")
        self._require(
            "logit_bias",
            all(token_id >= 0 and math.isfinite(bias) for token_id, bias in self.logit_bias),
            "made of token ids and finite numbers",
        )
        self._require("stop", all(self.stop), "made of non-empty strings")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")

    def _check_types(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            is_right = _is_integer(value) or (value is None and name in _OPTIONAL)
            self._require(name, is_right, "an integer")
        for name in _NUMBERS:
            value = getattr(self, name)
            self._require(name, _is_number(value), "a number")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        ids, biases = _items(self.stop_token_ids), _items(self.logit_bias)
        are_ids = ids is not None and all(map(_is_integer, ids))
        self._require("stop_token_ids", are_ids, "a tuple of integers")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        are_biases = biases is not None and all(map(_is_bias, biases))
        self._require("logit_bias", are_biases, "a tuple of pairs of a token id and a number")
        object.__setattr__(self, "logit_bias", tuple(map(tuple, self.logit_bias)))
        texts = _items(self.control_texts)
        are_texts = texts is not None and all(map(_is_named, texts))
        self._require("control_texts", are_texts, "a tuple of pairs of a token id and its text")
        self._require("ignore_eos", _is_a(self.ignore_eos, bool), "True or False")
        is_structure = self.structure is None or _is_a(self.structure, Structure)
        self._require("structure", is_structure, "a Structure")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")


_INTEGERS = (
    "max_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_bias(value: object) -> bool:
    pair = _items(value)
    return pair is not None and len(pair) == 2 and _is_integer(pair[0]) and _is_number(pair[1])


def _is_named(value: object) -> bool:
    pair = _items(value)
    return pair is not None and len(pair) == 2 and _is_integer(pair[0]) and _is_a(pair[1], str)


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = _items(value)
    texts = [one for one in items or () if isinstance(one, str)]
    if items is None or len(texts) < len(items):
        raise ValueError(f"{name} must be a tuple of strings, not {value!r:.80}")
    return tuple(texts)


def _items(value: object) -> Sequence[object] | None:
    return cast("Sequence[object]", value) if isinstance(value, list | tuple) else None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer to one prompt."""

    token_ids: tuple[int, ...]
    """New tokens, a stop token included if one was chosen."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the full softmax at temperature 1, before any
    filter; the same length as `token_ids`."""
    finish_reason: FinishReason
    text: str = ""
    """Decoded tokens without control tokens and stop string; empty without a tokenizer."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of each token of the prompt but the first, if `SamplingParams.prompt_logprobs` asks."""


class GenerationEngine(ABC):
    """Generates from the very tensors of a model; GRPO rolls out through one.

    An abstract class and not a Protocol: jsonargparse takes no Protocol as a factory's return type.
    """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        between_steps: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt; one set of parameters for all, or one each.

        `between_steps` is called in the caller's thread again and again; what it raises ends the
        call, and the engine can be used again.
        """

    @abstractmethod
    def update_weights(self) -> None:
        """Tell that the weights changed: copies are refreshed and cached prefixes dropped."""

    @abstractmethod
    def stats(self) -> Mapping[str, int | float]:
        """Counts since the start, `num_steps` and `prefix_cache_hits` (tokens) among them."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; nothing may be generated afterwards."""
