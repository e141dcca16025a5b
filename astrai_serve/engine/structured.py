"""Structured output: which tokens may come next so that a completion keeps a form.

A form becomes a grammar in a thread of its own, within limits and after a trial in a process that
can be stopped, and is kept by its content. Every task walks its own copy, token by token as they
are chosen; so neither preemption nor batch-mates touch it. R rows that sample, V tokens.
"""

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astrai_core.generation import Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine.grammar_trial import GrammarTrial, compiled
from astrai_serve.engine.task import RefusedError, Task

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARACTERS = 20_000
MAX_CHOICES = 1_000
MAX_DEPTH = 32
COMPILE_SECONDS = 5.0
# shorter, so that who comes behind a form without an end still gets a turn
TRIAL_SECONDS = 2.5
NUM_KEPT = 64


class GrammarCompiler:
    """Makes matchers of forms, for one tokenizer; any thread may ask.

    Args:
        vocab_size: V of the model.
        end_ids: the model's stop tokens; they can be chosen where a form is complete.
        token_bytes: the bytes of a token; none for control tokens.
        encode: token ids of a text.
    """

    def __init__(
        self,
        vocab_size: int,
        end_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
        encode: Callable[[str], list[int]],
    ):
        self.end_ids = end_ids
        self._vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._encode = encode
        self._lock = threading.Lock()
        self._kept: OrderedDict[Structure, LLMatcher | RefusedError] = OrderedDict()
        # one thread: a client's hard grammars may not take every core from the engine
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="astrai-grammar")
        self._trial = GrammarTrial()
        self._tokenizer: LLTokenizer | None = None

    @classmethod
    def of_tokenizer(
        cls, tokenizer: AutoTokenizer | None, vocab_size: int
    ) -> "GrammarCompiler | None":
        """The compiler for a model's tokenizer; None where nothing could end a completion."""
        if tokenizer is None:
            return None
        end_ids = frozenset(i for i in tokenizer.stop_ids if i < vocab_size)
        if not end_ids:
            return None
        return cls(vocab_size, end_ids, tokenizer.token_bytes, tokenizer.encode)

    def matcher(self, structure: Structure) -> "Matcher":
        """A matcher at the start of a form, which is compiled unless it is known.

        Raises:
            RefusedError: the form is wrong, cannot be satisfied, or is too much work.
        """
        known = self._find(structure)
        if known is None:
            _check_size(structure)
            known = self._compile(structure)
        if isinstance(known, RefusedError):
            raise RefusedError(str(known))
        return Matcher(known.deep_copy(), self.end_ids, lambda: self._forget(structure))

    def warm_up(self) -> None:
        """Build what every form needs, in the worker; a step beside it would wait for it.

        llguidance sorts the vocabulary with Python's lock held, half a second for 32,000 tokens.
        """
        if importlib.util.find_spec("llguidance") is not None:
            self._worker.submit(self._shared_tokenizer)

    def close(self) -> None:
        """Compile nothing more."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._trial.close()

    def _compile(self, structure: Structure) -> "LLMatcher | RefusedError":
        try:
            future: Future[LLMatcher | RefusedError] = self._worker.submit(self._work, structure)
        except RuntimeError:
            raise RefusedError("the engine was closed") from None
        try:
            return future.result(COMPILE_SECONDS)
        except TimeoutError:
            future.cancel()
            raise RefusedError(_too_slow(structure, COMPILE_SECONDS)) from None

    def _work(self, structure: Structure) -> "LLMatcher | RefusedError":
        """Compile in the worker's thread, unless somebody asked for the same just before."""
        known = self._find(structure)
        if known is not None:
            return known
        if importlib.util.find_spec("llguidance") is None:
            return RefusedError("structure needs llguidance: install astrai[serve]")
        made: LLMatcher | RefusedError
        try:
            reason = self._trial.failure(structure, TRIAL_SECONDS)
        except TimeoutError:
            made = RefusedError(_too_slow(structure, TRIAL_SECONDS))
        else:
            matcher = None
            if reason is None:
                matcher = compiled(structure, self._shared_tokenizer())
                reason = matcher.get_error() if matcher.is_error() else None
            if matcher is None or reason is not None:
                reason = _first_line(reason or "")
                made = RefusedError(f"{_name(structure)} cannot be used: {reason}")
            else:
                made = matcher
        with self._lock:
            self._kept[structure] = made
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        return made

    def _shared_tokenizer(self) -> "LLTokenizer":
        """The vocabulary in llguidance's form; only the worker asks."""
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            vocabulary = _Vocabulary(
                self._vocab_size, self.end_ids, self._token_bytes, self._encode
            )
            self._tokenizer = LLTokenizer(cast("Any", vocabulary), eos_token=sorted(self.end_ids))
        return self._tokenizer

    def _find(self, structure: Structure) -> "LLMatcher | RefusedError | None":
        with self._lock:
            known = self._kept.get(structure)
            if known is not None:
                self._kept.move_to_end(structure)
            return known

    def _forget(self, structure: Structure) -> None:
        """Compile it anew next time: copies share what a matcher has learnt of its lexer."""
        with self._lock:
            self._kept.pop(structure, None)


