"""Who computes, threads of ours or of torch's, and how many of them.

Two pools of threads on the same cores take them from each other: each spins for a while when its
loop is over, and the other's next loop waits until the scheduler steps in, milliseconds later.

How many threads are best depends on the model, the kernels and the cores, so it is measured once
with a model on a machine, while the engine has nothing else to do, and kept for later starts; until
then, each physical core has one. Three steps stand for what a server does: a token of one task, a
token of several tasks, and a piece of a prompt.
"""

import math
import os
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch

from astrai_core.machine import Cores, cores, processor
from astrai_core.model import Transformer
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import scheme_of
from astrai_serve.engine import tuning_cache
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.native_attention import why_not_native
from astrai_serve.engine.step_probe import Clocks, Samples, Speeds, StepProbe, measuring

THREADS_VARIABLE = "OMP_NUM_THREADS"
NEARLY = 1.03
"""Counts of threads within 3 % of the best count as good as it: the fewest of them are taken."""
MOST_SCATTER = 1.25
"""Where the middle one of equal steps takes so many times as long as the fastest, others compute
on this machine, and its numbers say little."""
LEAST_SHARE = 0.9
"""Where a step on one thread had its core for less of the time, likewise."""


@dataclass(frozen=True, kw_only=True)
class ThreadChoice:
    """How many threads compute, and why."""

    threads: int
    why: str
    """In words, for people."""
    speeds: Mapping[int, Speeds]
    """For each count that was tried."""
    is_guess: bool = False
    """Nobody asked for it, and it has not been measured."""

    @property
    def speed(self) -> Speeds | None:
        """Of so many threads, if they were tried."""
        return self.speeds.get(self.threads)

    def __str__(self) -> str:
        told = [
            f"{threads}: {' / '.join(f'{speed:,.0f}' for speed in speeds)}"
            for threads, speeds in sorted(self.speeds.items())
        ]
        what = "; tokens/s alone / several at once / prompt on " if told else ""
        return f"{self.threads}, {self.why}{what}{', '.join(told)}"


def is_native(model: Transformer) -> bool:
    """Whether nearly all of a step of this model is our own compiled operators'."""
    return (
        model.device.type == "cpu"
        and scheme_of(model) == "w8a8"
        and why_not_packed() is None
        and why_not_native() is None
    )


def use_threads(threads: int, is_native: bool) -> None:
    """Set the number of threads for steps, in the thread that runs them.

    Args:
        threads: how many.
        is_native: torch computes the little that is left on one thread, and its pool sleeps.
    """
    if is_native:
        torch.ops.astrai_packed.use_threads(threads)
    torch.set_num_threads(1 if is_native else threads)


@contextmanager
def threads_of_steps(threads: int) -> Iterator[None]:
    """Compute a native model's steps on so many threads in this block, and as before after it."""
    ours = torch.ops.astrai_packed.use_threads(threads)
    of_torch = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.ops.astrai_packed.use_threads(ours)
        torch.set_num_threads(of_torch)


def candidates(machine: Cores) -> list[int]:
    """Counts worth trying: powers of two, the physical cores, and the most that can run."""
    powers = {1 << n for n in range(machine.most.bit_length())}
    return sorted({*powers, min(machine.physical, machine.most), machine.most})


def best(times: Mapping[int, Sequence[float]]) -> int:
    """Choose among counts of threads by the seconds of their steps.

    Each kind of step counts alike: the geometric mean of how many times as long as the fastest it
    takes. Of the counts whose mean is within `NEARLY` of the lowest, the fewest threads are taken,
    which leave the other cores to others.
    """
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    scores = {
        threads: statistics.geometric_mean(
            own / least for own, least in zip(row, fastest, strict=True)
        )
        for threads, row in times.items()
    }
    limit = min(scores.values()) * NEARLY
    return min(threads for threads, score in scores.items() if score <= limit)


def why_unsound(samples: Samples) -> str | None:
    """Why measured times say nothing of the machine, in words; None where they do."""
    if not samples.times:
        return "a step of this model takes too long to try"
    share = statistics.median(samples.shares) if samples.shares else 1.0
    if share < LEAST_SHARE:
        return f"the machine is busy: the probe had a core for {share:.0%} of the time"
    scatter = statistics.median(
        statistics.median(seconds) / min(seconds)
        for row in samples.times.values()
        for seconds in row
    )
    if scatter > MOST_SCATTER:
        return f"the machine is busy: equal steps differ by {scatter - 1:.0%}"
    return None


