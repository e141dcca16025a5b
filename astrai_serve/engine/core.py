"""The engine without a thread: tasks in, one step at a time, events out.

It is driven by one caller, the engine thread or `LLM`, and holds all that changes. An error in a
step ends the tasks of that step and nothing else.
"""

import logging
import operator
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from astrai_core.generation import FinishReason, SamplingParams
from astrai_core.machine import available_memory
from astrai_core.model import Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.detokenizer import Detokenizer
from astrai_serve.engine.executor import Executor
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.kv_storage import KVStorage
from astrai_serve.engine.page_budget import PageBudget, choose_pages
from astrai_serve.engine.reproducible import make_reproducible_
from astrai_serve.engine.scheduler import Chunk, InferenceScheduler
from astrai_serve.engine.speculation import Speculation
from astrai_serve.engine.statistics import Statistics
from astrai_serve.engine.structured import GrammarCompiler, Matcher
from astrai_serve.engine.task import (
    Finish,
    RefusedError,
    SampledToken,
    Task,
    TaskEvent,
    TaskStatus,
)

logger = logging.getLogger(__name__)


class StepExecutor(Protocol):
    """Computes steps; `Executor` on a model, or a small fake in tests."""

    def execute(self, chunks: Sequence[Chunk]) -> Sequence[Sequence[SampledToken | Exception]]:
        """Return what follows each chunk: nothing where it does not sample, else a token or error.

        A chunk with a draft has one more for each guess: what follows if the guesses up to there
        are right.
        """
        ...


