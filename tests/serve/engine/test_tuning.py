"""Threads and pages are chosen by stated rules, from times and memory that tests make up."""

import json
import logging
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from astrai_core.compilation import private_cache
from astrai_core.machine import Cores, cores
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.model.fusion import fuse_
from astrai_core.model.packed import why_not_packed
from astrai_core.model.quantization import quantize_
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.cli import check_threads
from astrai_serve.engine import EngineConfig, tuning, tuning_cache
from astrai_serve.engine.core import EngineCore
from astrai_serve.engine.native_attention import why_not_native
from astrai_serve.engine.page_budget import RESERVE, SMALLEST, choose_pages
from astrai_serve.engine.step_probe import LIMIT_SECONDS, Clocks, Samples, StepProbe, measuring
from astrai_serve.engine.tuning import (
    best,
    candidates,
    choose_threads,
    is_native,
    measured,
    why_unsound,
)

MB = 10**6


def cores_of(count, physical=None, quota=None):
    return Cores(mask=tuple(range(count)), physical=physical or count, quota=quota)


@dataclass
class FakeSteps:
    """Steps that take as long as they are told to, by a clock of their own."""

    KINDS: ClassVar[tuple[str, ...]] = ("alone", "several", "prompt")
    seconds: dict[int, tuple[float, float, float]]
    share: float = 1.0
    now: float = 0.0
    own: float = 0.0
    threads: int = 0
    ran: list[tuple[int, str]] = field(default_factory=list)

    def use(self, threads):
        self.threads = threads

    def run(self, kind):
        self.ran.append((self.threads, kind))
        took = self.seconds[self.threads][self.KINDS.index(kind)]
        self.now += took
        self.own += took * self.share

    def measure(self):
        return sampled(self, list(self.seconds), self.use, self.clocks)

    @property
    def clocks(self):
        return Clocks(wall=lambda: self.now, thread=lambda: self.own)


def sampled(*arguments):
    """Measure without a pause."""
    steps, counts, use_threads, *clocks = arguments
    samples = Samples()
    for _ in measuring(steps, counts, use_threads, samples, *clocks):
        pass
    return samples


@pytest.mark.parametrize(
    ("machine", "counts"),
    [
        (cores_of(1), [1]),
        (cores_of(2), [1, 2]),
        (cores_of(6), [1, 2, 4, 6]),
        (cores_of(12, physical=6), [1, 2, 4, 6, 8, 12]),
        (cores_of(8, quota=3.5), [1, 2, 3]),
        (cores_of(8, quota=0.5), [1]),
        (cores_of(4, quota=16.0), [1, 2, 4]),
    ],
)
def test_powers_of_two_physical_cores_and_the_most_that_run_are_tried(machine, counts):
    assert candidates(machine) == counts


@pytest.mark.parametrize(
    ("times", "threads"),
    [
        ({1: (4, 8, 16), 2: (2, 4, 8)}, 2),
        ({1: (1, 1, 1), 2: (1.01, 1, 1)}, 1),
        ({1: (1.02, 1.02, 1.02), 2: (1, 1, 1)}, 1),  # nearly as good, with fewer
        ({1: (1.05, 1.05, 1.05), 2: (1, 1, 1)}, 2),
        ({1: (1, 1, 4), 2: (1.5, 1.5, 2), 4: (3, 3, 1)}, 1),  # products 4, 4.5 and 9
        ({1: (1, 1, 4), 2: (1.2, 1.2, 2), 4: (3, 3, 1)}, 2),  # 2.88 is less than 4
    ],
)
def test_the_lowest_mean_ratio_wins_and_fewer_threads_where_it_is_nearly_as_low(times, threads):
    assert best(times) == threads


def test_rounds_are_repeated_and_the_first_is_not_counted():
    steps = FakeSteps({1: (0.01, 0.02, 0.1), 2: (0.006, 0.01, 0.05)})
    samples = steps.measure()
    assert {n: [min(t) for t in row] for n, row in samples.times.items()} == {
        1: pytest.approx([0.01, 0.02, 0.1]),
        2: pytest.approx([0.006, 0.01, 0.05]),
    }
    rounds = len(samples.times[1][0])
    assert rounds >= 3
    assert steps.ran.count((1, "prompt")) == rounds + 1  # the one for warming up
    assert samples.seconds == pytest.approx(steps.now - 0.006)  # but for what may compile
    assert samples.seconds < 2
    assert why_unsound(samples) is None


def test_a_tiny_model_is_measured_in_a_moment_and_a_large_one_within_the_limit():
    tiny = FakeSteps({1: (1e-4, 2e-4, 1e-3), 2: (1e-4, 2e-4, 1e-3)}).measure()
    assert tiny.seconds < 0.1
    large = FakeSteps({1: (0.2, 0.4, 2.5), 2: (0.1, 0.2, 1.3)}).measure()
    assert large.seconds < LIMIT_SECONDS + 2.5
    assert best({n: [min(t) for t in row] for n, row in large.times.items()}) == 2
    assert why_unsound(large) is None


