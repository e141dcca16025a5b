"""Real training processes, stopped wherever one can stop, end as the run that never was.

What is compared is all of it: weights, optimizer, schedule, place in the data, counters, random
numbers and the logged metrics, bit by bit.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from astrai_core.model import AutoModel, ModelConfig
from astrai_core.tokenizer import AutoTokenizer
from astrai_train.cli import main

from .objectives import MOMENTS, OBJECTIVES

HERE = Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["astrai_train.run"])
TIMEOUT = 240
SEED = int(os.environ.get("RESUME_SEED", time.time_ns() % 1_000_000))
STEPS = 14
"""Optimizer steps of a whole run: two epochs of 13 micro-batches, two to a step."""


class World:
    """A tokenizer, data and configurations, tiny, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = [record["text"] for record in OBJECTIVES["SEQ"]().records]
        tokenizer = AutoTokenizer.train(texts, 290)
        tokenizer.save_pretrained(folder / "tokenizer")
        shape = ModelConfig(**OBJECTIVES["SEQ"]().model["model"])
        AutoModel.save_pretrained(AutoModel.from_config(shape), folder / "model")
        for name, make in OBJECTIVES.items():
            _write_lines(folder / f"{name}.jsonl", make().records)

    def config(self, objective: str) -> Path:
        """Write a run's configuration; the folder of the run is given on the command line."""
        file = self.folder / f"{objective}.yaml"
        given = OBJECTIVES[objective]()
        name = objective.partition("-")[0]
        start = {} if "model" in given.model else {"init_from": str(self.folder / "model")}
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
            "checkpoint": {"every_n_steps": 2, "every_minutes": 0} | given.checkpoint,
            "model": {
                "class_path": f"{name}Module",
                "init_args": start
                | given.model
                | {"compile": False, "schedule": {"warmup_steps": 3}},
            },
            "data": {
                "class_path": "TokenDataModule",
                "init_args": {
                    "tokenizer": str(self.folder / "tokenizer"),
                    "train": str(self.folder / f"{objective}.jsonl"),
                    "val": str(self.folder / f"{objective}.jsonl"),
                    "stage": name.lower(),
                    "window_size": 32,
                    "batch_size": 2,
                }
                | given.data,
            },
        }
        file.write_text(yaml.safe_dump(content))
        return file

    def start(
        self, run: str, objective: str = "SEQ", *options: str, **environment: str
    ) -> "Training":
        """Start `astrai-train fit` in its own process."""
        config, folder = str(self.config(objective)), str(self.folder / run)
        options = ("fit", "--config", config, "--trainer.default_root_dir", folder, *options)
        return Training(self.folder / f"{run}.txt", options, environment)

    def last(self, run: str) -> Path:
        """Return the newest checkpoint of a run."""
        return (self.folder / run / "checkpoints" / "last").resolve()


class Training:
    """A training process, forked from one that has imported Lightning, which takes seconds."""

    def __init__(self, log: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.log = log
        log.unlink(missing_ok=True)
        self.process = FORKS.Process(target=_train, args=(log, list(arguments), environment))
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, text: str) -> None:
        """Wait until the output has a text."""
        while text not in self.output:
            assert self.process.is_alive(), self.output
            time.sleep(0.01)

    def end(self, code: int = 0) -> str:
        """Wait for the end and check how it came."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode == code, self.output
        return self.output


def _train(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.path.insert(0, str(HERE))
    # what Lightning starts for another rank
    sys.argv = [str(Path(sys.executable).with_name("astrai-train")), *arguments]
    paths = (str(HERE), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    torch.set_num_threads(1)
    # loaders' workers as a user has them
    multiprocessing.set_start_method("fork", force=True)
    main(arguments)


def differences(one: Path, other: Path) -> list[str]:
    """Name everything in which two checkpoints differ."""
    found = [] if one.name == other.name else [f"{one.name} != {other.name}"]
    files = {path.name for folder in (one, other) for path in folder.glob("*.safetensors")}
    for file in (*sorted(files), "trainer/state.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        for name in sorted(ours.keys() | theirs.keys()):
            pair = ours.get(name), theirs.get(name)
            if pair[0] is None or pair[1] is None or _bits(pair[0]) != _bits(pair[1]):
                found.append(f"{file}: {name}")
    configs = {path.name for folder in (one, other) for path in folder.glob("*config.json")}
    texts = (*sorted(configs), "tokenizer.json", "trainer/state.json")
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
        process.end()
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
    killed.wait_for("reached")
    killed.send(signal.SIGKILL)
    killed.end(-signal.SIGKILL)
    world.start(run, objective, *options).end()
    assert_same_run(world, run, objective)


QUICK = [("SEQ", moment) for moment in MOMENTS] + [("SFT", "window"), ("DPO", "window")]
QUICK += [("GRPO", "rollout"), ("GRPO-updates", "batch"), ("SFT-LoRA", "window")]
ALL = [(name, moment) for name, make in OBJECTIVES.items() for moment in make().moments]


@pytest.mark.parametrize(("objective", "moment"), QUICK)
def test_a_killed_run_goes_on_bit_by_bit(world, objective, moment):
    kill_and_go_on(world, objective, moment, _drawn_step(objective, moment))


def _drawn_step(*what: object) -> int:
    """After which step to stop; the last epoch's edge is no place to go on from."""
    step = random.Random(f"{SEED}{what}").randrange(2, STEPS - 1)
    return min(step, 6) if "epoch" in what else step


