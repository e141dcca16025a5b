"""Generation without a server and without a thread: the caller's own thread computes.

A call returns when all its prompts are answered. Calls from several threads wait for each other.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from astrai_core.generation import Completion, FinishReason, GenerationEngine, SamplingParams
from astrai_core.model import Transformer
from astrai_core.model.inference import read_fused
from astrai_core.model.quantization import Scheme
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.task import (
    EngineClosedError,
    GenerationFailedError,
    RefusedError,
    TaskEvent,
)
from astrai_serve.engine.tuning import choose_threads, is_native, threads_of_steps
from astrai_serve.generation_defaults import GenerationDefaults


class LLM(GenerationEngine):
    """A model to call.

    Args:
        model: a model folder or a LoRA checkpoint, or a model whose weights are read in place.
        tokenizer: the tokenizer of a model given as such; None makes an `LLM` of token ids only.
            A folder brings its own.
        config: sizes and limits.
        dtype: type of the weights of a folder; None keeps the folder's.
        weights: quantise the weights of a folder by this scheme; None keeps them as they are.
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        tokenizer: AutoTokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        weights: Scheme | None = None,
    ):
        self.default_params = default_params(model)
        """For calls without any: what the folder's `generation_config.json` wants."""
        model, tokenizer = load(model, tokenizer, dtype, weights)
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self._core: EngineCore | None = EngineCore.of_model(model, tokenizer, self.config)
        self._threads = self._threads_for(model)
        self._lock = threading.Lock()
        self._task_ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        between_steps: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt.

        Args:
            prompts: texts or token ids.
            params: one set of parameters for all, or one each; None takes `default_params`, and
                given ones owe nothing to the folder.
            between_steps: called before each step; what it raises ends the call.

        Raises:
            RefusedError: a prompt can never run; nothing was computed.
            GenerationFailedError: an error ended one of the tasks.
        """
        if isinstance(prompts, str):
            raise RefusedError("prompts is a list, not one text; pass [text]")
        prompt_ids = [self._encode(p) if isinstance(p, str) else p for p in prompts]
        with self._lock:
            core = self._open_core()
            if params is None:
                params = fitted(self.default_params, prompt_ids, core.max_context)
            each = each_params(params, len(prompts))
            tasks = [
                core.new_task(next(self._task_ids), ids, one)
                for ids, one in zip(prompt_ids, each, strict=True)
            ]
            parts = {task.task_id: CompletionParts() for task in tasks}
            try:
                for task in tasks:
                    core.add(task)
                while core.has_tasks:
                    if between_steps is not None:
                        between_steps()
                    with self._threads():
                        events = core.step()
                    for task_id, event in events:
                        parts[task_id].add(event)
                return [parts[task.task_id].completion() for task in tasks]
            finally:
                # after an error or Ctrl-C the tasks would still be there
                for task in tasks:
                    core.cancel(task.task_id)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        *,
        continue_final_message: bool = False,
        **template_variables: object,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: dicts with `role` and `content`.
            params: how to sample.
            tools: JSON schemas for the template.
            continue_final_message: the answer goes on with the last message instead of following.
            **template_variables: more names for the chat template.
        """
        if self.tokenizer is None:
            raise RefusedError("chat needs a tokenizer; pass one beside the model")
        prompt = self.tokenizer.apply_chat_template(
            messages,
            True,
            tools,
            continue_final_message=continue_final_message,
            **template_variables,
        )
        return self.generate([prompt], params)[0]

    def update_weights(self) -> None:
        """Forget all cached keys and values, for the model's weights have changed."""
        with self._lock:
            self._open_core().drop_computed()

    def stats(self) -> dict[str, int | float]:
        """Counts since the start, and how things stand."""
        with self._lock:
            return self._open_core().stats()

    def close(self) -> None:
        """Free the KV cache; the model itself is the caller's."""
        with self._lock:
            core, self._core = self._core, None
            if core is not None:
                core.close()

    def _threads_for(self, model: Transformer) -> Callable[[], AbstractContextManager[None]]:
        """As many as a server found best for such a model, where our operators are all there is."""
        if is_native(model):  # as the core has made it
            choice = choose_threads(model, self.config)
            return functools.partial(threads_of_steps, choice.threads)
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        return nullcontext

    def _open_core(self) -> EngineCore:
        if self._core is None:
            raise EngineClosedError("this LLM was closed")
        return self._core

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RefusedError("a text prompt needs a tokenizer; pass one, or token ids")
        return self.tokenizer.encode(text)


def load(
    model: str | Path | Transformer,
    tokenizer: AutoTokenizer | None,
    dtype: torch.dtype | None,
    weights: Scheme | None,
) -> tuple[Transformer, AutoTokenizer | None]:
    """Read a model folder and its tokenizer; a model given as such stays what it is."""
    if isinstance(model, Transformer):
        return model, tokenizer
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    return read_fused(model, dtype, weights), tokenizer


def default_params(model: str | Path | Transformer) -> SamplingParams:
    """How a model folder wants to be sampled; plain sampling for a model given as such.

    Raises:
        ValueError: the folder asks for what is not done here.
    """
    is_model = isinstance(model, Transformer)
    return SamplingParams() if is_model else GenerationDefaults.read(Path(model)).sampling


def fitted(
    params: SamplingParams, prompts: Sequence[Sequence[int]], max_context: int
) -> list[SamplingParams]:
    """Parameters that nobody chose for these prompts: their `max_tokens` gives way to the room."""
    if (limit := params.max_tokens) is None:
        return [params] * len(prompts)
    rooms = [max(1, max_context - _length(prompt)) for prompt in prompts]
    return [dataclasses.replace(params, max_tokens=min(limit, room)) for room in rooms]


def _length(prompt: object) -> int:
    return len(prompt) if isinstance(prompt, Sized) else 0  # what is no prompt is refused later


def each_params(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """One set of parameters for each prompt, asking for the log-probabilities completions carry."""
    each = [params] * num_prompts if isinstance(params, SamplingParams) else list(params)
    if len(each) != num_prompts:
        raise ValueError(f"{len(each)} params for {num_prompts} prompts; pass one, or one each")
    return [dataclasses.replace(p, logprobs=0) if p.logprobs is None else p for p in each]


class CompletionParts:
    """Events of one task on their way to be a `Completion`."""

    def __init__(self) -> None:
        self._events: list[TaskEvent] = []

    def add(self, event: TaskEvent) -> None:
        """Take the next event."""
        self._events.append(event)

    def completion(self) -> Completion:
        """What the events come to.

        Raises:
            GenerationFailedError: the task ended by an error or was cancelled by another thread.
        """
        finish = self._events[-1].finish
        assert finish is not None, "a task without an end"
        if finish.reason in (FinishReason.ERROR, FinishReason.CANCELLED):
            raise GenerationFailedError(finish.message or "the task was cancelled")
        return Completion(
            token_ids=tuple(i for event in self._events for i in event.token_ids),
            logprobs=tuple(entry.logprob for event in self._events for entry in event.logprobs),
            finish_reason=finish.reason,
            text="".join(event.text for event in self._events),
            prompt_logprobs=tuple(
                entry.logprob for event in self._events for entry in event.prompt_logprobs
            ),
        )