def test_a_model_that_is_too_slow_to_try_costs_two_steps():
    steps = FakeSteps({1: (9.0, 30.0, 99.0), 2: (5.0, 15.0, 50.0)})
    samples = steps.measure()
    assert steps.ran == [(2, "alone")] * 2  # one that may compile, and one that is timed
    assert "too long to try" in (why_unsound(samples) or "")


def test_a_busy_machine_is_known_by_its_share_and_by_scatter():
    busy = FakeSteps({1: (0.01, 0.02, 0.1), 2: (0.01, 0.02, 0.1)}, share=0.6).measure()
    assert "60%" in (why_unsound(busy) or "")
    equal = Samples(times={1: [[1.0, 1.1, 1.0]] * 3}, shares=[1.0])
    assert why_unsound(equal) is None
    scattered = Samples(times={1: [[1.0, 1.6, 1.5]] * 3}, shares=[1.0])
    assert "differ by 50%" in (why_unsound(scattered) or "")


def test_what_goes_wrong_in_the_probe_is_raised_to_the_caller():
    class Broken(FakeSteps):
        def run(self, kind):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken({1: (1, 1, 1), 2: (1, 1, 1)}).measure()


def test_what_is_done_between_two_steps_changes_nothing_of_the_times():
    steps = FakeSteps({1: (0.01, 0.02, 0.1), 2: (0.006, 0.01, 0.05)})
    alone, samples = steps.measure(), Samples()
    for _ in measuring(steps, [1, 2], steps.use, samples, steps.clocks):
        steps.use(1)  # the engine's own count, for tasks that take an hour
        steps.now += 3600
    assert samples.seconds == pytest.approx(alone.seconds)
    assert samples.times[2] == [pytest.approx(row) for row in alone.times[2]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, dim_ffn=16, max_len=64)
    return Transformer(shape).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A private cache folder, and no word about threads in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.THREADS_VARIABLE, raising=False)
    return tmp_path / "astrai" / "tuning"


@pytest.fixture
def probes(monkeypatch):
    """Steps on two threads take half the time; each measurement is noted."""
    made: list[FakeSteps] = []

    def fake(steps, counts, use_threads, samples, clocks):
        fakes = FakeSteps({n: (0.01 / n, 0.02 / n, 0.04 / n) for n in counts})
        made.append(fakes)
        return measuring(fakes, counts, fakes.use, samples, fakes.clocks)

    monkeypatch.setattr(tuning, "measuring", fake)
    return made


def choose(model, machine=None, **settings):
    """What a server computes on when it has been idle for a while."""
    config, machine = EngineConfig(**settings), machine or cores_of(2)
    choice = choose_threads(model, config, machine=machine)
    return (
        choice if not choice.is_guess else end_of(measured(model, config, choice, machine=machine))
    )


