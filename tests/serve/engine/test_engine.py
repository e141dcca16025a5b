"""The engine's thread, with a model that counts."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astrai_core.generation import SamplingParams, Structure
from astrai_serve.engine import (
    EngineClosedError,
    EngineConfig,
    InferenceEngine,
    QueueFullError,
    RefusedError,
)
from astrai_serve.engine import engine as engine_module
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import InferenceScheduler
from astrai_serve.engine.task import GenerationFailedError, SampledToken


class Counting:
    """Says the next number; breaks on 13; stands still while `go` is clear."""

    def __init__(self):
        self.go, self.stands = threading.Event(), threading.Event()
        self.go.set()

    def execute(self, chunks):
        if not self.go.is_set():
            self.stands.set()
            assert self.go.wait(20)
        if any(13 in chunk.task.prompt_ids for chunk in chunks):
            raise ArithmeticError("thirteen")
        return [
            [SampledToken((chunk.task.token_ids[-1] + 1) % 100)] if chunk.samples else []
            for chunk in chunks
        ]


@pytest.fixture
def engine():
    config = EngineConfig(max_running_tasks=2, max_queued_tasks=1, stall_seconds=0.2)
    scheduler = InferenceScheduler(KVCache(32, 4), max_running_tasks=2, max_step_tokens=64)
    counting = Counting()
    core = EngineCore(scheduler, counting, vocab_size=100, max_context=128)
    engine = InferenceEngine(None, None, config, core=core)
    engine.counting, engine.core = counting, core  # pyright: ignore[reportAttributeAccessIssue]
    yield engine
    counting.go.set()
    engine.close()


def few(n=3, **more):
    return SamplingParams(max_tokens=n, **more)


def wait(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def test_generate_waits_for_all_however_many(engine):
    done = engine.generate([[n] for n in range(8)], few())
    assert [c.token_ids for c in done] == [(n + 1, n + 2, n + 3) for n in range(8)]


def test_an_idle_engine_is_at_rest(engine):
    engine.generate([[1]], few())
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_cancelling_frees_the_pages_within_a_step(engine):
    engine.counting.go.clear()
    stream = engine.submit([1, 2, 3], few(100))
    assert engine.counting.stands.wait(10)
    stream.cancel()
    steps = engine.stats()["num_steps"]
    engine.counting.go.set()
    events = list(stream)
    wait(lambda: engine.stats()["kv_cache_usage"] == 0)
    assert [event.finish.reason for event in events if event.finish] == ["cancelled"]
    assert engine.stats()["num_steps"] <= steps + 1


def test_closing_ends_every_stream_once(engine):
    engine.counting.go.clear()
    streams = [engine.submit([n], few(50)) for n in range(3)]
    assert engine.counting.stands.wait(10)
    engine.close(timeout=0.01)
    for stream in streams:
        events = list(stream)
        assert [event.finish is not None for event in events].count(True) == 1
        assert events[-1].finish is not None
        assert events[-1].finish.reason == "cancelled"
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit([1], few())
    assert not engine.healthy


def test_a_broken_step_ends_its_own_tasks_only(engine):
    with pytest.raises(GenerationFailedError, match="ArithmeticError: thirteen"):
        engine.generate([[13]], few())
    assert engine.generate([[1]], few())[0].token_ids == (2, 3, 4)
    assert engine.healthy


def test_a_full_queue_says_so_and_opens_again(engine):
    engine.counting.go.clear()
    streams = [engine.submit([n], few()) for n in range(3)]
    with pytest.raises(QueueFullError, match="1 tasks are waiting"):
        engine.submit([9], few())
    engine.counting.go.set()
    for stream in streams:
        list(stream)
    assert list(engine.submit([9], few()))[-1].finish.reason == "length"


def test_health_tells_of_a_step_that_hangs(engine):
    engine.counting.go.clear()
    stream = engine.submit([1], few())
    assert engine.counting.stands.wait(10)
    wait(lambda: not engine.healthy)
    engine.counting.go.set()
    list(stream)
    wait(lambda: engine.healthy)


def test_the_watchdog_tells_of_a_hang_once_and_of_its_end(engine, caplog):
    engine.counting.go.clear()
    stream = engine.submit([1], few())
    wait(lambda: "the engine hangs" in caplog.text)
    time.sleep(0.3)
    engine.counting.go.set()
    assert list(stream)[-1].finish.reason == "length"
    wait(lambda: "the step that hung has ended" in caplog.text)
    assert caplog.text.count("the engine hangs") == 1
    assert engine.healthy


def test_what_cannot_be_contained_ends_every_stream_with_an_error(engine, monkeypatch):
    engine.counting.go.clear()
    streams = [engine.submit([n], few(50)) for n in range(3)]
    assert engine.counting.stands.wait(10)

    def lose_count(chunks):
        raise AssertionError("the books are wrong")

    monkeypatch.setattr(engine.core.scheduler, "complete", lose_count)
    engine.counting.go.set()
    for stream in streams:
        *_, last = list(stream)
        assert (last.finish.reason, "the books are wrong" in last.finish.message) == ("error", True)
    assert not engine.healthy
    assert not engine.is_open
    with pytest.raises(EngineClosedError, match="the engine failed"):
        engine.submit([1], few())


def test_generating_asynchronously(engine):
    async def both():
        return await asyncio.gather(
            engine.generate_async([[1], [5]], few()), engine.generate_async([[7]], few(2))
        )

    first, second = asyncio.run(both())
    assert [c.token_ids for c in first] == [(2, 3, 4), (6, 7, 8)]
    assert [c.token_ids for c in second] == [(8, 9)]


def test_a_caller_that_is_cancelled_takes_its_tasks_along(engine):
    engine.counting.go.clear()

    async def leave():
        await asyncio.wait_for(engine.generate_async([[1], [2]], few(100)), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    engine.counting.go.set()
    wait(lambda: engine.num_open == 0)
    assert engine.stats()["num_finished_cancelled"] == 2


def test_changed_weights_drop_the_prefixes(engine):
    engine.generate([list(range(12))], few())
    assert engine.stats()["num_cached_pages"] > 0
    engine.update_weights()
    assert engine.stats()["num_cached_pages"] == 0


@pytest.mark.parametrize("how", ["submit", "generate_async"])
def test_a_form_that_takes_long_to_compile_holds_up_nobody_else(engine, monkeypatch, how):
    compiling, go = threading.Event(), threading.Event()
    made = []

    def matcher_of(params):
        if params.structure is not None:
            made.append(params.structure)
            compiling.set()
            assert go.wait(20)
            raise RefusedError("too hard")

    monkeypatch.setattr(engine.core, "matcher_of", matcher_of)
    hard = few(structure=Structure(regex="a"))

    def ask():
        if how == "submit":
            engine.submit([1], hard)
        else:
            asyncio.run(both())

    async def both():
        waits = asyncio.create_task(engine.generate_async([[1]], hard))
        while not compiling.is_set():
            await asyncio.sleep(0.001)
        await engine.generate_async([[5]], few())  # on the same loop
        go.set()
        await waits

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        assert compiling.wait(10)
        assert engine.generate([[1]], few())[0].token_ids == (2, 3, 4)
        if how == "submit":
            go.set()
        with pytest.raises(RefusedError, match="too hard"):
            asked.result(20)
    assert len(made) == 1, "what was compiled is not compiled again under the lock"
    wait(lambda: engine.num_open == 0)  # a caller has its answer a moment before the engine lets go


def test_a_failed_detokenizer_ends_its_own_task_only():
    def token_bytes(token_id):
        if token_id == 13:
            raise LookupError("no bytes")
        return b"a"

    scheduler = InferenceScheduler(KVCache(32, 4), max_running_tasks=2, max_step_tokens=64)
    core = EngineCore(
        scheduler, Counting(), vocab_size=100, max_context=128, token_bytes=token_bytes
    )
    engine = InferenceEngine(None, None, core=core)
    streams = [engine.submit([n], few(6)) for n in (11, 20)]
    ends = [finish for stream in streams for event in stream if (finish := event.finish)]
    assert [end.reason for end in ends] == ["error", "length"]
    assert ends[0].message == "LookupError: no bytes"
    assert engine.healthy
    assert engine.generate([[30]], few())[0].text == "aaa"
    engine.close()


def test_idle_work_is_done_in_pieces_and_gives_way_to_tasks(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.05)
    threads, pieces, hold = [], [], threading.Event()

    def work():
        for piece in range(4):
            threads.append(threading.current_thread().name)
            pieces.append(piece)
            if piece == 1:
                assert hold.wait(20)
            yield

    engine.when_idle(work())
    wait(lambda: len(pieces) == 2)  # the second piece is under way
    stream = engine.submit([1], few())
    hold.set()
    assert [i for event in stream for i in event.token_ids] == [2, 3, 4]
    assert len(pieces) == 2, "the answer came first"
    wait(lambda: len(pieces) == 4)
    assert set(threads) == {"astrai-engine"}


def test_work_beside_the_steps_does_not_wait_for_the_end_of_tasks(engine):
    had_tasks = []

    def work():
        for _ in range(3):
            had_tasks.append(engine.core.has_tasks)
            yield

    engine.counting.go.clear()
    stream = engine.submit([1], few(90))
    assert engine.counting.stands.wait(20)
    engine.beside_steps(work())
    engine.counting.go.set()
    assert sum(len(event.token_ids) for event in stream) == 90
    wait(lambda: len(had_tasks) == 3)
    assert had_tasks[0]


def test_idle_work_changes_the_threads_of_the_steps_to_come_at_its_end_only(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.0)
    used: list[int] = []
    monkeypatch.setattr(engine_module, "use_threads", lambda threads, native: used.append(threads))
    usual = torch.get_num_threads()

    def work():
        engine.submit([1], few())
        yield
        engine.use_threads(usual + 1)
        yield

    engine.when_idle(work())
    wait(lambda: used[-1:] == [usual + 1])
    assert used[0] == usual
    with pytest.raises(AssertionError, match="only between steps"):
        engine.use_threads(1)


def test_idle_work_that_fails_is_told_and_the_engine_goes_on(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.0)

    def work():
        yield
        raise ArithmeticError("in vain")

    engine.when_idle(work())
    wait(lambda: "in vain" in caplog.text)
    assert engine.generate([[1]], few())[0].token_ids == (2, 3, 4)
    assert engine.healthy
