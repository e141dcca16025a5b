"""From real text to a served model, as `make demo` runs it.

Every stage is a command of the project, run as a user would run it; this file only says which,
keeps the time, and remembers what is done. A stage that is done is not done again and an
interrupted training run resumes by itself, so running the demo again goes on where it was.

    demo.py                   all stages, then the server
    demo.py evaluate          ask the held-out questions once more
    demo.py --serve false     all stages, without the server
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from astrai_core.command_line import CommandLineError, parse_one

ROOT = Path(__file__).resolve().parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
ITEMS = 120_000
SEQ_STEPS = 250
SFT_STEPS = 2700
HELD_OUT = 200
VOCAB = 4096
MAX_REPLY_TOKENS = 128
PORTION = 64
"""Questions in one call of the engine, between two moves of the progress bar."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small bilingual model from real text and serve it; run again, it goes on."""

    port: int = 8000
    """Port of the server."""
    out: Path = Path("runs/demo")
    """Folder of everything that is made."""
    scale: float = 1.0
    """Share of the training that is done; 0.02 shows in a minute that all works, and learns
    nothing."""
    serve: bool = True
    """End with a running server."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port must be from 1 to 65535, not {self.port}")
        if not 0 < self.scale <= 10:
            raise ValueError(f"--scale must be above 0 and at most 10, not {self.scale}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the demo: what it says it does, and the commands that do it."""

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def trains(self) -> bool:
        """Whether it is a training run."""
        return self.commands[0][0] == "astrai-train"