class EngineCore:
    """Tasks, steps and events.

    Args:
        scheduler: decides what a step computes.
        executor: computes it.
        vocab_size: token ids are below it.
        max_context: most tokens of prompt and output together.
        model_stop_ids: tokens that end a task unless it ignores them.
        token_bytes: the bytes of a token; None makes an engine without text.
        grammars: compiles structures; None refuses them.
        why_pages: why the cache has so many pages, for people.
    """

    def __init__(
        self,
        scheduler: InferenceScheduler,
        executor: StepExecutor,
        *,
        vocab_size: int,
        max_context: int,
        model_stop_ids: frozenset[int] = frozenset(),
        token_bytes: Callable[[int], bytes] | None = None,
        grammars: GrammarCompiler | None = None,
        why_pages: str = "",
    ):
        self.scheduler = scheduler
        self.executor: StepExecutor | None = executor
        self.vocab_size = vocab_size
        self.max_context = min(max_context, scheduler.kv.pool.num_pages * scheduler.kv.page_size)
        self.model_stop_ids = frozenset(i for i in model_stop_ids if i < vocab_size)
        self._token_bytes = token_bytes
        self._grammars = grammars
        self.why_pages = why_pages
        self._tasks: dict[int, Task] = {}
        self._detokenizers: dict[int, Detokenizer] = {}
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_steps = 0
        self.statistics = Statistics()
        self.num_finished = dict.fromkeys(FinishReason, 0)

    @classmethod
    def of_model(
        cls, model: Transformer, tokenizer: AutoTokenizer | None, config: EngineConfig
    ) -> "EngineCore":
        """Put the parts together for a model; without a tokenizer there is no text.

        Raises:
            ValueError: `reproducible` is wanted and cannot be had, or `max_context` is beyond the
                model's own; the message says why.
        """
        max_context = config.context_within(model.config.max_len)
        if config.reproducible:
            make_reproducible_(model)
        dtype = model.dtype
        if config.kv_dtype != "auto":
            dtype = getattr(torch, config.kv_dtype)
        budget = _page_budget(model, dtype, max_context, config)
        num_pages = budget.num_pages
        device = model.device
        storage = KVStorage(model.config, num_pages, config.page_size, dtype, device)
        scheduler = InferenceScheduler(
            KVCache(num_pages, config.page_size, config.prefix_caching),
            max_running_tasks=config.max_running_tasks,
            max_step_tokens=config.max_step_tokens,
            max_chunk_tokens=config.max_chunk_tokens,
            headroom_pages=config.headroom_pages,
            speculation=Speculation(config.speculative_tokens),
        )
        return cls(
            scheduler,
            Executor(model, storage),
            vocab_size=model.config.vocab_size,
            max_context=max_context,
            model_stop_ids=frozenset() if tokenizer is None else tokenizer.stop_ids,
            token_bytes=None if tokenizer is None else tokenizer.token_bytes,
            grammars=GrammarCompiler.of_tokenizer(tokenizer, model.config.vocab_size),
            why_pages=budget.why,
        )

    @property
    def has_tasks(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.has_tasks

    def idle_work(self) -> Iterator[None]:
        """What would hold a step up later, and is better done while there are none."""
        if self._grammars is not None:
            self._grammars.warm_up()
        yield

    def matcher_of(self, params: SamplingParams) -> Matcher | None:
        """Compile what the parameters say of the output's form; any thread may, and waits for it.

        Raises:
            RefusedError: the form is wrong, cannot be satisfied, or is too much work.
        """
        if params.structure is None:
            return None
        if self._grammars is None:
            raise RefusedError("structure needs a tokenizer with stop tokens")
        return self._grammars.matcher(params.structure)

    def new_task(
        self,
        task_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        sample_index: int = 0,
        client: str = "",
        is_bulk: bool = False,
        tells_progress: bool = False,
        matcher: Matcher | None = None,
    ) -> Task:
        """Make a task that is sure to fit; reads only what never changes, so any thread may.

        Args:
            task_id: larger than that of any earlier task.
            prompt_ids: at least one token.
            params: how to sample.
            cache_salt: tasks share cached prefixes only with tasks of the same salt.
            sample_index: which of several samples of one request, for other draws of one seed.
            client: whose task it is; clients get their turns fairly.
            is_bulk: nobody waits for it in front of a screen.
            tells_progress: events tell how far the prompt has come.
            matcher: what `matcher_of` made of the parameters; None makes one here.

        Raises:
            RefusedError: the task can never run; the message says why, and the way out.
        """
        try:
            prompt_ids = tuple(map(operator.index, prompt_ids))
        except TypeError:
            raise RefusedError(
                f"a prompt is a sequence of token ids, not {prompt_ids!r:.60}"
            ) from None
        self._check_ids("prompt", prompt_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias])
        if not prompt_ids:
            raise RefusedError("the prompt is empty; it needs at least one token")
        if params.stop and self._token_bytes is None:
            raise RefusedError("stop strings need a tokenizer; use stop_token_ids")
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise RefusedError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for an answer in a "
                f"context of {self.max_context} tokens; shorten it"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RefusedError(
                f"the prompt's {len(prompt_ids)} tokens and max_tokens {params.max_tokens} exceed "
                f"the context of {self.max_context} tokens; lower max_tokens to {room} or shorten "
                "the prompt"
            )
        stop_ids = frozenset(params.stop_token_ids)
        return Task(
            task_id=task_id,
            prompt_ids=prompt_ids,
            params=params,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            sample_index=sample_index,
            cache_salt=cache_salt,
            client=client,
            is_bulk=is_bulk,
            tells_progress=tells_progress,
            arrived_at=time.perf_counter(),
            stop_ids=stop_ids if params.ignore_eos else stop_ids | self.model_stop_ids,
            matcher=matcher or self.matcher_of(params),
        )

    def add(self, task: Task) -> None:
        """Queue a task made by `new_task`."""
        self._tasks[task.task_id] = task
        if self._token_bytes is not None:
            spell = _speller(self._token_bytes, task.params.control_texts)
            self._detokenizers[task.task_id] = Detokenizer(spell, task.params.stop)
        self.scheduler.add(task)
        self.num_prompt_tokens += task.num_prompt_tokens

    def cancel(self, task_id: int) -> list[tuple[int, TaskEvent]]:
        """End a task at once; one that has ended already is left alone."""
        task = self._tasks.get(task_id)
        if task is None:
            return []
        return [(task_id, self._end(task, task.finish(FinishReason.CANCELLED)))]

    def step(self) -> list[tuple[int, TaskEvent]]:
        """Compute one step and return the news of its tasks, by task id."""
        assert self.executor is not None, "the engine was closed"
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self.num_steps += 1
        began = time.perf_counter()
        for chunk in chunks:
            self.statistics.admitted(chunk.task, began)
        try:
            samples = self.executor.execute(chunks)
        except Exception as error:  # whatever it is, the other tasks are not to blame
            logger.exception("a step of %d tasks failed", len(chunks))
            return [(chunk.task.task_id, self._fail(chunk.task, error)) for chunk in chunks]
        seconds = time.perf_counter() - began
        num_decoded = sum(1 for c in chunks if c.num_known == 1 and c.task.num_output_tokens)
        num_prompt_tokens = sum(chunk.num_known for chunk in chunks) - num_decoded
        # what a failed chunk computed is no prefix for others
        pairs = list(zip(chunks, samples, strict=True))
        self.scheduler.complete([c for c, s in pairs if not (s and isinstance(s[0], Exception))])
        events: list[tuple[int, TaskEvent]] = []
        for chunk, sampled in pairs:
            if not sampled:
                if chunk.task.tells_progress and not chunk.task.num_output_tokens:
                    events.append((chunk.task.task_id, _progress(chunk.task)))
                continue
            event, num_accepted = self._advance(chunk, sampled)
            num_decoded += num_accepted
            events.append((chunk.task.task_id, event))
        self.statistics.step(num_prompt_tokens, num_decoded, seconds)
        return events

    def drop_computed(self) -> None:
        """Forget every cached key and value, for the weights have changed; running tasks go on."""
        self.scheduler.preempt_all()
        self.scheduler.kv.clear_prefixes()

    def close(self) -> None:
        """Let go of the model and of its keys and values; no step follows, the counts stay."""
        self.executor = None
        if self._grammars is not None:
            self._grammars.close()

    def stats(self) -> dict[str, int | float]:
        """Counts since the start, and how things stand."""
        scheduler, kv = self.scheduler, self.scheduler.kv
        used = kv.pool.num_pages - kv.pool.num_free
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "num_preemptions": scheduler.num_preemptions,
            "kv_cache_usage": used / kv.pool.num_pages,
            "num_pages": kv.pool.num_pages,
            "num_cached_pages": kv.pool.num_cached,
            "prefix_cache_queries": kv.num_lookup_tokens,
            "prefix_cache_hits": kv.num_hit_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "generation_tokens": self.num_output_tokens,
            "num_steps": self.num_steps,
            "draft_tokens": scheduler.speculation.num_drafted,
            "accepted_tokens": scheduler.speculation.num_accepted,
            **{f"num_finished_{reason}": n for reason, n in self.num_finished.items()},
        }

    def _advance(
        self, chunk: Chunk, sampled: Sequence[SampledToken | Exception]
    ) -> tuple[TaskEvent, int]:
        """Add what was sampled to its task, up to the first guess that was wrong.

        Returns:
            What there is to tell, and the number of guesses that gave the task a token more.
        """
        task, num_accepted = chunk.task, 0
        event = None
        try:
            for sample, guess in zip(sampled, (*chunk.draft, None), strict=True):
                if isinstance(sample, Exception):
                    raise sample
                if event is not None:  # the guess before was what the task had just said
                    self.scheduler.accept(task)
                    num_accepted += 1
                news = self._say(task, sample)
                event = news if event is None else event + news
                if event.finish is not None or sample.token_id != guess:
                    break
        except Exception as error:  # one task's text must not end the others
            logger.exception("task %d failed", task.task_id)
            news = self._fail(task, error)
            event = news if event is None else event + news
        assert event is not None, "a chunk that samples has no sample"
        if chunk.draft:
            self.scheduler.speculation.learn(task, len(chunk.draft), num_accepted)
        return event, num_accepted

    def _say(self, task: Task, sample: SampledToken) -> TaskEvent:
        """Add a sampled token to its task, and end the task if that was the last one."""
        may_stop = task.num_output_tokens >= task.params.min_tokens
        task.token_ids.append(sample.token_id)
        self.num_output_tokens += 1
        self.statistics.token(task, time.perf_counter())
        detokenizer = self._detokenizers.get(task.task_id)
        if task.matcher is not None:
            task.matcher.advance(sample.token_id)
        text, finish = "", None
        if may_stop and sample.token_id in task.stop_ids:
            finish = task.finish(FinishReason.STOP, stop_token_id=sample.token_id)
        elif detokenizer is not None:
            text = detokenizer.feed(sample.token_id, may_stop)
            if detokenizer.stop is not None:
                finish = task.finish(FinishReason.STOP, stop=detokenizer.stop)
        if finish is None and task.matcher is not None and task.matcher.is_complete:
            ends = sample.token_id in task.matcher.end_ids
            finish = task.finish(FinishReason.STOP, stop_token_id=sample.token_id if ends else None)
        if finish is None and task.num_output_tokens >= task.max_tokens:
            finish = task.finish(FinishReason.LENGTH)
        is_first = task.num_output_tokens == 1
        event = TaskEvent(
            text=text,
            token_ids=(sample.token_id,),
            text_ends=(len(text),),
            logprobs=() if sample.logprob is None else (sample.logprob,),
            prompt_logprobs=tuple(task.prompt_logprobs) if is_first else (),
            num_cached_tokens=task.num_cached_tokens if is_first else None,
        )
        if is_first and task.tells_progress:
            event = _progress(task) + event
        return event if finish is None else event + self._end(task, finish)

    def _fail(self, task: Task, error: Exception) -> TaskEvent:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return self._end(task, task.finish(FinishReason.ERROR, message=message))

    def _end(self, task: Task, finish: Finish) -> TaskEvent:
        """Forget a task and return its terminal event, with the text that was held back."""
        detokenizer = self._detokenizers.pop(task.task_id, None)
        is_natural = finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
        status = TaskStatus.FINISHED if is_natural else TaskStatus.ABORTED
        self.scheduler.remove(task, status)
        del self._tasks[task.task_id]
        self.num_finished[finish.reason] += 1
        self.statistics.ended(task, finish, time.perf_counter())
        text = ""
        if detokenizer is not None and finish.reason is not FinishReason.ERROR:
            text = detokenizer.finish(cut_off=finish.reason is not FinishReason.STOP)
        return TaskEvent(text=text, finish=finish)

    def _check_ids(self, what: str, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            raise RefusedError(
                f"{what} has token id {wrong}, but the vocabulary ends at {self.vocab_size - 1}"
            )

    def check_idle(self) -> None:
        """Nothing is left of any task; cheap enough for production."""
        assert not self._tasks, f"tasks {list(self._tasks)} are known but not scheduled"
        assert not self._detokenizers, "detokenizers of no task"
        assert self.scheduler.kv.is_idle, "pages are lost"
        assert self.scheduler.speculation.is_idle, "guesses of no task"

    def check_invariants(self) -> None:
        """Every task is known to the scheduler, and its books are right."""
        self.scheduler.check_invariants()
        known = {task.task_id for task in self.scheduler.running + self.scheduler.waiting}
        assert known == self._tasks.keys(), f"scheduled {known}, known {self._tasks.keys()}"
        if not known:
            self.check_idle()


def _progress(task: Task) -> TaskEvent:
    return TaskEvent(
        num_cached_tokens=task.num_cached_tokens,
        num_computed_tokens=min(task.num_computed_tokens, task.num_prompt_tokens),
    )


def _speller(
    token_bytes: Callable[[int], bytes], control_texts: Sequence[tuple[int, str]]
) -> Callable[[int], bytes]:
    """The bytes of tokens, control tokens among them that are to be written out."""
    if not control_texts:
        return token_bytes
    written = {token_id: text.encode() for token_id, text in control_texts}

    def spell(token_id: int) -> bytes:
        return written[token_id] if token_id in written else token_bytes(token_id)

    return spell


def _page_budget(
    model: Transformer, dtype: torch.dtype, max_context: int, config: EngineConfig
) -> PageBudget:
    """Pages as asked for, or as the model and this machine's memory suggest."""
    if config.num_pages is not None:
        return PageBudget(num_pages=config.num_pages, why="as asked for")
    page_bytes = KVStorage.bytes_per_token(model.config, dtype) * config.page_size
    context_pages = -(-max_context // config.page_size)
    if config.kv_cache_gb is not None:
        affordable = int(config.kv_cache_gb * 1e9) // page_bytes
        why = "as asked for" if affordable >= context_pages else "one full context"
        return PageBudget(num_pages=max(affordable, context_pages), why=why)
    weights = [*model.parameters(), *model.buffers()]
    return choose_pages(
        page_bytes=page_bytes,
        context_pages=context_pages,
        page_size=config.page_size,
        max_running_tasks=config.max_running_tasks,
        weight_bytes=sum(weight.nbytes for weight in weights),
        available=available_memory() if model.device.type == "cpu" else None,
    )