def choose_threads(
    model: Transformer, config: EngineConfig, *, machine: Cores | None = None
) -> ThreadChoice:
    """Take what was asked for, what was measured before, or guess.

    Args:
        model: as it will run, in evaluation mode.
        config: the engine's settings.
        machine: its cores; None looks at this one.
    """
    if config.num_threads is not None:
        return ThreadChoice(threads=config.num_threads, why="as asked for", speeds={})
    if os.environ.get(THREADS_VARIABLE, "").isdigit():
        return ThreadChoice(
            threads=torch.get_num_threads(), why=f"as {THREADS_VARIABLE} says", speeds={}
        )
    machine = machine or cores()
    default = min(torch.get_num_threads(), machine.most)
    counts = candidates(machine)
    if model.device.type != "cpu" or len(counts) == 1:
        why = "all there are" if len(counts) == 1 else "PyTorch's choice beside a GPU"
        return ThreadChoice(threads=default, why=why, speeds={})
    kept = _sound(tuning_cache.read(_facts(model, config, machine)), counts)
    if kept is None:
        threads = min(machine.physical, machine.most)
        why = "one a core, until it is measured what is best"
        return ThreadChoice(threads=threads, why=why, speeds={}, is_guess=True)
    threads, times = kept
    why = f"the best of up to {machine.most}, measured at an earlier start"
    return ThreadChoice(threads=threads, why=why, speeds=StepProbe(model, config).speeds(times))


def measured(
    model: Transformer,
    config: EngineConfig,
    choice: ThreadChoice,
    *,
    machine: Cores | None = None,
    clocks: Clocks | None = None,
) -> Generator[None, None, ThreadChoice]:
    """Measure what is not known of a choice; a step for each `next`.

    Of a guess, how many threads are best, which is kept for later starts; of another one, how fast
    it is. The steps are computed in the thread that asks, which is the engine's: another one would
    keep a pool of threads that spins beside the engine's. How many threads compute is not as before
    then.

    Args:
        model: as it runs, in evaluation mode.
        config: the engine's settings as `choose_threads` had them.
        choice: its answer.
        machine: its cores; None looks at this one.
        clocks: what times the steps; tests pass their own.

    Returns:
        A choice with its speeds; without, and a guess again, where the times say nothing.
    """
    machine = machine or cores()
    counts = candidates(machine) if choice.is_guess else [choice.threads]
    native, samples, probe = is_native(model), Samples(), StepProbe(model, config)
    yield from measuring(probe, counts, lambda n: use_threads(n, native), samples, clocks)
    unsound = why_unsound(samples)
    times = {n: [min(seconds) for seconds in row] for n, row in samples.times.items()}
    if not choice.is_guess:
        return choice if unsound else replace(choice, speeds=probe.speeds(times))
    if unsound is not None:
        threads, why = min(machine.physical, machine.most), f"one a core, for {unsound}"
        return ThreadChoice(threads=threads, why=why, speeds={}, is_guess=True)
    threads = best(times)
    result = {"threads": threads, "times": {str(n): row for n, row in times.items()}}
    tuning_cache.write(_facts(model, config, machine), result)
    why = f"the best of up to {machine.most}, measured in {samples.seconds:.1f} s"
    return ThreadChoice(threads=threads, why=why, speeds=probe.speeds(times))


def _facts(model: Transformer, config: EngineConfig, machine: Cores) -> dict[str, object]:
    """What a measurement holds for."""
    return {
        "processor": processor(),
        "cores": asdict(machine),
        "astrai": version("astrai"),
        "torch": torch.__version__,
        "model": repr(model.config),
        "dtype": str(model.dtype),
        "weights": scheme_of(model),
        "native": is_native(model),
        "config": {
            name: getattr(config, name)
            for name in (
                "page_size", "kv_dtype", "reproducible", "max_context", "max_running_tasks",
                "max_step_tokens",
            )
        },
    }  # fmt: skip


def _sound(
    result: Mapping[str, object] | None, counts: Sequence[int]
) -> tuple[int, dict[int, list[float]]] | None:
    """A kept result as it was written; None, with a word in the log, if it is another thing."""
    if result is None:
        return None
    threads, rows = result.get("threads"), result.get("times")
    times: dict[int, list[float]] = {}
    if isinstance(rows, dict) and rows.keys() == {str(count) for count in counts}:
        for name, row in rows.items():
            if isinstance(row, list) and len(row) == len(StepProbe.KINDS):
                times[int(name)] = [
                    s for s in row if type(s) is float and s > 0 and math.isfinite(s)
                ]
    whole = len(times) == len(counts) and all(
        len(t) == len(StepProbe.KINDS) for t in times.values()
    )
    if type(threads) is not int or threads not in counts or not whole:
        tuning_cache.logger.warning("a kept choice of threads is ignored: it makes no sense")
        return None
    return threads, times