def stages(options: Options) -> list[Stage]:
    """All stages before the server, in order."""
    out = options.out
    corpora, curriculum, sample, tokenizer, data = (
        str(out / name) for name in ("corpora", "curriculum", "sample", "tokenizer", "data")
    )
    held_out = max(5, min(HELD_OUT, round(HELD_OUT * options.scale)))
    fit = ("astrai-train", "fit", "--config")
    return [
        Stage(
            name="corpora",
            about="real Chinese and English text, out of installed packages",
            commands=(("astrai-data", "corpora", "--out", corpora),),
        ),
        Stage(
            name="curriculum",
            about="chats that the project generates itself, and held-out ones with checkers",
            commands=(
                (
                    *("astrai-data", "curriculum", "--out", curriculum),
                    *("--train", str(max(500, round(ITEMS * min(1.0, options.scale))))),
                    *("--held_out", str(held_out)),
                ),
            ),
        ),
        Stage(
            name="tokenizer",
            about=f"a bilingual byte-level BPE of {VOCAB} tokens",
            commands=(
                # a little of the text: the tokens are for the words of the chats above all
                ("astrai-data", "corpora", "--out", sample, "--characters", "50000"),
                (
                    *("astrai-data", "tokenizer", "--overwrite", "--out", tokenizer),
                    # the shorter texts are worth more here than an export to llama.cpp
                    *("--vocab_size", str(VOCAB), "--portable", "false"),
                    *("--input", f"{sample}/train.jsonl", f"{curriculum}/train.jsonl"),
                ),
            ),
        ),
        Stage(
            name="prepare",
            about="text and chats become tokens in H5 files",
            commands=tuple(
                (
                    *("astrai-data", "prepare", "--stage", stage, "--tokenizer", tokenizer),
                    *("--out", f"{data}/{stage}-{split}.h5"),
                    *("--input", f"{folder}/{split}.jsonl"),
                )
                for stage, folder in (("seq", corpora), ("sft", curriculum))
                for split in ("train", "val")
            ),
        ),
        Stage(
            name="seq",
            about="pre-training on the text: every token is learnt",
            commands=(
                (
                    *(*fit, "configs/demo/seq.yaml"),
                    *("--trainer.default_root_dir", str(out / "seq")),
                    *("--trainer.max_steps", str(max(10, round(SEQ_STEPS * options.scale)))),
                    *("--data.init_args.tokenizer", tokenizer),
                    *("--data.init_args.train", f"{data}/seq-train.h5"),
                    *("--data.init_args.val", f"{data}/seq-val.h5"),
                ),
            ),
        ),
        Stage(
            name="sft",
            about="instruction tuning on the chats: the assistant's tokens are learnt",
            commands=(
                (
                    *(*fit, "configs/demo/sft.yaml"),
                    *("--trainer.default_root_dir", str(out / "sft")),
                    *("--trainer.max_steps", str(max(10, round(SFT_STEPS * options.scale)))),
                    *("--model.init_args.init_from", str(out / "seq/checkpoints/last")),
                    *("--data.init_args.tokenizer", tokenizer),
                    *("--data.init_args.train", f"{data}/sft-train.h5"),
                    *("--data.init_args.val", f"{data}/sft-val.h5"),
                ),
            ),
        ),
    ]


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[int]:
    """Hold the folder alone; commands inherit the lock, which lasts as long as any of them."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another demo works in this folder, or is still ending; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run_all(commands: tuple[tuple[str, ...], ...], lock: int) -> None:
    """Run commands one after the other."""
    for command in commands:
        run(command, lock)


def run(command: tuple[str, ...], lock: int) -> None:
    """Run a command to its end, and let it end when this process does.

    Raises:
        InterruptedError: it was stopped by Ctrl-C or another signal.
        RuntimeError: it failed; it has said why.
    """
    say(f"$ {shlex.join(command)}")
    parent = os.getpid()

    def die_with_parent() -> None:
        # kill -9 leaves us no last word, so the kernel has to pass it on
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    process = subprocess.Popen(
        (str(SCRIPTS / command[0]), *command[1:]),
        cwd=ROOT,
        pass_fds=(lock,),
        preexec_fn=die_with_parent,
    )
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the command has received Ctrl-C too, and saves what it has
    if -status in _STOPS or status - 128 in _STOPS:
        raise InterruptedError(command[0])
    if status:
        raise RuntimeError(f"{command[0]} {command[1]} ended with status {status}; see above")


class Meter:
    """Counts the seconds and the peak memory of a stage, over all its attempts.

    A thread writes them down every second, so that an attempt that was killed counts too.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.seconds, self.memory = 0.0, 0
        self.complete = False
        self.outdated = False
        """Whether the stage was done, or begun, with other commands."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            self.outdated = known["digest"] != digest
            if not self.outdated:
                self.seconds, self.memory = known["seconds"], known["memory"]
                self.complete = known["complete"]
        self._earlier = self.seconds
        self._stop = threading.Event()

    def __enter__(self) -> "Meter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._stop.set()
        self._thread.join()
        self.complete = kind is None
        self._save()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.memory = max(self.memory, memory_of_group())
            self._save()

    def _save(self) -> None:
        self.seconds = self._earlier + time.monotonic() - self._start
        fields = ("digest", "seconds", "memory", "complete")
        write(self.path, json.dumps({name: getattr(self, name) for name in fields}))


def evaluate(options: Options) -> None:
    """Ask the trained model every held-out question and write down what it says.

    results.json holds all replies, transcripts.md twenty of them as they came, right or wrong.
    """
    from rich.progress import track

    from astrai_core.generation import SamplingParams
    from astrai_serve import LLM
    from astrai_train.data.curriculum import check

    lines = (options.out / "curriculum/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    llm = LLM(options.out / "sft/checkpoints/last")
    assert llm.tokenizer is not None
    greedy = SamplingParams(temperature=0, max_tokens=MAX_REPLY_TOKENS)
    # neighbours of one task take about as many steps as each other
    portions = [items[i : i + PORTION] for i in range(0, len(items), PORTION)]
    for portion in track(portions, "held-out questions"):
        prompts = [llm.tokenizer.apply_chat_template(item["messages"][:-1]) for item in portion]
        for item, completion in zip(portion, llm.generate(prompts, greedy), strict=True):
            item["reply"] = completion.text
            item["right"] = check(item["checker"], completion.text)
    write(options.out / "results.json", json.dumps(items, ensure_ascii=False, indent=1))
    write(options.out / "transcripts.md", transcripts(items))


def transcripts(items: list[dict[str, Any]], count: int = 20) -> str:
    """Conversations as they came: drawn blindly, a few of each task in turn."""
    tasks = list(dict.fromkeys(item["task"] for item in items))
    rng = Random(0)
    drawn: list[dict[str, Any]] = []
    for number in range(count):
        task = tasks[number % len(tasks)]
        drawn.append(rng.choice([item for item in items if item["task"] == task]))
    parts = ["# Transcripts\n\nDrawn blindly from the held-out questions; replies are greedy.\n"]
    for number, item in enumerate(drawn, 1):
        *asked, reference = item["messages"]
        verdict = "right" if item["right"] else f"wrong, expected: {reference['content']!r}"
        parts.append(f"## {number}. {item['task']} ({verdict})\n")
        said = [*asked, {"role": "assistant", "content": item["reply"]}]
        parts += [f"**{turn['role']}**\n\n```text\n{turn['content']}\n```\n" for turn in said]
    return "\n".join(parts)


def report(options: Options, meters: dict[str, Meter]) -> str:
    """The table of results as Markdown: open tasks, their macro-average, closed sets apart."""
    from astrai_train.data.curriculum import CLOSED_TASKS

    items = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    right: dict[str, list[bool]] = {}
    for item in items:
        right.setdefault(item["task"], []).append(item["right"])
    share = {task: sum(each) / len(each) for task, each in right.items()}
    open_tasks = [task for task in share if task not in CLOSED_TASKS]
    macro = sum(share[task] for task in open_tasks) / len(open_tasks)
    rows = ["| task | held-out items | exact match |", "|---|---:|---:|"]
    rows += [f"| {task} | {len(right[task])} | {share[task]:.1%} |" for task in open_tasks]
    rows += [f"| **macro-average** | | **{macro:.1%}** |"]
    rows += [
        f"| {task} (closed set, new wordings only) | {len(right[task])} | {share[task]:.1%} |"
        for task in share
        if task in CLOSED_TASKS
    ]
    total = sum(meter.seconds for meter in meters.values())
    peak = max(meter.memory for meter in meters.values())
    times = ", ".join(f"{name} {meter.seconds:.0f} s" for name, meter in meters.items())
    date = time.strftime("%Y-%m-%d")
    return "\n".join(
        [
            *rows,
            "",
            f"{date}, {machine()}. {total / 60:.1f} minutes ({times}), "
            f"peak memory {peak / 1e9:.1f} GB.",
            "",
        ]
    )


def machine() -> str:
    """Processor and number of cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def check_port(port: int) -> None:
    """Find out now, and not after the training, that the port is taken.

    Raises:
        ValueError: something listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used ({error.strerror}); choose another one: "
                f"make demo PORT={port + 1}"
            ) from None


def do(name: str, about: str, meter: Meter, work: Callable[[], None]) -> None:
    """Do one stage, or say that it is done."""
    if meter.complete:
        say(f"{name}: done, in {meter.seconds:.0f} s")
        return
    again = f" (goes on after {meter.seconds:.0f} s)" if meter.seconds else ""
    say(f"\n== {name}: {about}{again}")
    with meter:
        work()
    say(f"== {name}: {meter.seconds:.0f} s, {meter.memory / 1e9:.2f} GB at most")


def make_all(options: Options) -> None:
    """Do all stages that are not done, print the table and keep it in report.md."""
    meters: dict[str, Meter] = {}
    with only_one(options.out) as lock:
        digest = ""
        for stage in stages(options):
            # a stage is done anew when an earlier one was
            digest = hashlib.sha256(f"{digest}{stage.commands}".encode()).hexdigest()[:16]
            meter = Meter(options.out / "stages" / f"{stage.name}.json", digest)
            meters[stage.name] = meter
            # a training run of other data or length is put aside, not gone on with
            more = ("--fresh", "true") if meter.outdated and stage.trains else ()
            commands = tuple((*command, *more) for command in stage.commands)
            do(stage.name, stage.about, meter, partial(run_all, commands, lock))
        meter = meters["evaluate"] = Meter(options.out / "stages/evaluate.json", digest)
        about = "the held-out questions: operands and wordings that training never saw"
        do("evaluate", about, meter, partial(evaluate, options))
        table = report(options, meters)
        write(options.out / "report.md", table)
    say(f"\n{table}")
    show_some(options)


def show_some(options: Options, count: int = 6) -> None:
    """Print a few answers, each of another task."""
    items = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    one_each = list({item["task"]: item for item in items}.values())
    for item in Random(1).sample(one_each, min(count, len(one_each))):
        reply = " / ".join(item["reply"].splitlines())
        mark = "right" if item["right"] else "wrong"
        say(f"  {item['messages'][-2]['content']}\n    -> {reply}  ({mark})")
    say(f"\nAll replies: {options.out}/results.json, twenty chats: {options.out}/transcripts.md")


def serve(options: Options) -> None:
    """Become the server."""
    url = f"http://127.0.0.1:{options.port}"
    chat = "make chat" if options.port == 8000 else f"make chat PORT={options.port}"
    say(f"\nThe model is served at {url} (a page to chat on, and /v1 for OpenAI clients).")
    say(f"In another terminal: {chat}. Ctrl-C ends the server.\n")
    model = options.out / "sft/checkpoints/last"
    # one wrong draw spoils a sum: clients that do not say otherwise get the likeliest answer
    settings = model / "generation_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) | {"do_sample": False}
    write(settings, json.dumps(content, indent=2) + "\n")
    command = [str(SCRIPTS / "astrai-serve"), "--model", str(model), "--model_name", "astrai-demo"]
    os.execv(command[0], [*command, "--port", str(options.port)])


def main() -> None:
    """Run the demo, and exit with its status: 2 for wrong options, 1 for what failed later."""
    arguments = sys.argv[1:]
    again = arguments[:1] == ["evaluate"]
    try:
        options = parse_one(arguments[again:], "demo.py", Options)
    except CommandLineError as error:
        sys.exit(f"demo.py: {error}")
    try:
        if again:
            (options.out / "stages/evaluate.json").unlink(missing_ok=True)
        elif options.serve:
            check_port(options.port)
        make_all(options)
        if options.serve and not again:
            serve(options)
    except (KeyboardInterrupt, InterruptedError):
        say("\nInterrupted. Run the demo again: it goes on from here.")
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"demo.py: {error}")


def memory_of_group() -> int:
    """Bytes that this process and the commands it has started hold, shared pages counted once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == os.getpgrp():
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def write(path: Path, text: str) -> None:
    """Replace a file in one move."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def say(text: str) -> None:
    """Print at once, so that lines stand before those of the commands."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
