"""The whole bookkeeping under random use, with a model that notices every wrong page.

The fake model keeps one value a slot, as a real one keeps keys and values: a value is a hash of its
token and of everything before it as the pages had it, and a sampled token is a hash of all values
read back. A page lost, overwritten, stale or taken from another prompt changes the answer.
"""

from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from astrai_core.generation import FinishReason, SamplingParams
from astrai_serve.engine import RefusedError
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import InferenceScheduler
from astrai_serve.engine.task import SampledToken

VOCAB = 6
EOS = 5
LETTERS = "abcde\0"


def spell(token_id):
    return b"" if token_id == EOS else LETTERS[token_id].encode()


def hashed(*parts):
    return blake2b(repr(parts).encode(), digest_size=8).digest()


def next_token(weights, token_ids, allow_eos):
    """What the model says after these tokens, worked out without any page."""
    values = []
    for token_id in token_ids:
        values.append(hashed(weights, b"".join(values), token_id))
    return choose(values, allow_eos)


def choose(values, allow_eos):
    return int.from_bytes(hashed(b"".join(values))) % (VOCAB if allow_eos else EOS)


def may_end(task):
    return task.num_output_tokens >= task.params.min_tokens


class PagedHash:
    """The fake model over its slots."""

    def __init__(self, kv):
        self.kv = kv
        self.slots = [(b"never written", "")] * (kv.pool.num_pages * kv.page_size)
        self.weights = 0
        self.chunks = []
        self.breaks = False

    def execute(self, chunks):
        self.chunks = chunks
        histories = [self.read(chunk, chunk.start) for chunk in chunks]
        for chunk, history in zip(chunks, histories, strict=True):
            for position in range(chunk.start, chunk.start + chunk.length):
                slot = self.slot(chunk, position)
                assert self.kv.pool.ref_count(slot // self.kv.page_size) == 1, "a shared page"
                token_id = chunk.task.token_ids[position]
                history.append(hashed(self.weights, b"".join(history), token_id))
                self.slots[slot] = (history[-1], chunk.task.cache_salt)
        if self.breaks:  # with the pages written already, as a real failure would leave them
            self.breaks = False
            raise ArithmeticError("broken on purpose")
        for chunk, history in zip(chunks, histories, strict=True):
            assert self.read(chunk, chunk.start + chunk.length) == history, "overwritten"
        return [
            SampledToken(choose(history, may_end(chunk.task))) if chunk.samples else None
            for chunk, history in zip(chunks, histories, strict=True)
        ]

    def slot(self, chunk, position):
        size = self.kv.page_size
        return chunk.page_table[position // size] * size + position % size

    def read(self, chunk, num_tokens):
        content = [self.slots[self.slot(chunk, position)] for position in range(num_tokens)]
        assert all(salt == chunk.task.cache_salt for _, salt in content), "of another salt"
        return [value for value, _ in content]


class EngineMachine(RuleBasedStateMachine):
    """Tasks come and go, steps fail, weights change; after each act the books must be right."""

    @initialize(
        num_pages=st.integers(2, 9),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 5),
        spare_tokens=st.integers(0, 9),
        max_chunk=st.none() | st.integers(1, 7),
        headroom=st.integers(0, 2),
        caching=st.booleans() | st.just(True),
    )
    def build(self, num_pages, page_size, max_running, spare_tokens, max_chunk, headroom, caching):
        scheduler = InferenceScheduler(
            KVCache(num_pages, page_size, caching),
            max_running_tasks=max_running,
            max_step_tokens=max_running + spare_tokens,
            max_chunk_tokens=max_chunk,
            headroom_pages=headroom,
        )
        self.model = PagedHash(scheduler.kv)
        self.core = EngineCore(
            scheduler,
            self.model,
            vocab_size=VOCAB,
            max_context=24,
            model_stop_ids=frozenset({EOS}),
            token_bytes=self.token_bytes,
        )
        self.tasks = []
        self.events = {}
        self.wanted = {}
        self.spoilt = False  # the next token cannot be spelled

    def token_bytes(self, token_id):
        if self.spoilt:
            self.spoilt = False
            raise LookupError("unspellable on purpose")
        return spell(token_id)

    @rule(
        stem=st.sampled_from([(), (0, 1, 2, 3, 4, 0, 1, 2, 3), (0, 1, 2, 3), (4, 4, 4, 4, 4, 4)]),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=9),
        max_tokens=st.none() | st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        stop=st.sampled_from([(), (), ("ab",), ("c", "dd"), ("aba", "bb")]),
        stop_token_ids=st.sampled_from([(), (), (3,)]),
        ignore_eos=st.booleans(),
        salt=st.sampled_from(["", "", "other"]),
    )
    def submit(self, stem, tail, salt, max_tokens, min_tokens, **params):
        prompt, most = (*stem, *tail), self.core.max_context
        if max_tokens is not None:
            min_tokens = min(min_tokens, max_tokens)
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, **params)
        try:
            self.add(prompt, params, salt)
        except RefusedError as error:
            note(f"refused: {error}")
            assert not prompt or len(prompt) + (max_tokens or 1) > most

    def add(self, prompt, params, salt):
        task_id = len(self.tasks)
        task = self.core.new_task(task_id, prompt, params, cache_salt=salt)
        assert len(prompt) + task.max_tokens <= self.core.max_context
        self.tasks.append(task)
        self.events[task_id] = []
        self.wanted[task_id] = list(prompt)
        self.core.add(task)

    @rule(number=st.integers(0, 30), more=st.integers(0, 2))
    def submit_like(self, number, more):
        """The prompt, and maybe the answer, of an earlier task again, as a chat goes on."""
        if not self.tasks:
            return
        task = self.tasks[number % len(self.tasks)]
        prompt = tuple(self.wanted[task.task_id]) if more else task.prompt_ids
        if len(prompt) < self.core.max_context:
            self.add(prompt, SamplingParams(ignore_eos=True), task.cache_salt)

    @precondition(lambda self: self.core.has_tasks)
    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            if self.core.has_tasks:
                self.step()
                self.core.check_invariants()

    @rule(number=st.integers(0, 30))
    def cancel(self, number):
        if self.tasks:
            task_id = number % len(self.tasks)
            is_over = self.is_over(task_id)
            news = self.core.cancel(task_id)
            assert len(news) == (0 if is_over else 1)
            self.take(news)

    @rule(what=st.integers(0, 9))
    def misfortune(self, what):
        """Now and then a step breaks, a token cannot be spelled, or the weights change."""
        if what == 7:
            self.model.breaks = True
        elif what == 8:
            self.spoilt = True
        elif what == 9:
            self.model.weights += 1
            self.core.drop_computed()

    def step(self):
        scheduler = self.core.scheduler
        running = list(scheduler.running)
        num_preemptions = scheduler.num_preemptions
        before = [task.num_preemptions for task in running]
        spoils, breaks = self.spoilt, self.model.breaks
        self.model.chunks = []
        news = self.core.step()
        chunks = self.model.chunks
        assert chunks, "there are tasks and nothing is computed"
        assert sum(chunk.length for chunk in chunks) <= scheduler.max_step_tokens
        assert max(chunk.length for chunk in chunks) <= scheduler.max_chunk_tokens
        computed = [chunk.task for chunk in chunks]
        if running:
            assert running[0].num_preemptions == before[0], "the oldest task was sent back"
            assert running[0] in computed, "the oldest task was passed over"
        if scheduler.num_preemptions > num_preemptions:
            assert set(computed) <= set(running), "someone came in while others were sent back"
        failed = [event for _, event in news if event.finish and event.finish.reason == "error"]
        if breaks:
            assert len(failed) == len(chunks)
        else:
            assert len(failed) <= spoils, "more than the one task failed"
        self.take(news)

    def is_over(self, task_id):
        return any(event.finish for event in self.events[task_id])

    def take(self, news):
        for task_id, event in news:
            assert not self.is_over(task_id), "an event after the last one"
            task, context = self.tasks[task_id], self.wanted[task_id]
            for token_id in event.token_ids:
                allow = len(context) - len(task.prompt_ids) >= task.params.min_tokens
                assert token_id == next_token(self.model.weights, context, allow)
                context.append(token_id)
            self.events[task_id].append(event)
            if event.finish:
                self.check_end(task, event.finish)

    def check_end(self, task, finish):
        """The text and the reason, told from the tokens alone."""
        output = [i for event in self.events[task.task_id] for i in event.token_ids]
        text = "".join(event.text for event in self.events[task.task_id])
        whole = b"".join(map(spell, output)).decode()
        assert task.stop_ids.isdisjoint(output[task.params.min_tokens : -1]), "it went on"
        if finish.reason is FinishReason.STOP and finish.stop is None:
            assert output[-1] in task.stop_ids
            whole = b"".join(map(spell, output[:-1])).decode()
        elif finish.stop is not None:
            assert whole.endswith(finish.stop)
            whole = whole.removesuffix(finish.stop)
        elif finish.reason is FinishReason.LENGTH:
            assert len(output) == task.max_tokens
        if finish.reason is not FinishReason.ERROR:
            assert text == whole
        else:
            assert whole.startswith(text)
        assert finish.num_prompt_tokens == len(task.prompt_ids)
        assert finish.num_cached_tokens < finish.num_prompt_tokens

    @invariant()
    def books_are_right(self):
        if hasattr(self, "core"):
            self.core.check_invariants()

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(2000):
            if not self.core.has_tasks:
                break
            self.step()
            self.core.check_invariants()
        assert not self.core.has_tasks, "the tasks do not come to an end"
        assert all(self.is_over(task.task_id) for task in self.tasks)
        self.core.check_idle()
        assert sum(self.core.num_finished.values()) == len(self.tasks)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.slow
class TestEngineAtLength(EngineMachine.TestCase):
    settings = settings(
        max_examples=3000, stateful_step_count=80, deadline=None, database=None, print_blob=True
    )