def test_a_run_goes_on_after_its_time_is_up(world):
    """Again and again with the same command, each time for two seconds of training."""
    command = ("timed", "SEQ", "--trainer.max_time", "00:00:00:02")
    for _ in range(20):
        if "finished" in (output := world.start(*command, SLOW="0.2").end()):
            break
        assert "trainer.max_time is over after step" in output
    else:
        pytest.fail("the run never ends")
    assert_same_run(world, "timed", "SEQ")


def test_sigterm_saves_and_the_run_goes_on(world):
    stopped = world.start("SIGTERM", "SEQ", SLOW="0.2")
    stopped.wait_for("step 3 of 14")
    stopped.send(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in stopped.end(143)
    world.start("SIGTERM").end()
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
@pytest.mark.parametrize(("objective", "moment"), ALL)
def test_it_does_not_matter_when(world, objective, moment, workers):
    step = _drawn_step(objective, moment, workers)
    kill_and_go_on(world, objective, moment, step, "--data.init_args.num_workers", str(workers))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "moment"), ALL)
def test_sigterm_anywhere_saves_and_the_run_goes_on(world, objective, moment):
    run, step = f"{objective}-{moment}-SIGTERM", _drawn_step(objective, moment)
    _say(f"{run}: at {moment} after step {step} (RESUME_SEED={SEED})")
    stopped = world.start(run, objective, INTERRUPT=f"{moment}:{step}")
    stopped.wait_for("reached")
    stopped.send(signal.SIGTERM)
    stopped.send(signal.SIGCONT)
    stopped.end(143)
    world.start(run, objective).end()
    assert_same_run(world, run, objective)


@pytest.mark.slow
def test_a_compiled_run_goes_on_bit_by_bit(world):
    compiled = ("--model.init_args.compile", "true")
    world.start("compiled", "SEQ", *compiled).end()
    step = _drawn_step("compiled")
    _say(f"compiled: SIGKILL in a window after step {step} (RESUME_SEED={SEED})")
    killed = world.start("compiled-killed", "SEQ", *compiled, INTERRUPT=f"window:{step}")
    killed.wait_for("reached")
    killed.send(signal.SIGKILL)
    killed.end(-signal.SIGKILL)
    world.start("compiled-killed", "SEQ", *compiled).end()
    assert differences(world.last("compiled-killed"), world.last("compiled")) == []


@pytest.mark.slow
def test_a_killed_run_has_the_same_best_checkpoint(world):
    """A rate so high that the last weights are not the best ones."""
    options = ("--checkpoint.best", "val/loss", "--checkpoint.keep", "1")
    options += ("--model.init_args.optimizer.lr", "0.3")

    def best(run: str) -> Path:
        return (world.folder / run / "checkpoints" / "best").resolve()

    world.start("best", "SEQ", *options).end()
    assert best("best").is_dir()
    assert best("best") != world.last("best")
    for moment in MOMENTS:
        run, step = f"best-{moment}", _drawn_step("best", moment)
        _say(f"{run}: SIGKILL after step {step} (RESUME_SEED={SEED})")
        killed = world.start(run, "SEQ", *options, INTERRUPT=f"{moment}:{step}")
        killed.wait_for("reached")
        killed.send(signal.SIGKILL)
        killed.end(-signal.SIGKILL)
        world.start(run, "SEQ", *options).end()
        assert differences(world.last(run), world.last("best")) == []
        assert differences(best(run), best("best")) == []
        kept = [{p.name for p in one.parent.iterdir()} for one in (best(run), best("best"))]
        assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_kill_from_outside_at_any_time(world):
    delay = random.Random(SEED).uniform(0, 3)
    _say(f"SIGKILL {delay:.2f} s after the first step (RESUME_SEED={SEED})")
    killed = world.start("outside", "SEQ", "--data.init_args.num_workers", "2", SLOW="0.15")
    killed.wait_for("step 3 of 14")
    time.sleep(delay)
    killed.send(signal.SIGKILL)
    killed.end(-signal.SIGKILL)
    world.start("outside").end()
    assert_same_run(world, "outside", "SEQ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_again_and_again(world, number, code, workers):
    run = f"{number.name}-{workers}"
    for step in (3, 6, 9):
        stopped = world.start(run, "SEQ", "--data.init_args.num_workers", workers, SLOW="0.2")
        stopped.wait_for(f"step {step} of 14")
        stopped.send(number)
        stopped.end(code)
    world.start(run).end()
    assert_same_run(world, run, "SEQ")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(world):
    stopped = world.start("twice", "SEQ", SLOW="60")
    stopped.wait_for("pausing")
    stopped.send(signal.SIGINT)
    time.sleep(1)
    assert stopped.process.is_alive()
    stopped.send(signal.SIGINT)
    begin = time.monotonic()
    stopped.end(-signal.SIGINT)
    assert time.monotonic() - begin < 5


def test_a_finished_run_says_so(world):
    output = world.start("SEQ").end()
    assert "is finished" in output
    assert "raise trainer.max_steps or trainer.max_epochs" in output


def test_a_changed_setting_is_refused_by_its_name(world):
    output = world.start("SEQ", "SEQ", "--model.init_args.optimizer.lr", "0.5").end(2)
    assert "optimizer.lr was" in output
    assert "--fresh" in output
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_a_longer_horizon_goes_on_and_fresh_starts_over(world):
    shutil.copytree(world.folder / "SEQ", world.folder / "longer", symlinks=True)
    longer = ("--trainer.max_epochs", "3")
    assert "goes on from" in world.start("longer", "SEQ", *longer).end()
    assert world.last("longer").name == "step-00000021"
    assert "the earlier run is in" in world.start("longer", "SEQ", "--fresh").end()
    assert_same_run(world, "longer", "SEQ")
    assert (world.folder / "longer" / "earlier-1" / "checkpoints" / "last").is_dir()