class Matcher:
    """Where one completion stands in its form.

    Args:
        matcher: of llguidance, owned by this one.
        end_ids: tokens that end a completion whose form is complete.
        on_failure: called once it can say nothing more.
    """

    def __init__(
        self, matcher: "LLMatcher", end_ids: frozenset[int], on_failure: Callable[[], None]
    ):
        self.end_ids = end_ids
        self._matcher = matcher
        self._on_failure = on_failure

    def write_mask(self, bits: NDArray[np.uint32]) -> None:
        """Write a bit for each token: 1 where it may come next.

        Raises:
            RuntimeError: the form needs too much work at this place.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def advance(self, token_id: int) -> None:
        """Take note of the chosen token.

        Raises:
            RuntimeError: it cannot come here, or the form needs too much work.
        """
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            self._on_failure()
            reason = _first_line(self._matcher.get_error())
            raise RuntimeError(f"the structure cannot be followed any further: {reason}")


class TokenMasks:
    """Masks of a batch, in memory that is kept from step to step.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._bits = np.zeros((0, -(-vocab_size // 32)), np.uint32)

    def apply(
        self, logits: Tensor, tasks: Sequence[Task], rows: Sequence[int]
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Return logits (R, V) in which forbidden tokens are -inf, and the errors by row.

        Args:
            logits: (R, V), adjusted; they are not changed.
            tasks: of the R rows.
            rows: those with a matcher.
        """
        if len(self._bits) < len(rows):
            self._bits = np.zeros((len(rows), self._bits.shape[1]), np.uint32)
        bits = self._bits[: len(rows)]
        errors: dict[int, Exception] = {}
        for n, row in enumerate(rows):
            matcher = tasks[row].matcher
            assert matcher is not None
            try:
                matcher.write_mask(bits[n])
            except Exception as error:  # one task's form must not end the others
                errors[row] = error
                bits[n] = 0xFFFFFFFF
        allowed = np.unpackbits(
            bits.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little"
        )  # (rows, V)
        for n, row in enumerate(rows):
            _put_off_end(allowed[n], tasks[row])
        forbidden = torch.from_numpy(allowed == 0).to(logits.device)
        at = torch.tensor(rows, device=logits.device)
        masked = logits[at].masked_fill(forbidden, -torch.inf)
        return logits.index_copy(0, at, masked), errors


def _put_off_end(allowed: NDArray[np.uint8], task: Task) -> None:
    """Forbid stop tokens to a task that should not stop yet, unless nothing else can follow."""
    matcher = task.matcher
    assert matcher is not None
    ids: set[int] = set()
    if task.num_output_tokens < task.params.min_tokens:
        ids |= task.stop_ids | matcher.end_ids
    elif task.params.ignore_eos:
        ids |= matcher.end_ids
    if not ids:
        return
    index = np.fromiter(ids, np.int64)
    kept = allowed[index]
    allowed[index] = 0
    if not allowed.any():
        allowed[index] = kept


class _Vocabulary:
    """The tokens as llguidance wants to see them."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(
        self,
        vocab_size: int,
        end_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
        encode: Callable[[str], list[int]],
    ):
        self.eos_token_id = min(end_ids)
        self.tokens = [b"" if i in end_ids else token_bytes(i) for i in range(vocab_size)]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


def _check_size(structure: Structure) -> None:
    """Refuse what is too large before any work is spent on it.

    Raises:
        RefusedError: names the field and the limit.
    """
    name = _name(structure)
    texts = structure.choice or (getattr(structure, name),)
    if len(texts) > MAX_CHOICES:
        raise RefusedError(f"{name} has {len(texts)} texts; at most {MAX_CHOICES} are taken")
    length = sum(map(len, texts))
    if length > MAX_CHARACTERS:
        raise RefusedError(f"{name} has {length} characters; at most {MAX_CHARACTERS} are taken")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise RefusedError(f"{name} holds half a surrogate pair") from None
    if structure.json_schema is not None:
        _check_schema(structure.json_schema)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"json_schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise RefusedError("json_schema must be an object or a boolean")
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RefusedError(f"json_schema is nested deeper than {MAX_DEPTH} levels")
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]


def _name(structure: Structure) -> str:
    names = ("json_schema", "regex", "choice", "grammar")
    return next(name for name in names if getattr(structure, name) is not None)


def _too_slow(structure: Structure, seconds: float) -> str:
    return f"{_name(structure)} was not compiled within {seconds:g} seconds; make it simpler"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