def end_of(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def test_before_anything_is_measured_each_physical_core_has_a_thread(model, cache, probes):
    choice = choose_threads(model, EngineConfig(), machine=cores_of(8, physical=4))
    assert (choice.threads, choice.is_guess) == (4, True)
    limited = choose_threads(model, EngineConfig(), machine=cores_of(8, physical=4, quota=2.5))
    assert limited.threads == 2
    assert not probes


def test_the_second_start_reads_what_the_first_one_measured(model, cache, probes):
    first, second = choose(model), choose(model)
    assert len(probes) == 1
    assert (first.threads, second.threads) == (2, 2)
    assert first.speeds == second.speeds
    assert second.speeds[2] == pytest.approx((200, 800, 64 / 0.02))
    assert "measured in" in first.why
    assert "earlier start" in second.why
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    choose(model, max_context=32)
    choose(model.bfloat16())
    choose(model, cores_of(2, quota=2.0))
    assert len(probes) == 4  # of another context, precision and quota nothing was known


def test_of_a_count_that_was_asked_for_the_speed_alone_is_measured(model, cache, probes):
    config = EngineConfig(num_threads=2)
    choice = choose_threads(model, config, machine=cores_of(4))
    assert choice.speed is None
    known = end_of(measured(model, config, choice, machine=cores_of(4)))
    assert (known.threads, known.why, known.is_guess) == (2, "as asked for", False)
    assert known.speed == pytest.approx((200, 800, 64 / 0.02))
    assert set(known.speeds) == {2}
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[1]", "null", '{"facts": {}, "result": {"threads": 1}}', b"\xff\xfe", "x" * 200_000],
)
def test_a_damaged_file_is_ignored_with_a_word_and_replaced(model, cache, probes, caplog, damage):
    choose(model)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with caplog.at_level(logging.WARNING):
        assert choose(model).threads == 2
    assert "ignored" in caplog.text
    assert len(probes) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 3}, {"threads": True}, {"threads": "2"}, {"times": None}, {"times": {"1": []}},
        {"times": {"1": [1.0, 1.0, 1.0], "2": [1.0, -1.0, 1.0]}},
        {"times": {"1": [1.0, 1.0, 1.0], "2": [1.0, float("nan"), 1.0]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_that_makes_no_sense_is_measured_again(model, cache, probes, caplog, change):
    choose(model)
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    content["result"] |= change
    file.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert choose(model).threads == 2
    assert "makes no sense" in caplog.text
    assert len(probes) == 2


def test_files_of_others_links_and_pipes_are_ignored(model, cache, probes, caplog, monkeypatch):
    choose(model)
    (file,) = cache.iterdir()
    file.chmod(0o666)
    choose(model)
    assert "can be written by others" in caplog.text
    target = cache.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)
    choose(model)
    assert not file.is_symlink()
    file.unlink()
    os.mkfifo(file)
    choose(model)
    assert "no file of ours" in caplog.text
    assert len(probes) == 4
    uid = os.geteuid()
    monkeypatch.setattr(tuning_cache.os, "geteuid", lambda: uid + 1)
    choose(model)
    assert "belongs to another user" in caplog.text
    assert len(probes) == 5


def test_a_cache_that_cannot_be_kept_is_said_and_the_choice_holds(
    model, cache, probes, caplog, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert choose(model).threads == 2
    assert "cannot be kept" in caplog.text


def test_what_was_asked_for_is_not_measured(model, cache, probes, monkeypatch):
    assert choose(model, num_threads=1).why == "as asked for"
    assert choose_threads(model, EngineConfig(), machine=cores_of(1)).threads == 1
    monkeypatch.setenv(tuning.THREADS_VARIABLE, "1")
    assert choose(model).why == "as OMP_NUM_THREADS says"
    assert not probes


def test_nothing_is_kept_of_a_busy_machine(model, cache, monkeypatch):
    busy = FakeSteps({1: (0.01, 0.02, 0.1), 2: (0.01, 0.02, 0.1)}, share=0.5)
    monkeypatch.setattr(
        tuning,
        "measuring",
        lambda _, counts, use, samples, clocks: measuring(
            busy, counts, busy.use, samples, busy.clocks
        ),
    )
    choice = choose(model)
    assert (choice.threads, choice.is_guess) == (2, True)
    assert "busy" in choice.why
    assert list(cache.iterdir()) == []


def test_the_steps_of_a_real_model_run(model):
    probe = StepProbe(model, EngineConfig(page_size=4, max_running_tasks=3))
    before = torch.get_num_threads()
    samples = sampled(probe, [1, 2], torch.set_num_threads)
    torch.set_num_threads(before)
    assert samples.times.keys() == {1, 2}
    assert all(min(times) > 0 for row in samples.times.values() for times in row)
    assert probe.speeds({1: (0.5, 0.5, 0.5)}) == {1: (2, 6, 128)}


def budget(**changes):
    facts = {
        "page_bytes": MB, "context_pages": 25, "page_size": 32, "max_running_tasks": 32,
        "weight_bytes": 53 * MB, "available": 16_000 * MB,
    }  # fmt: skip
    return choose_pages(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "pages", "why"),
    [
        ({}, 125, "a small model's share"),
        ({"available": None}, 125, "not known"),
        ({"weight_bytes": 1_000 * MB}, 500, "half of what the weights take"),
        ({"context_pages": 600}, 600, "one full context"),
        ({"context_pages": 2}, 64, "32 full contexts, all that can run"),
        ({"context_pages": 25, "max_running_tasks": 1}, 25, "1 full contexts, all that can run"),
        # 600 MB available leave 100 to spare, of which half is 50
        ({"available": RESERVE + 100 * MB}, 50, "half of what is to spare"),
        ({"available": RESERVE + 30 * MB}, 25, "one full context"),
        ({"available": RESERVE + 20 * MB}, 20, "does not suffice"),
        ({"available": 0}, 16, "does not suffice"),  # 512 tokens
        ({"available": 0, "context_pages": 4}, 4, "does not suffice"),
    ],
)
def test_pages_follow_from_weights_context_and_memory(changes, pages, why):
    chosen = budget(**changes)
    assert chosen.num_pages == pages
    assert why in chosen.why


def test_a_model_of_a_billion_holds_a_full_context_where_memory_allows():
    # 16 layers of 8 heads of 128, bfloat16: 65,536 bytes a token, 8,192 tokens
    facts = {"page_bytes": 32 * 65_536, "context_pages": 256, "weight_bytes": 1_100 * MB}
    assert budget(**facts).num_pages >= 256
    assert budget(**facts, available=RESERVE + 256 * 32 * 65_536).num_pages == 256
    assert budget(**facts, available=RESERVE + 100 * 32 * 65_536).num_pages == 100
    assert budget(**facts).num_pages * 32 * 65_536 <= 550 * MB


def test_the_engine_takes_the_budget_and_says_why(model, monkeypatch):
    core = EngineCore.of_model(model, None, EngineConfig(page_size=4))
    assert core.scheduler.kv.pool.num_pages == 32 * 64 // 4
    assert "32 full contexts" in core.why_pages
    assert SMALLEST > 32 * 64 * 2 * 16 * 4  # which is less than a small model may take
    asked = EngineCore.of_model(model, None, EngineConfig(num_pages=7, page_size=4))
    assert (asked.scheduler.kv.pool.num_pages, asked.why_pages) == (7, "as asked for")
    tight = EngineCore.of_model(model, None, EngineConfig(kv_cache_gb=1e-9, page_size=4))
    assert (tight.scheduler.kv.pool.num_pages, tight.why_pages) == (16, "one full context")


# however busy the machine of the tests is, what was measured is kept
START = """
from astrai_serve.engine import step_probe, tuning
tuning.MOST_SCATTER, tuning.LEAST_SHARE = float("inf"), 0.0
step_probe.SLOW_SECONDS = step_probe.LIMIT_SECONDS = 60.0
from astrai_serve.cli import main
main()
"""


def report_of_a_start(folder, cache, last):
    """Start a server as a user does, and end it once it has said its last word."""
    environment = {k: v for k, v in os.environ.items() if k != tuning.THREADS_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-c", START, "--model", folder, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"XDG_CACHE_HOME": str(cache)},
    )
    assert process.stdout is not None
    lines: list[str] = []
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if last in line:
                break
        process.kill()
        process.wait()
    return "".join(lines)


@pytest.mark.skipif(cores().most == 1, reason="with one core there is nothing to choose")
def test_a_server_measures_while_it_is_idle_and_reads_at_the_next_start(model, tmp_path):
    AutoModel.save_pretrained(Transformer(replace(model.config, vocab_size=300)), tmp_path / "m")
    AutoTokenizer.train(["hello 你好"] * 9, 300).save_pretrained(tmp_path / "m")
    (tmp_path / "cache/astrai").mkdir(parents=True)
    # what is compiled for this machine need not be compiled again
    (tmp_path / "cache/astrai/kernels").symlink_to(private_cache("kernels"))
    first = report_of_a_start(tmp_path / "m", tmp_path / "cache", "measured in")
    assert "until it is measured" in first, first
    assert "32 full contexts, all that can run" in first
    (file,) = Path(tmp_path / "cache/astrai/tuning").iterdir()
    kept = json.loads(file.read_text())["result"]
    second = report_of_a_start(tmp_path / "m", tmp_path / "cache", "  stop ")
    assert "measured at an earlier start" in second, second
    assert f"  threads   {kept['threads']}, " in second
    file.write_text(file.read_text()[:100])
    third = report_of_a_start(tmp_path / "m", tmp_path / "cache", "measured in")
    assert "a kept choice of threads is ignored" in third, third
    assert "measured in" in third
    assert json.loads(file.read_text())["facts"]


def test_more_threads_than_cores_are_refused_before_anything_is_loaded():
    most = len(cores().mask)
    with pytest.raises(ValueError, match=f"--num_threads {most + 1} exceeds the {most} cores"):
        check_threads(EngineConfig(num_threads=most + 1))
    check_threads(EngineConfig(num_threads=most))
    check_threads(EngineConfig())


LATENT = {
    "attn_type": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "use_qk_norm": False,
}  # fmt: skip
EXPERTS = {
    "ffn_type": "moe", "n_routed_experts": 4, "n_activated_experts": 2, "dim_ffn_expert": 8
}  # fmt: skip
KINDS = {"gqa": {}, "mla": LATENT, "experts": EXPERTS, "mla, experts": LATENT | EXPERTS}


@pytest.mark.skipif(
    why_not_packed() is not None or why_not_native() is not None, reason="no packed products here"
)
@pytest.mark.parametrize("fields", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("scheme", ["w8a8", "int8"])
def test_in_packed_int8_torchs_threads_sleep_whatever_the_blocks_are(fields, scheme):
    shape: dict[str, Any] = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2}
    model = Transformer(ModelConfig(**shape, **fields)).eval()
    assert not is_native(model)
    quantize_(model, scheme)
    assert is_native(fuse_(model)) == (scheme == "w8a8")
