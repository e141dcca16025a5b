"""A client that takes little from the server beside it: sockets, and JSON only where it is needed.

Client and server share the cores. Parsing every event of thirty-two streams would cost as much as
a step of a small model.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from benchmarks.serving.workloads import WARM_UP, WORKLOADS, Answer, Workload, figures

SECONDS = 900  # most that one answer may take
_REST_SECONDS = 10.0


async def events(url: str, path: str, body: dict) -> AsyncIterator[bytes]:
    """Data of each event that answers a POST.

    Raises:
        RuntimeError: the server refuses.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        content = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            + content
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"{head[:60]!r} {(await reader.read(300))!r}")
        left = b""
        async for piece in _pieces(reader, is_chunked=b"transfer-encoding: chunked" in head):
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield line[6:]
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    while not is_chunked and (piece := await reader.read(1 << 16)):
        yield piece
    while is_chunked and (size := int(await reader.readuntil(b"\r\n"), 16)):
        yield (await reader.readexactly(size + 2))[:-2]


def request(model: str, prompt: Sequence[int], num_new: int) -> dict:
    """A streamed, greedy completion of a fixed length."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": num_new, "temperature": 0}
    return body | {
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip


async def ask(url: str, model: str, prompt: list[int], num_new: int) -> Answer:
    """Send one prompt and time its answer.

    Raises:
        RuntimeError: the server fails, or answers with another number of tokens.
    """
    answer = Answer(sent=time.perf_counter(), num_prompt=len(prompt))
    async for data in events(url, "/v1/completions", request(model, prompt, num_new)):
        if b'"error":' in data:  # a model may say the word
            raise RuntimeError(data.decode())
        if b'"text":""' not in data and b'"text": ""' not in data and b'"text"' in data:
            answer.last = time.perf_counter()
            answer.first = answer.first or answer.last
        if b'"usage"' in data and (usage := json.loads(data).get("usage")):
            answer.num_tokens = usage["completion_tokens"]
    if answer.num_tokens != num_new:
        raise RuntimeError(f"{answer.num_tokens} tokens came where {num_new} were asked for")
    return answer


async def run(url: str, model: str, workload: Workload, prompts: Sequence[list[int]]) -> dict:
    """Send the prompts, so many at a time, and sum up."""
    gate = asyncio.Semaphore(workload.concurrency)

    async def one(prompt: list[int]) -> Answer:
        async with gate:
            return await asyncio.wait_for(ask(url, model, prompt, workload.num_new), SECONDS)

    began = time.perf_counter()
    answers = await asyncio.gather(*map(one, prompts))
    return figures(list(answers), time.perf_counter() - began)


def measure(url: str, model: str, vocab_size: int, names: Sequence[str], seed: int) -> dict:
    """Figures of each workload, after a warm-up and a rest.

    Whatever a server does by itself after its start is over then, as for most of its life.
    """
    asyncio.run(run(url, model, WARM_UP, WARM_UP.prompts(vocab_size, f"warm-{seed}")))
    time.sleep(_REST_SECONDS)
    return {
        name: asyncio.run(
            run(url, model, WORKLOADS[name], WORKLOADS[name].prompts(vocab_size, f"{name}-{seed}"))
        )
        for name in names
    }
