"""The whole bookkeeping under random use: what may happen, and what must hold after each act."""

from collections import Counter
from itertools import combinations
from typing import ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from astrai_core.generation import FinishReason, SamplingParams
from astrai_serve.engine import RefusedError
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import InferenceScheduler
from astrai_serve.engine.speculation import Speculation
from astrai_serve.engine.task import TaskStatus

from .paged_hash import (
    EOS,
    VOCAB,
    PagedHash,
    choose,
    hashed,
    may_end,
    opinion,
    spell,
    values_of,
)

# the commonest first
STAGES = ("over", "decode", "queued", "prefill", "sent back", "back again")


def stage_of(task):
    """Where a task stands, in more detail than the engine needs."""
    if task.status in (TaskStatus.FINISHED, TaskStatus.ABORTED):
        return "over"
    if task.status is TaskStatus.PENDING:
        return "sent back" if task.num_preemptions else "queued"
    if task.num_preemptions:
        return "back again"
    return "decode" if task.num_output_tokens else "prefill"


class Prophecy(Speculation):
    """Guesses what the fake model will say, with errors now and then: both are rare by chance."""

    def __init__(self, machine, num_tokens, share_right):
        super().__init__(num_tokens)
        self.machine, self.share_right = machine, share_right

    def propose(self, task, limit):
        if limit < 1:
            return []
        super().propose(task, limit)  # whatever it says, it must not break
        draft, machine = [], self.machine
        for n in range(limit):
            context = [*task.token_ids, *draft]
            values = values_of(machine.model.weights, context)
            draft.append(choose(values, machine.draws[task.task_id], may_end(task, n)))
            if hashed(b"".join(values), "error")[0] >= 256 * self.share_right:
                draft[-1] = (draft[-1] + 1) % VOCAB
        return draft


