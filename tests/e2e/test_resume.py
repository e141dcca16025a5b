"""Real training processes, stopped wherever one can stop, end as the run that never was.

What is compared is all of it: weights, optimizer, schedule, place in the data, counters, random
numbers and the logged metrics, bit by bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer

HERE = Path(__file__).parent
PROGRAM = Path(sysconfig.get_path("scripts")) / "astrai-train"
SEED = int(os.environ.get("RESUME_SEED", time.time_ns() % 1_000_000))
OBJECTIVES = ("SEQ", "SFT")
STEPS = 14
"""Optimizer steps of a whole run: two epochs of 13 micro-batches, two to a step."""


class World:
    """A tokenizer, data and configurations, tiny, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = [f"{a} plus {b} is {a + b}. 你好，世界！" for a in range(9) for b in range(9)]
        tokenizer = AutoTokenizer.train(texts, 290)
        tokenizer.save_pretrained(folder / "tokenizer")
        shape = ModelConfig(
            vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, dim_ffn=32, n_heads=2
        )
        self.shape = {"vocab_size": shape.vocab_size, "dim": 16, "n_layers": 1, "dim_ffn": 32}
        AutoModel.save_pretrained(AutoModel.from_config(shape), folder / "model")
        _write_lines(folder / "SEQ.jsonl", [{"text": text} for text in texts])
        _write_lines(
            folder / "SFT.jsonl",
            [
                {
                    "messages": [
                        {"role": "user", "content": f"{a}+{a}?"},
                        {"role": "assistant", "content": f"{2 * a}, 你好"},
                    ]
                }
                for a in range(60)
            ],
        )

    def config(self, objective: str) -> Path:
        """Write a run's configuration; the folder of the run is given on the command line."""
        file = self.folder / f"{objective}.yaml"
        start = {"SEQ": {"model": self.shape | {"n_heads": 2}}}
        content = {
            "seed_everything": 7,
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "limit_train_batches": 13,
                "accumulate_grad_batches": 2,
                "val_check_interval": 4,
                "limit_val_batches": 2,
                "log_every_n_steps": 3,
                "callbacks": [{"class_path": "interruption.Interruption"}],
            },
            "checkpoint": {"every_n_steps": 2, "every_minutes": 0},
            "model": {
                "class_path": f"{objective}Module",
                "init_args": start.get(objective, {"init_from": str(self.folder / "model")})
                | {"compile": False, "schedule": {"warmup_steps": 3}},
            },
            "data": {
                "class_path": "TokenDataModule",
                "init_args": {
                    "tokenizer": str(self.folder / "tokenizer"),
                    "train": str(self.folder / f"{objective}.jsonl"),
                    "val": str(self.folder / f"{objective}.jsonl"),
                    "stage": objective.lower(),
                    "window_size": 32,
                    "batch_size": 2,
                },
            },
        }
        file.write_text(yaml.safe_dump(content))
        return file

    def start(
        self, run: str, objective: str = "SEQ", *options: str, **environment: str
    ) -> "subprocess.Popen[str]":
        """Start `astrai-train fit` in its own process."""
        command = [PROGRAM, "fit", "--config", self.config(objective)]
        return subprocess.Popen(
            [*command, "--trainer.default_root_dir", self.folder / run, *options],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def last(self, run: str) -> Path:
        """Return the newest checkpoint of a run."""
        return (self.folder / run / "checkpoints" / "last").resolve()


def end(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a process and check how it ended."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    """Read a process's output until a line has the text."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in {''.join(seen)}")


def differences(one: Path, other: Path) -> list[str]:
    """Name everything in which two checkpoints differ."""
    found = [] if one.name == other.name else [f"{one.name} != {other.name}"]
    for file in ("model.safetensors", "trainer/state.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        for name in sorted(ours.keys() | theirs.keys()):
            pair = ours.get(name), theirs.get(name)
            if pair[0] is None or pair[1] is None or _bits(pair[0]) != _bits(pair[1]):
                found.append(f"{file}: {name}")
    texts = ("config.json", "tokenizer.json", "trainer/state.json")
    return found + [file for file in texts if _json(one / file) != _json(other / file)]


def _json(file: Path) -> object:
    return json.loads(file.read_text(encoding="utf-8"))


def _bits(tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def _write_lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """One world, with a run of each objective that was never stopped."""
    world = World(tmp_path_factory.mktemp("resume"))
    runs = {objective: world.start(objective, objective) for objective in OBJECTIVES}
    for objective, process in runs.items():
        end(process)
        assert world.last(objective).name == f"step-{STEPS:08d}"
    return world


def assert_same_run(world: World, run: str, objective: str) -> None:
    assert differences(world.last(run), world.last(objective)) == []
    metrics = [(world.folder / name / "metrics.csv").read_text() for name in (run, objective)]
    assert metrics[0] == metrics[1]
    assert not list((world.folder / run / "checkpoints").glob(".tmp-*"))


def _say(text: str) -> None:
    print(text)  # noqa: T201 - with the seed in it, a failure can be had again


def kill_and_go_on(world: World, objective: str, moment: str, step: int, *options: str) -> None:
    run = f"{objective}-{moment}-{'-'.join(options)}"
    _say(f"{run}: SIGKILL at {moment} after step {step} (RESUME_SEED={SEED})")
    killed = world.start(run, objective, *options, INTERRUPT=f"{moment}:{step}")
    end(killed, -signal.SIGKILL)
    end(world.start(run, objective, *options))
    assert_same_run(world, run, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_goes_on_bit_by_bit(world, objective):
    step = random.Random(f"{SEED}{objective}").randrange(3, STEPS - 1)
    kill_and_go_on(world, objective, "window", step)


def test_sigterm_saves_and_the_run_goes_on(world):
    stopped = world.start("SIGTERM", "SEQ", SLOW="0.2")
    wait_for(stopped, "step 3 of 14")
    stopped.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in end(stopped, 143)
    end(world.start("SIGTERM"))
    assert_same_run(world, "SIGTERM", "SEQ")


def test_one_changed_bit_is_noticed(world, tmp_path):
    changed = tmp_path / world.last("SEQ").name
    shutil.copytree(world.last("SEQ"), changed)
    file = changed / "trainer" / "state.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "exp_avg_sq" in name)
    tensors[name].view(-1).numpy().view("uint32")[0] ^= 1
    save_file(tensors, file)
    assert differences(changed, world.last("SEQ")) == [f"trainer/state.safetensors: {name}"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", ["batch", "window", "validation", "epoch", "checkpoint"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_does_not_matter_when(world, objective, moment, workers):
    step = random.Random(f"{SEED}{objective}{moment}{workers}").randrange(2, STEPS - 1)
    options = ("--data.init_args.num_workers", str(workers))
    kill_and_go_on(world, objective, moment, min(step, 6) if moment == "epoch" else step, *options)


@pytest.mark.slow
def test_a_kill_from_outside_at_any_time(world):
    delay = random.Random(SEED).uniform(0, 3)
    _say(f"SIGKILL {delay:.2f} s after the first step (RESUME_SEED={SEED})")
    killed = world.start("outside", "SEQ", "--data.init_args.num_workers", "2", SLOW="0.15")
    wait_for(killed, "step 3 of 14")
    time.sleep(delay)
    killed.kill()
    end(killed, -signal.SIGKILL)
    end(world.start("outside"))
    assert_same_run(world, "outside", "SEQ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_again_and_again(world, number, code, workers):
    run = f"{number.name}-{workers}"
    for step in (3, 6, 9):
        stopped = world.start(run, "SEQ", "--data.init_args.num_workers", workers, SLOW="0.2")
        wait_for(stopped, f"step {step} of 14")
        stopped.send_signal(number)
        end(stopped, code)
    end(world.start(run))
    assert_same_run(world, run, "SEQ")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(world):
    stopped = world.start("twice", "SEQ", SLOW="60")
    wait_for(stopped, "starts")
    time.sleep(8)
    stopped.send_signal(signal.SIGINT)
    time.sleep(1)
    assert stopped.poll() is None
    stopped.send_signal(signal.SIGINT)
    begin = time.monotonic()
    end(stopped, -signal.SIGINT)
    assert time.monotonic() - begin < 5


def test_a_finished_run_says_so(world):
    output = end(world.start("SEQ"))
    assert "is finished" in output
    assert "raise trainer.max_steps or trainer.max_epochs" in output


def test_a_changed_setting_is_refused_by_its_name(world):
    output = end(world.start("SEQ", "SEQ", "--data.init_args.batch_size", "4"), 2)
    assert "data.init_args.batch_size was 2 and is now 4" in output
    assert "--fresh" in output
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_a_longer_horizon_goes_on_and_fresh_starts_over(world):
    shutil.copytree(world.folder / "SEQ", world.folder / "longer", symlinks=True)
    longer = ("--trainer.max_epochs", "3")
    assert "goes on from" in end(world.start("longer", "SEQ", *longer))
    assert world.last("longer").name == "step-00000021"
    assert "the earlier run is in" in end(world.start("longer", "SEQ", "--fresh"))
    assert_same_run(world, "longer", "SEQ")
    assert (world.folder / "longer" / "earlier-1" / "checkpoints" / "last").is_dir()
