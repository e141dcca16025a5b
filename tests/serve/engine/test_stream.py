"""The way out of the engine: nothing is lost, whoever is slow, late or gone."""

import asyncio
import threading

import pytest

from astrai_core.generation import FinishReason
from astrai_serve.engine.stream import MAX_EVENTS, TaskStream
from astrai_serve.engine.task import Finish, TaskEvent


def token(number):
    return TaskEvent(text=f"{number} ", token_ids=(number,))


def last():
    return TaskEvent(
        finish=Finish(
            reason=FinishReason.LENGTH,
            num_prompt_tokens=1,
            num_cached_tokens=0,
            num_output_tokens=9,
        )
    )


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def stream(cancelled):
    return TaskStream(0, 1, on_cancel=lambda: cancelled.append("asked"))


async def collect(stream):
    return [event async for event in stream]


def test_events_arrive_one_by_one_and_end(stream):
    for event in (token(1), token(2), last()):
        stream.put(event)
    assert list(stream) == [token(1), token(2), last()]
    assert list(stream) == [], "the end stays the end"


def test_a_slow_reader_gets_fewer_and_larger_events(stream):
    for number in range(MAX_EVENTS + 50):
        stream.put(token(number))
    stream.put(last())
    events = list(stream)
    assert len(events) == MAX_EVENTS
    assert events[:2] == [token(0), token(1)]
    assert [i for event in events for i in event.token_ids] == list(range(MAX_EVENTS + 50))
    assert "".join(event.text for event in events).split() == [
        str(n) for n in range(MAX_EVENTS + 50)
    ]
    assert [event.finish is not None for event in events] == [False] * (MAX_EVENTS - 1) + [True]


def test_a_reader_waits_for_news_of_another_thread(stream):
    def talk():
        for event in (token(1), last()):
            threading.Event().wait(0.02)
            stream.put(event)

    thread = threading.Thread(target=talk)
    thread.start()
    assert list(stream) == [token(1), last()]
    thread.join()


def test_an_async_reader_waits_for_news_of_another_thread(stream):
    async def main():
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0.01)  # it waits now
        for event in (token(1), token(2), last()):
            await asyncio.to_thread(stream.put, event)
        return await asyncio.wait_for(reader, 10)

    assert asyncio.run(main()) == [token(1), token(2), last()]


def test_an_async_reader_that_gave_up_waiting_has_taken_nothing(stream):
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        stream.put(token(1))
        stream.put(last())
        return await asyncio.wait_for(collect(stream), 10)

    assert asyncio.run(main()) == [token(1), last()]


def test_news_for_a_loop_that_is_closed_cancels_the_task(stream, cancelled):
    loop = asyncio.new_event_loop()
    reader = loop.create_task(collect(stream))
    loop.run_until_complete(asyncio.sleep(0.01))  # it waits now
    loop.close()
    stream.put(token(1))
    assert cancelled == ["asked"]
    reader._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue]


def test_leaving_the_block_early_cancels(stream, cancelled):
    stream.put(token(1))
    with stream:
        assert next(stream) == token(1)
    assert cancelled == ["asked"]


def test_leaving_the_block_after_the_end_asks_for_nothing(stream, cancelled):
    async def main():
        async with stream:
            return await collect(stream)

    stream.put(last())
    with stream:
        pass
    assert asyncio.run(main()) == [last()]
    assert cancelled == []


def test_nothing_follows_the_end(stream):
    stream.put(last())
    with pytest.raises(AssertionError, match="after its last one"):
        stream.put(token(1))


def test_progress_that_waits_is_told_by_its_latest():
    def read(count):
        return TaskEvent(num_computed_tokens=count, num_cached_tokens=4)

    merged = read(8) + read(12) + token(7)
    assert merged == TaskEvent(
        text="7 ", token_ids=(7,), num_computed_tokens=12, num_cached_tokens=4
    )