class EngineMachine(RuleBasedStateMachine):
    """Tasks come and go, steps fail, weights change; after each act the books must be right."""

    seen: ClassVar[Counter[str]] = Counter()
    """What happened in all runs together, so that a test can tell that everything did."""

    @initialize(
        num_pages=st.integers(2, 16) | st.integers(17, 80),
        page_size=st.sampled_from([1, 2, 3, 4, 8]),
        max_context=st.sampled_from([24, 24, 40]),
        max_running=st.integers(1, 6),
        spare_tokens=st.integers(0, 9) | st.just(40),
        max_chunk=st.none() | st.integers(1, 7),
        headroom=st.integers(0, 2),
        caching=st.booleans() | st.just(True),
        num_guesses=st.sampled_from([0, 3, 7]),
        prophecy=st.sampled_from([None, 1.0, 0.8]),
    )
    def build(
        self, num_pages, page_size, max_context, max_running, spare_tokens, max_chunk, headroom,
        caching, num_guesses, prophecy,
    ):  # fmt: skip
        speculation = Speculation(num_guesses)
        if prophecy is not None:
            speculation = Prophecy(self, num_guesses, prophecy)
        scheduler = InferenceScheduler(
            KVCache(num_pages, page_size, caching),
            max_running_tasks=max_running,
            max_step_tokens=max_running + spare_tokens,
            max_chunk_tokens=max_chunk,
            headroom_pages=headroom,
            speculation=speculation,
        )
        self.model = PagedHash(scheduler.kv)
        self.core = EngineCore(
            scheduler,
            self.model,
            vocab_size=VOCAB,
            max_context=max_context,
            model_stop_ids=frozenset({EOS}),
            token_bytes=self.token_bytes,
        )
        self.tasks = []
        self.events = {}
        self.wanted = {}
        self.draws = {}
        self.spoilt = False  # the next token cannot be spelled
        self.num_guesses = self.num_right = 0

    def token_bytes(self, token_id):
        if self.spoilt:
            self.spoilt = False
            raise LookupError("unspellable on purpose")
        return spell(token_id)

    @rule(
        stem=st.sampled_from([(), (0, 1, 2, 3, 4, 0, 1, 2, 3), (0, 1, 2, 3), (4, 4, 4, 4, 4, 4)]),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=9),
        num_samples=st.sampled_from([1, 1, 2, 3, 5]),
        seed=st.integers(0, 2),
        max_tokens=st.none() | st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        stop=st.sampled_from([(), (), ("ab",), ("c", "dd"), ("aba", "bb")]),
        stop_token_ids=st.sampled_from([(), (), (3,)]),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        salt=st.sampled_from(["", "", "other"]),
    )
    def submit(self, stem, tail, salt, num_samples, max_tokens, min_tokens, **params):
        prompt, most = (*stem, *tail), self.core.max_context
        if max_tokens is not None:
            min_tokens = min(min_tokens, max_tokens)
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, **params)
        try:
            for sample_index in range(num_samples):
                self.add(prompt, params, salt, sample_index)
        except RefusedError as error:
            note(f"refused: {error}")
            assert not prompt or len(prompt) + (max_tokens or 1) > most
            self.seen["refused"] += 1

    def add(self, prompt, params, salt, sample_index=0):
        task_id = len(self.tasks)
        task = self.core.new_task(
            task_id, prompt, params, cache_salt=salt, sample_index=sample_index
        )
        assert len(prompt) + task.max_tokens <= self.core.max_context
        self.tasks.append(task)
        self.events[task_id] = []
        self.wanted[task_id] = list(prompt)
        self.draws[task_id] = (params.seed, sample_index)
        self.model.salts[task_id] = salt
        self.core.add(task)

    @rule(number=st.integers(0, 30), more=st.integers(0, 2), seed=st.integers(0, 2))
    def submit_like(self, number, more, seed):
        """The prompt, and maybe the answer, of an earlier task again, as a chat goes on."""
        if not self.tasks:
            return
        task = self.tasks[number % len(self.tasks)]
        prompt = tuple(self.wanted[task.task_id]) if more else task.prompt_ids
        if len(prompt) < self.core.max_context:
            self.add(prompt, SamplingParams(ignore_eos=True, seed=seed), task.cache_salt)

    @precondition(lambda self: self.core.has_tasks)
    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            if self.core.has_tasks:
                self.step()
                self.check_books()

    @precondition(lambda self: self.tasks)
    @rule(rarity=st.integers(0, 5), number=st.integers(0, 30))
    def cancel(self, rarity, number):
        stages = sorted({stage_of(task) for task in self.tasks}, key=STAGES.index)
        stage = stages[min(rarity, len(stages) - 1)]
        tasks = [task for task in self.tasks if stage_of(task) == stage]
        self.seen[f"cancelled while {stage}"] += 1
        task = tasks[number % len(tasks)]
        news = self.core.cancel(task.task_id)
        assert len(news) == (0 if stage == "over" else 1)
        reasons = [event.finish and event.finish.reason for _, event in news]
        assert set(reasons) <= {FinishReason.CANCELLED}
        self.take(news)

    @rule(what=st.integers(0, 9))
    def misfortune(self, what):
        """Now and then a step, a row or a token breaks, or the weights change."""
        if what == 6:
            self.model.spoils = True
        elif what == 7:
            self.model.breaks = True
        elif what == 8:
            self.spoilt = True
        elif what == 9:
            self.model.weights += 1
            self.core.drop_computed()
            self.seen["changed weights"] += 1

    def step(self):
        scheduler = self.core.scheduler
        running = list(scheduler.running)
        num_preemptions = scheduler.num_preemptions
        before = [task.num_preemptions for task in running]
        num_spoilt, breaks = self.spoilt + self.model.spoils, self.model.breaks
        self.model.chunks = []
        news = self.core.step()
        chunks = self.model.chunks
        assert not self.model.complaints, self.model.complaints
        assert chunks, "there are tasks and nothing is computed"
        assert sum(chunk.length for chunk in chunks) <= scheduler.max_step_tokens
        assert max(chunk.length for chunk in chunks) <= scheduler.max_chunk_tokens
        computed = [chunk.task for chunk in chunks]
        assert len({task.task_id for task in computed}) == len(computed), "twice in a step"
        if running:
            assert running[0].num_preemptions == before[0], "the oldest task was sent back"
            assert running[0] in computed, "the oldest task was passed over"
        if scheduler.num_preemptions > num_preemptions:
            assert set(computed) <= set(running), "someone came in while others were sent back"
            self.seen["sent back"] += 1
        failed = [event for _, event in news if event.finish and event.finish.reason == "error"]
        if breaks:
            assert len(failed) == len(chunks)
            assert not self.model.breaks, "the step did not reach the model"
        else:
            assert len(failed) <= num_spoilt, "more than the one task failed"
        self.seen["failed"] += len(failed)
        self.seen["cut prompts"] += sum(not chunk.samples for chunk in chunks)
        self.check_guesses(news)
        self.take(news)

    def check_guesses(self, news):
        """Those that give a token more, and those that are for nothing."""
        said = {task_id: len(event.token_ids) for task_id, event in news}
        speculation = self.core.scheduler.speculation
        drafts = [chunk for chunk in self.model.chunks if chunk.draft]
        self.num_guesses += sum(len(chunk.draft) for chunk in drafts)
        assert len(self.model.chunks) == 1 or sum(len(c.draft) for c in drafts) <= (
            speculation.num_tokens
        )
        for chunk in drafts:
            assert chunk.samples, "guesses in the middle of a prompt"
            end = chunk.start + chunk.length
            assert end <= chunk.task.max_computed_tokens, "guesses behind the end"
            is_over = chunk.task.status in (TaskStatus.FINISHED, TaskStatus.ABORTED)
            num_right = max(said[chunk.task.task_id] - 1, 0)
            self.num_right += num_right
            self.seen["a draft right"] += num_right == len(chunk.draft)
            self.seen["a draft partly right"] += 0 < num_right < len(chunk.draft)
            self.seen["a draft wrong"] += not num_right and not is_over
            self.seen["an end inside a draft"] += is_over and num_right < len(chunk.draft)
            if is_over:
                continue
            wanted = chunk.start + 1 + num_right
            assert chunk.task.num_computed_tokens == wanted, "guesses are counted as computed"
            assert chunk.task.num_missing_tokens == 1
            kv = self.core.scheduler.kv
            num_recorded = kv._num_recorded[chunk.task.task_id]
            assert num_recorded * kv.page_size <= wanted, "a page of a wrong guess is a prefix"

    def is_over(self, task_id):
        return any(event.finish for event in self.events[task_id])

    def take(self, news):
        for task_id, event in news:
            assert not self.is_over(task_id), "an event after the last one"
            task, context = self.tasks[task_id], self.wanted[task_id]
            values = values_of(self.model.weights, context) if event.token_ids else []
            for number, token_id in enumerate(event.token_ids):
                is_allowed = len(context) - len(task.prompt_ids) >= task.params.min_tokens
                wanted = choose(values, self.draws[task_id], is_allowed)
                assert token_id == wanted, f"task {task_id} says what the model does not"
                if task.params.logprobs is not None:
                    assert event.logprobs[number].logprob == opinion(values, token_id)
                context.append(token_id)
                values = values_of(self.model.weights, context)
            assert len(event.logprobs) == len(
                event.token_ids if task.params.logprobs is not None else ()
            )
            self.events[task_id].append(event)
            if event.finish:
                self.check_end(task, event.finish)

    def check_end(self, task, finish):
        """The text and the reason, told from the tokens alone."""
        events = self.events[task.task_id]
        output = [i for event in events for i in event.token_ids]
        text = "".join(event.text for event in events)
        whole = b"".join(map(spell, output)).decode()
        self.seen[f"ended by {finish.reason}"] += 1
        self.check_no_earlier_end(task, output)
        if finish.reason is FinishReason.STOP and finish.stop is None:
            assert output[-1] in task.stop_ids
            assert len(output) > task.params.min_tokens, "it stopped too soon"
            whole = b"".join(map(spell, output[:-1])).decode()
        elif finish.stop is not None:
            assert finish.stop in task.params.stop
            assert len(output) > task.params.min_tokens, "it stopped too soon"
            assert whole.endswith(finish.stop)
            whole = whole.removesuffix(finish.stop)
            self.seen["stop strings"] += 1
        elif finish.reason is FinishReason.LENGTH:
            assert len(output) == task.max_tokens
        if finish.reason is not FinishReason.ERROR:
            assert text == whole
        else:
            assert whole.startswith(text)
        assert len(output) <= task.max_tokens
        assert finish.num_prompt_tokens == len(task.prompt_ids)
        assert finish.num_cached_tokens < finish.num_prompt_tokens
        self.seen["prefix hits"] += finish.num_cached_tokens > 0
        self.check_prompt_opinions(task, events)

    def check_no_earlier_end(self, task, output):
        """No token but the last one was a stop token or completed a stop string."""
        said = ""
        for number, token_id in enumerate(output[:-1]):
            new = spell(token_id).decode()
            said += new
            if number >= task.params.min_tokens:
                assert token_id not in task.stop_ids, "it went on behind a stop token"
                assert not (new and said.endswith(task.params.stop)), "it missed a stop string"

    def check_prompt_opinions(self, task, events):
        told = [one for event in events for one in event.prompt_logprobs]
        if task.params.prompt_logprobs is None or not any(event.token_ids for event in events):
            assert not told
            return
        assert [one.token_id for one in told] == list(task.prompt_ids[1:])
        if not self.model.weights:  # else some may be the opinion of the weights before
            values = values_of(self.model.weights, task.prompt_ids)
            for place, one in enumerate(told):
                assert one.logprob == opinion(values[: place + 1], one.token_id)
        self.seen["prompt logprobs"] += 1

    @invariant()
    def books_are_right(self):
        if hasattr(self, "core"):
            self.check_books()

    def check_books(self):
        """The engine's own invariants, and what it does not know of itself."""
        self.core.check_invariants()
        scheduler, kv = self.core.scheduler, self.core.scheduler.kv
        scheduled = {task.task_id for task in scheduler.running + scheduler.waiting}
        assert scheduled == {t.task_id for t in self.tasks if not self.is_over(t.task_id)}
        for page in range(kv.pool.num_pages):
            if kv.prefix.has_page(page):
                self.model.check_findable(page)
        for one, other in combinations(scheduler.running, 2):
            if set(kv.page_table(one)) & set(kv.page_table(other)):
                salts = [self.model.salts[task.task_id] for task in (one, other)]
                assert salts[0] == salts[1], "strangers share pages"
                self.seen["samples that share pages"] += one.sample_index != other.sample_index

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(4000):
            if not self.core.has_tasks:
                break
            self.step()
            self.check_books()
        assert not self.core.has_tasks, "the tasks do not come to an end"
        assert all(self.is_over(task.task_id) for task in self.tasks)
        self.core.check_idle()
        assert sum(self.core.num_finished.values()) == len(self.tasks)
