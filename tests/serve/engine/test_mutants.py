"""The harness finds what it is there to find: faults that are sown on purpose.

A mutant is a line of the engine that is changed in memory. The machine of `test_core.py` must fail
on each of them, or it would not have noticed such a fault in earnest.
"""

import inspect
import logging

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import HypothesisException
from hypothesis.stateful import run_state_machine_as_test

from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.detokenizer import StopMatcher
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.page_pool import PagePool
from astrai_serve.engine.prefix_cache import PrefixCache
from astrai_serve.engine.scheduler import InferenceScheduler

from .engine_machine import EngineMachine

OWNERS = {
    owner.__name__: owner
    for owner in (EngineCore, KVCache, PagePool, PrefixCache, InferenceScheduler, StopMatcher)
}

# what goes wrong: where, the line as it is, the line as it is sown
MUTANTS = {
    "a hit leaves nothing to compute": (
        KVCache.task_alloc,
        "chain[: (task.num_tokens - 1) // self.page_size]",
        "chain[: task.num_tokens // self.page_size]",
    ),
    "a page is findable before it is computed": (
        KVCache.task_alloc,
        "        return Admission.ADMITTED",
        "        for page, digest in zip(table[len(hits) :], chain[len(hits) :]):\n"
        "            self.prefix.record(page, digest)\n"
        "        self._num_recorded[task.task_id] = len(chain)\n"
        "        return Admission.ADMITTED",
    ),
    "a page that is half full is findable": (
        KVCache.task_record,
        "num_full = task.num_computed_tokens // self.page_size",
        "num_full = min(-(-task.num_computed_tokens // self.page_size), len(self._chain(task)))",
    ),
    "a page is freed twice": (
        KVCache.task_free,
        "reversed(self._tables.pop(task.task_id))",
        "reversed((t := self._tables.pop(task.task_id)) + t[:1])",
    ),
    "salt is ignored": (
        PrefixCache.extend_chain,
        "blake2b(salt.encode(), digest_size=DIGEST_SIZE)",
        "blake2b(b'', digest_size=DIGEST_SIZE)",
    ),
    "a digest forgets what came before its page": (
        PrefixCache.extend_chain,
        "blake2b(parent + tokens,",
        "blake2b(tokens + salt.encode(),",
    ),
    "who is sent back believes it was computed": (
        KVCache.task_free,
        "task.num_computed_tokens = 0",
        "pass",
    ),
    "what was cached is counted one token too long": (
        KVCache.task_alloc,
        "task.num_computed_tokens = len(hits) * self.page_size",
        "task.num_computed_tokens = len(hits) * self.page_size + bool(hits)",
    ),
    "pages are in the wrong order": (
        KVCache.task_alloc,
        "table = hits + self.pool.allocate(num_new, after=hits[-1] if hits else None)",
        "table = self.pool.allocate(num_new, after=hits[-1] if hits else None) + hits",
    ),
    "the last page is used by two": (
        KVCache.task_alloc,
        "hits = self.prefix.lookup(sharable)",
        "hits = self.prefix.lookup(chain)[: len(sharable) + 1]",
    ),
    "cancelling before the end of the prompt leaks": (
        KVCache.task_forget,
        "if task.task_id in self._tables:",
        "if task.task_id in self._tables and task.num_output_tokens:",
    ),
    "cancelling leaks one page": (
        KVCache.task_free,
        "reversed(self._tables.pop(task.task_id))",
        "reversed(self._tables.pop(task.task_id)[:-1])",
    ),
    "cached pages are counted free and held as well": (
        KVCache.task_alloc,
        "self.pool.num_free - num_revived",
        "self.pool.num_free",
    ),
    "a cached page is held and can still be given away": (
        PagePool.share,
        "            self._unlink(page)",
        "            pass",
    ),
    "a page that is given away is still findable": (
        PagePool._evict_oldest,
        "self._on_evict(page)",
        "pass",
    ),
    "the last holder is not waited for": (
        PagePool.release,
        "        if self._refs[page]:\n            return\n",
        "",
    ),
    "pages wait for one that was cancelled": (
        KVCache.task_free,
        "            if self._filling.get(digest) == task.task_id:\n"
        "                del self._filling[digest]",
        "            pass",
    ),
    "changed weights leave the prefixes": (
        EngineCore.drop_computed,
        "self.scheduler.kv.clear_prefixes()",
        "pass",
    ),
    "changed weights leave the running tasks": (
        EngineCore.drop_computed,
        "self.scheduler.preempt_all()\n        self.scheduler.kv.clear_prefixes()",
        "self.scheduler.kv.pool.drop_cached()",
    ),
    "the oldest is sent back": (
        InferenceScheduler._preempt_latest,
        "self.running.pop()",
        "self.running.pop(0)",
    ),
    "who is sent back waits behind all": (
        InferenceScheduler._preempt_latest,
        "insort(self.waiting, task, key=",
        "(lambda tasks, last, key: tasks.append(last))(self.waiting, task, key=",
    ),
    "who is sent back keeps its pages": (
        InferenceScheduler._preempt_latest,
        "self.kv.task_free(task)",
        "pass",
    ),
    "others come in while someone is sent back": (
        InferenceScheduler.schedule,
        "if self.num_preemptions == num_preemptions:",
        "if True:",
    ),
    "half a prompt is answered": (
        InferenceScheduler._chunk,
        "samples=length == task.num_missing_tokens",
        "samples=length >= task.num_missing_tokens - 1",
    ),
    "a chunk begins a token late": (
        InferenceScheduler._chunk,
        "start=task.num_computed_tokens,",
        "start=min(task.num_computed_tokens + 1, task.num_tokens - 1),",
    ),
    "a step takes more tokens than it may": (
        InferenceScheduler.schedule,
        "budget = self.max_step_tokens - num_decoding",
        "budget = self.max_step_tokens",
    ),
    "a decoding task is not given its page": (
        InferenceScheduler._extend,
        "while not self.kv.task_extend(task):",
        "while False:",
    ),
    "a failed row's pages are prefixes": (
        EngineCore.step,
        "[c for c, s in pairs if not (s and isinstance(s[0], Exception))]",
        "[c for c, s in pairs]",
    ),
    "a broken step's pages are prefixes": (
        EngineCore.step,
        "        logger.exception(\"a step of %d tasks failed\", len(chunks))",
        "        self.scheduler.complete(chunks)",
    ),
    "the end is told twice": (
        EngineCore.step,
        "events.append((chunk.task.task_id, event))\n        self",
        "events += [(chunk.task.task_id, event)] * (2 if event.finish else 1)\n        self",
    ),
    "a failure is not told": (
        EngineCore.step,
        "events.append((chunk.task.task_id, event))\n        self",
        "if not (event.finish and event.finish.reason == 'error'):\n"
        "                events.append((chunk.task.task_id, event))\n        self",
    ),
    "cancelling what is over is told again": (
        EngineCore._end,
        "del self._tasks[task.task_id]",
        "pass",
    ),
    "samples of one request are the same": (
        EngineCore.new_task,
        "sample_index=sample_index,",
        "sample_index=0,",
    ),
    "a salt is lost on the way": (
        EngineCore.new_task,
        "cache_salt=cache_salt,",
        "cache_salt='' if sample_index else cache_salt,",
    ),
    "one token too many": (
        EngineCore._say,
        "task.num_output_tokens >= task.max_tokens",
        "task.num_output_tokens > task.max_tokens",
    ),
    "min_tokens is one too few": (
        EngineCore._say,
        "may_stop = task.num_output_tokens >= task.params.min_tokens",
        "may_stop = task.num_output_tokens + 1 >= task.params.min_tokens",
    ),
    "a stop token is passed over": (
        EngineCore._say,
        "if may_stop and sample.token_id in task.stop_ids:",
        "if may_stop and sample.token_id in self.model_stop_ids:",
    ),
    "text that was held back is lost": (
        EngineCore._end,
        "text = detokenizer.finish(cut_off=finish.reason is not FinishReason.STOP)",
        "pass",
    ),
    "a stop string is shown in part": (
        StopMatcher._num_held,
        "len(stop) > length and stop.startswith(end)",
        "len(stop) > length + 1 and stop.startswith(end)",
    ),
    "a stop string in two pieces is missed": (
        StopMatcher.feed,
        "text, self._held = self._held + text, \"\"",
        "self._held = \"\"",
    ),
    "stop strings of other tasks count": (
        EngineCore.add,
        "task.params.stop)",
        "task.params.stop or ('ab',))",
    ),
    "log-probabilities of a prompt from cached pages": (
        KVCache.task_alloc,
        "if task.wants_prompt_logprobs:",
        "if False:",
    ),
    "a guess too many is accepted": (
        EngineCore._advance,
        "zip(sampled, (*chunk.draft, None), strict=True):",
        "zip(sampled, (*(s.token_id for s in sampled[:1]), *chunk.draft[1:], None), strict=False):",
    ),
    "a guess is not checked": (
        EngineCore._advance,
        "event.finish is not None or sample.token_id != guess",
        "event.finish is not None or guess is None",
    ),
    "an answer goes on behind its end with guesses": (
        EngineCore._advance,
        "event.finish is not None or sample.token_id != guess",
        "sample.token_id != guess",
    ),
    "guesses are findable before they are judged": (
        InferenceScheduler.complete,
        "chunk.start + chunk.num_known",
        "chunk.start + chunk.length",
    ),
    "pages of wrong guesses are prefixes": (
        EngineCore._advance,
        "                    break",
        "                    if guess is not None and event.finish is None:\n"
        "                        self.scheduler.accept(task)\n"
        "                        task.num_computed_tokens -= 1\n"
        "                    break",
    ),
    "a right guess is not counted as computed": (
        InferenceScheduler.accept,
        "        task.num_computed_tokens += 1\n",
        "",
    ),
    "guesses go past the end": (
        InferenceScheduler._with_draft,
        "limit = min(most, room, self.max_chunk_tokens - 1)",
        "limit = min(most, room + 1, self.max_chunk_tokens - 1)",
    ),
    "guesses get no page": (
        InferenceScheduler._with_draft,
        "        if draft and not self.kv.task_extend(task, len(draft)):\n"
        "            num_slots = len(chunk.page_table) * self.kv.page_size\n"
        "            draft = draft[: num_slots - task.num_tokens]\n",
        "",
    ),
    "guesses of tasks that have ended are kept": (
        InferenceScheduler.remove,
        "        self.speculation.forget(task)\n",
        "",
    ),
    "a task that cannot fit is taken": (
        EngineCore.new_task,
        "room = self.max_context - len(prompt_ids)",
        "room = self.max_context + 1 - len(prompt_ids)",
    ),
}  # fmt: skip
QUICK = (
    "a page is findable before it is computed",
    "who is sent back waits behind all",
    "the end is told twice",
    "a guess too many is accepted",
    "pages of wrong guesses are prefixes",
)


def sow(monkeypatch, function, line, sown):
    """Replace a piece of a method's source; the piece must be there exactly once."""
    source = inspect.getsource(function)
    pieces = source.count(line)
    assert pieces == 1, f"{function.__qualname__} has {line!r} {pieces} times: sow it elsewhere"
    owner, made = function.__qualname__.split(".")[0], {}
    source = f"class {owner}:\n{source.replace(line, sown)}"
    exec(compile(source, "mutant", "exec"), function.__globals__, made)
    monkeypatch.setattr(OWNERS[owner], function.__name__, made[owner].__dict__[function.__name__])


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS],
)
def test_the_harness_finds(name, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, "astrai_serve.engine.core")
    sow(monkeypatch, *MUTANTS[name])
    with pytest.raises(Exception) as found:  # noqa: PT011 - whichever check is the first to see it
        run_state_machine_as_test(
            EngineMachine,
            settings=settings(
                max_examples=1000,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],  # found is enough; the smallest example is not wanted
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    # a mutant that does not even run would prove nothing
    assert not isinstance(
        found.value, NameError | AttributeError | TypeError | SyntaxError | HypothesisException
    ), f"{found.value!r}"
