"""How fast is the server? A random model, the real process, HTTP, and the median of several runs.

Speed does not depend on the values of the weights, so nothing is downloaded. Prompts are token ids
drawn from a fixed seed, the same for every server; all answers are greedy and of a fixed length.
A peer is any server of OpenAI's protocol that serves a model of the same shape.

    python benchmarks/serve.py
    python benchmarks/serve.py --sizes 3M --short
    python benchmarks/serve.py --sizes 53M --peer llama.cpp=http://127.0.0.1:8080
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx2

# a prompt's ids are below this, so that tokens of every size and peer have text, and above the
# bytes and control tokens
FIRST_ID = 300
SHAPES = {
    "3M": {"vocab_size": 4096, "dim": 192, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2}
    | {"dim_ffn": 576},
    "53M": {"vocab_size": 32000, "dim": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 2}
    | {"dim_ffn": 1536},
}
MAX_LEN = 4096
NUM_BYTE_TOKENS = 259  # bytes and the chat template's three marks


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are sent together, so many at a time."""

    num_requests: int
    concurrency: int
    prompt: tuple[int, int]
    """Least and most tokens of a prompt."""
    num_new: int
    num_shared: int = 0
    """So many tokens are the same at the beginning of each prompt."""

    def prompts(self, vocab_size: int, seed: str) -> list[list[int]]:
        """Token ids, the same for the same seed."""
        draw = random.Random(seed)
        shared = [draw.randrange(FIRST_ID, vocab_size) for _ in range(self.num_shared)]
        lengths = [draw.randint(*self.prompt) for _ in range(self.num_requests)]
        return [
            shared + [draw.randrange(FIRST_ID, vocab_size) for _ in range(length - len(shared))]
            for length in lengths
        ]

    def halved(self) -> "Workload":
        """A quick form: half the tokens."""
        return dataclasses.replace(self, num_new=max(2, self.num_new // 2))


WORKLOADS = {
    "single": Workload(num_requests=2, concurrency=1, prompt=(128, 128), num_new=128),
    "prefill": Workload(num_requests=3, concurrency=1, prompt=(1024, 1024), num_new=2),
    "conc8": Workload(num_requests=16, concurrency=8, prompt=(64, 256), num_new=64),
    "conc32": Workload(num_requests=32, concurrency=32, prompt=(64, 256), num_new=64),
    "shared32": Workload(
        num_requests=32, concurrency=32, prompt=(1040, 1040), num_new=32, num_shared=1024
    ),
}


@dataclass(kw_only=True)
class Answer:
    """When the text of one answer came."""

    sent: float
    num_prompt: int
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one.

        Raises:
            RuntimeError: all came at once, so that it cannot be told.
        """
        if self.last == self.first:
            raise RuntimeError("the server sent all tokens of an answer in one event")
        return (self.num_tokens - 1) / (self.last - self.first)


async def events(response: httpx2.Response) -> AsyncIterator[dict]:
    """The objects of a stream."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


async def ask(client: httpx2.AsyncClient, model: str, prompt: list[int], num_new: int) -> Answer:
    """Send one prompt and time its answer.

    Raises:
        RuntimeError: the server fails, or answers with another number of tokens.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": num_new, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    answer = Answer(sent=time.perf_counter(), num_prompt=len(prompt))
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for event in events(response):
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event.get("choices"):
                answer.last = time.perf_counter()
                answer.first = answer.first or answer.last
            if event.get("usage"):
                answer.num_tokens = event["usage"]["completion_tokens"]
    if answer.num_tokens != num_new:
        raise RuntimeError(f"{answer.num_tokens} tokens came where {num_new} were asked for")
    return answer


async def run(url: str, model: str, workload: Workload, prompts: Sequence[list[int]]) -> dict:
    """Send the prompts, so many at a time, and sum up."""
    gate = asyncio.Semaphore(workload.concurrency)
    limits = httpx2.Limits(max_connections=workload.concurrency)
    async with httpx2.AsyncClient(
        base_url=url, timeout=600, limits=limits, trust_env=False
    ) as client:

        async def one(prompt: list[int]) -> Answer:
            async with gate:
                return await ask(client, model, prompt, workload.num_new)

        began = time.perf_counter()
        answers = await asyncio.gather(*map(one, prompts))
        seconds = time.perf_counter() - began
    first = sorted(answer.first - answer.sent for answer in answers)
    rates = [answer.decode_rate for answer in answers if answer.num_tokens > 2]
    return ({"decode_per_second": statistics.median(rates)} if rates else {}) | {
        "seconds": seconds,
        "generated_per_second": sum(answer.num_tokens for answer in answers) / seconds,
        "prefill_per_second": statistics.median(
            answer.num_prompt / (answer.first - answer.sent) for answer in answers
        ),
        "first_token_ms": statistics.median(first) * 1000,
        "first_token_last_ms": first[-1] * 1000,
    }


def measure(url: str, vocab_size: int, names: Sequence[str], repeats: int, short: bool) -> dict:
    """The median of each figure of each workload; every repeat has prompts of its own."""
    model = httpx2.get(f"{url}/v1/models", timeout=20, trust_env=False).json()["data"][0]["id"]
    warm = Workload(num_requests=2, concurrency=2, prompt=(64, 64), num_new=8)
    asyncio.run(run(url, model, warm, warm.prompts(vocab_size, "warm")))
    results = {}
    for name in names:
        workload = WORKLOADS[name].halved() if short else WORKLOADS[name]
        rounds = []
        for repeat in range(repeats):
            prompts = workload.prompts(vocab_size, f"{name}-{repeat}")
            rounds.append(asyncio.run(run(url, model, workload, prompts)))
        results[name] = {
            figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]
        }
        spread = [one["seconds"] for one in rounds]
        results[name]["seconds_range"] = [min(spread), max(spread)]
    return results


def fill_vocabulary(file: Path, vocab_size: int) -> None:
    """Give every id a text, as a trained tokenizer does: a token without any makes no event."""
    content = json.loads(file.read_text("utf-8"))
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    letters = string.ascii_lowercase + string.digits
    for length in (2, 3):
        for characters in itertools.product(letters, repeat=length):
            if len(vocab) == vocab_size:
                break
            word = "".join(characters)
            vocab[word] = len(vocab)
            merges.append([word[:-1], word[-1]])
    file.write_text(json.dumps(content), "utf-8")


def make_model(shape: dict, folder: Path) -> int:
    """Write a random model with a tokenizer of its own, and return its number of parameters."""
    import torch

    from astrai_core.model import AutoModel, ModelConfig
    from astrai_core.tokenizer import AutoTokenizer

    torch.manual_seed(0)
    model = AutoModel.from_config(ModelConfig(**shape, max_len=MAX_LEN, tie_weight=True))
    AutoModel.save_pretrained(model, folder)
    AutoTokenizer.train([], NUM_BYTE_TOKENS).save_pretrained(folder)
    fill_vocabulary(folder / "tokenizer.json", shape["vocab_size"])
    return sum(weight.numel() for weight in model.parameters())


@contextlib.contextmanager
def serving(folder: Path, options: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Run the server; yield its address, and what it said and took to be ready."""
    command = [Path(sys.executable).parent / "astrai-serve", "--model", folder, "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    about: dict = {}
    url = ""
    try:
        for line in process.stdout:
            name, _, rest = line.strip().partition(" ")
            if name == "precision":
                about["precision"] = rest.strip()
            if found := re.match(r"  address +(\S+)", line):
                url = found[1]
            if name == "stop":
                break
        if not url:
            raise SystemExit("the server did not start; its own line above says why")
        about["ready_seconds"] = time.perf_counter() - began
        yield url, about
        about["peak_memory_mb"] = peak_memory_mb(process.pid)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def peak_memory_mb(pid: int) -> float | None:
    """Most memory the process ever held, where the system tells."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


def machine() -> dict:
    """What the figures depend on beside the code."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        text = info.read_text()
        names = re.search(r"model name\s*: (.*)", text)
        cpu = names[1] if names else cpu
        known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
        found = re.search(r"flags\s*: (.*)", text)
        flags = " ".join(flag for flag in known if found and flag in found[1].split())
    return {
        "cpu": cpu,
        "flags": flags,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": [round(one, 1) for one in os.getloadavg()],
        "python": platform.python_version(),
        "torch": version("torch"),
        "astrai": version("astrai"),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


ROWS = (
    ("single stream, tokens/s", "single", "decode_per_second", True),
    ("prefill of 1,024, tokens/s", "prefill", "prefill_per_second", True),
    ("8 at once, generated tokens/s", "conc8", "generated_per_second", True),
    ("8 at once, first token p50, ms", "conc8", "first_token_ms", False),
    ("32 at once, generated tokens/s", "conc32", "generated_per_second", True),
    ("32 at once, first token p50, ms", "conc32", "first_token_ms", False),
    ("32 with a shared prefix, s", "shared32", "seconds", False),
)


def table(columns: dict[str, dict]) -> str:
    """Figures side by side; a peer's cell ends with how many times better we are."""
    ours = columns["astrai"]
    lines = [["", *columns]]
    for title, workload, figure, more_is_better in ROWS:
        if workload not in ours:
            continue
        cells = [title]
        for name, results in columns.items():
            value, own = results[workload][figure], ours[workload][figure]
            ratio = own / value if more_is_better else value / own
            cells.append(f"{value:,.1f}" + (f" ({ratio:.2f}x)" if name != "astrai" else ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        cells[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in lines
    )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="3M,53M", help="of 3M, 53M; separated by commas")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median is taken")
    parser.add_argument("--short", action="store_true", help="half the tokens, for a quick look")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL", help="another server to measure"
    )
    parser.add_argument("--out", type=Path, help="append one JSON line for each server and size")
    parser.add_argument(
        "--serve", default="", help='options for astrai-serve, as "--dtype bfloat16"'
    )
    given = parser.parse_args()
    for name, known in (("sizes", SHAPES), ("workloads", WORKLOADS)):
        chosen = getattr(given, name).split(",")
        if wrong := [one for one in chosen if one not in known]:
            parser.error(f"--{name}: {wrong[0]!r} is not one of {', '.join(known)}")
        setattr(given, name, chosen)
    if wrong := [peer for peer in given.peer if not re.fullmatch(r"[^=]+=https?://\S+", peer)]:
        parser.error(f"--peer {wrong[0]!r} is not NAME=URL")
    if given.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {given.repeats}")
    return given


def main() -> None:
    """Measure each size, and each peer after it."""
    given = options()
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if about["load"][0] > about["cores"] / 2:
        print("other programs keep this machine busy: the figures will be far too low")
    for size in given.sizes:
        shape = SHAPES[size]
        columns: dict[str, dict] = {}
        details: dict[str, dict] = {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / size
            parameters = make_model(shape, folder)
            plan = (shape["vocab_size"], given.workloads, given.repeats, given.short)
            with serving(folder, given.serve.split()) as (url, told):
                columns["astrai"] = measure(url, *plan)
            details["astrai"] = told
        for peer in given.peer:
            name, _, url = peer.partition("=")
            columns[name] = measure(url.rstrip("/").removesuffix("/v1"), *plan)
        memory = told["peak_memory_mb"]
        print(
            f"\n{size}: {parameters:,} parameters, {told['precision']}, ready after "
            f"{told['ready_seconds']:.1f} s" + (f", peak memory {memory:,.0f} MB" if memory else "")
        )
        form = "short form, " if given.short else ""
        print(f"{form}median of {given.repeats}; a peer's (x) is how many times better astrai is")
        print(table(columns), flush=True)
        for name, results in columns.items():
            line = {"server": name, "size": size, "parameters": parameters, "short": given.short}
            line |= {"repeats": given.repeats, **about, **details.get(name, {}), "results": results}
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
