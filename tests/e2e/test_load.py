"""Hundreds of clients at once, a third of whom leave whenever they like, on a server of two cores.

Nobody may hear an error but 429, and what is left at the end is what was there at the beginning.
"""

import asyncio
import json
import random
import signal
import sys
import time
from dataclasses import dataclass, field

import httpx2
import psutil
import pytest

from .server_process import ServerProcess, write_model

TEXTS = ["你好，世界！今天天气很好。", "hello world, the weather is fine today"]
LEAVE = 0.3
GROWTH_MIB = 24
"""What the allocator may take beyond what it had after the first part of the run."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    return write_model(folder, TEXTS, dim=64, n_layers=2, n_kv_heads=2, dim_ffn=96, max_len=512)


@pytest.fixture
def process(model_folder):
    options = ("--num-pages", 96, "--max-queued-tasks", 128)
    with ServerProcess(model_folder, *options) as process:
        yield process
    assert process.log == [], f"the server logs of trouble: {''.join(process.log)[:2000]}"


@dataclass
class Tally:
    """What the clients lived through."""

    statuses: dict[int, int] = field(default_factory=dict[int, int])
    first_token_seconds: list[float] = field(default_factory=list[float])
    retry_seconds: list[int] = field(default_factory=list[int])
    errors: list[str] = field(default_factory=list[str])
    num_left: int = 0
    num_whole: int = 0
    memory: list[int] = field(default_factory=list[int])


async def client(http, chance, tally, deadline):
    """Ask again and again: both protocols, long and short prompts, alike and not."""
    while time.monotonic() < deadline:
        is_claude = chance.random() < 0.3
        words = "北京 " * chance.choice([1, 5, 30]) + str(chance.randrange(40))
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": chance.choice([4, 16, 48]),
            "stream": True,
        }
        path = "/v1/messages" if is_claude else "/v1/chat/completions"
        # by the clock, before or after the first token, or in the middle of the text
        leaves = chance.random() < LEAVE
        seconds = chance.random() * 0.3 if leaves and chance.random() < 0.5 else None
        num_lines = chance.randrange(1, 8) if leaves and seconds is None else None
        try:
            async with asyncio.timeout(seconds):
                await ask(http, path, body, tally, num_lines)
        except (TimeoutError, LeftError):
            tally.num_left += 1
        except httpx2.TransportError as error:
            tally.errors.append(repr(error))
        await asyncio.sleep(chance.random() * 0.2)


class LeftError(Exception):
    """The client has read enough."""


async def ask(http, path, body, tally, num_lines):
    began = time.monotonic()
    async with http.stream("POST", path, json=body) as response:
        status = response.status_code
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        if status == 429:
            seconds = int(response.headers["retry-after"])
            tally.retry_seconds.append(seconds)
            await asyncio.sleep(min(seconds, 2))
            return
        if status != 200:
            tally.errors.append(f"{status} {(await response.aread())[:200]!r}")
            return
        is_first, end = True, ""
        num_read = 0
        async for line in response.aiter_lines():
            num_read += 1
            if num_read == num_lines:
                raise LeftError
            if is_first and ('"content":"' in line.replace('"content":""', "") or "delta" in line):
                is_first = False
                tally.first_token_seconds.append(time.monotonic() - began)
            if '"error"' in line:
                tally.errors.append(line[:200])
            end = line or end
        if "[DONE]" not in end and "message_stop" not in end:
            tally.errors.append(f"a stream ends in {end[:100]}")
        tally.num_whole += 1


async def watch(pid, tally, deadline):
    while time.monotonic() < deadline:
        tally.memory.append(psutil.Process(pid).memory_info().rss >> 20)
        await asyncio.sleep(0.5)


async def load(process, num_clients, seconds):
    tally = Tally()
    deadline = time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=num_clients)
    async with httpx2.AsyncClient(base_url=process.url, timeout=120, limits=limits) as http:
        clients = [client(http, random.Random(n), tally, deadline) for n in range(num_clients)]
        await asyncio.gather(watch(process.process.pid, tally, deadline), *clients)
    return tally


def metrics(url):
    text = httpx2.get(f"{url}/metrics", timeout=60).text
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines())
        if not name.startswith("#")
    }


@pytest.mark.parametrize(
    ("num_clients", "seconds"),
    [(40, 10), pytest.param(200, 120, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_nobody_hears_an_error_and_nothing_is_left(process, num_clients, seconds):
    tally = asyncio.run(load(process, num_clients, seconds))
    counts = metrics(process.url)
    for _ in range(200):
        counts = metrics(process.url)
        if not counts["astrai:num_requests_running"] + counts["astrai:num_requests_waiting"]:
            break
        time.sleep(0.1)
    waits = sorted(tally.first_token_seconds)
    p50, p99 = (waits[int(len(waits) * share)] for share in (0.5, 0.99))
    memory = tally.memory
    report = {
        "clients": num_clients,
        "seconds": seconds,
        "statuses": tally.statuses,
        "whole": tally.num_whole,
        "left": tally.num_left,
        "first_token_p50_s": round(p50, 3),
        "first_token_p99_s": round(p99, 3),
        "retry_after": sorted(set(tally.retry_seconds)),
        "tokens": int(counts["astrai:generation_tokens_total"]),
        "preemptions": int(counts["astrai:num_preemptions_total"]),
        "memory_mib": memory[:: max(1, len(memory) // 8)],
    }
    sys.stdout.write(f"\n{json.dumps(report)}\n")
    assert tally.errors == []
    assert set(tally.statuses) <= {200, 429}
    assert tally.num_whole > num_clients
    assert tally.num_left > 0.1 * (tally.num_whole + tally.num_left)
    assert all(0 < wait <= 120 for wait in tally.retry_seconds)
    assert counts["astrai:num_requests_running"] == counts["astrai:num_requests_waiting"] == 0
    assert counts["astrai:kv_cache_usage_perc"] == 0
    assert counts['astrai:requests_cancelled_total{reason="disconnect"}'] > 0
    settled = memory[len(memory) // 4 :]
    assert max(settled[-5:]) <= settled[0] + GROWTH_MIB, f"memory grows: {memory}"
    assert httpx2.get(f"{process.url}/health", timeout=60).status_code == 200
    process.send(signal.SIGTERM)
    assert process.wait(30)[0] == 0
