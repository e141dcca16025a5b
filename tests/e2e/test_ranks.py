"""Runs of several gloo ranks, and runs that go on with another number of them."""

import signal
from collections import defaultdict

import psutil
import pytest
from safetensors.torch import load_file

from astrai_core.checkpoint import load_entry

from .test_resume import OBJECTIVES, Training, World, differences

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
# no limit: one counts micro-batches, whose rows change here; and the horizon must not tell
WHOLE = ("--trainer.limit_train_batches", "null", "--model.init_args.schedule.total_steps", "22")
QUICK = (*WHOLE, "--trainer.limit_val_batches", "0", "--checkpoint.every_n_steps", "0")
BATCH, ACCUMULATE = "--data.init_args.batch_size", "--trainer.accumulate_grad_batches"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("ranks"))


def rows_of_steps(world: World, run: str) -> dict[int, list[int]]:
    """Return the rows of each optimizer step, of all ranks and processes."""
    steps = defaultdict(list)
    for line in (world.folder / run / "seen.txt").read_text().splitlines():
        step, _, rows = line.partition(" ")
        steps[int(step)] += [int(row) for row in rows.split(",") if row != "-1"]
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.dist
def test_a_run_goes_on_with_two_ranks_and_back_with_one(world):
    """2 rows x 2, then 2 ranks x 2 rows, then 1 row x 4; the epoch ends while there are two."""
    alone = world.start("alone", "SEQ", *QUICK)
    world.start("ranks", "SEQ", *QUICK, "--trainer.max_steps", "4").end()
    spread = (*TWO, ACCUMULATE, "1")
    alone.end()
    world.start("ranks", "SEQ", *QUICK, *spread, "--trainer.max_steps", "15").end()
    layout = load_entry(world.last("ranks") / "trainer", "layout")
    assert layout == {"devices": 2, "accumulate": 1, "batch_size": 2, "repeats": 1}
    output = world.start("ranks", "SEQ", *QUICK, BATCH, "1", ACCUMULATE, "4").end()
    assert "step-00000015" in output
    seen = rows_of_steps(world, "ranks")
    assert seen == rows_of_steps(world, "alone")
    assert len(seen) == 22
    epoch = sorted(row for step in range(len(seen) // 2) for row in seen[step])
    assert epoch == list(range(len(epoch)))
    one, other = (load_file(world.last(run) / "model.safetensors") for run in ("alone", "ranks"))
    assert world.last("ranks").name == world.last("alone").name
    for name, weights in one.items():
        assert (weights - other[name]).norm() <= 1e-5 * weights.norm(), name


def test_other_rows_in_a_step_are_refused(world):
    world.start("refused", "SEQ", "--trainer.max_steps", "2").end()
    output = world.start("refused", "SEQ", "--trainer.max_steps", "4", *TWO).end(2)
    assert "the run had 4 rows an optimizer step" in output
    assert "and now it would have 8 (data.batch_size 2 x" in output
    assert len(output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["window:5", "window:11", "validation:8", "validation:10"])
def test_micro_batches_of_twice_the_rows_go_on_from_any_moment(world, moment):
    """Step 11 ends an epoch; the validation after step 8 is due then too, that after 10 is not."""
    alone, killed_at = f"{moment}-alone", int(moment.rpartition(":")[2])
    options = (*WHOLE, "--checkpoint.every_n_steps", "1")
    world.start(alone, "SEQ", *options).end()
    killed = world.start(moment, "SEQ", *options, INTERRUPT=moment)
    killed.wait_for("reached")
    killed.send(signal.SIGKILL)
    killed.end(-signal.SIGKILL)
    assert world.last(moment).name == f"step-{killed_at:08d}"
    before = rows_of_steps(world, moment)
    (world.folder / moment / "seen.txt").unlink()
    world.start(moment, "SEQ", *options, BATCH, "4", ACCUMULATE, "1").end()
    after = rows_of_steps(world, moment)
    assert {step: before[step] for step in range(killed_at)} | after == rows_of_steps(world, alone)
    one, other = (load_file(world.last(run) / "model.safetensors") for run in (alone, moment))
    for name, weights in one.items():
        assert (weights - other[name]).norm() <= 1e-5 * weights.norm(), name


def kill_ranks(training: Training) -> None:
    """Kill all ranks, each of which has stopped itself."""
    while training.output.count("reached") < 2:
        assert training.process.is_alive(), training.output
    first = psutil.Process(training.process.pid)
    for one in (*first.children(), first):
        one.kill()
    training.end(-signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_go_on_bit_by_bit(world, objective):
    """That of GRPO in the middle of a rollout, of which each rank has its own."""
    world.start(f"{objective}-2", objective, *TWO).end()
    run = f"{objective}-2-killed"
    kill_ranks(world.start(run, objective, *TWO, INTERRUPT="batch:5"))
    world.start(run, objective, *TWO).end()
    assert differences(world.last(run), world.last(f"{objective}-2")) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sigterm_to_one_rank_stops_both(world, objective):
    run = f"{objective}-2-SIGTERM"
    stopped = world.start(run, objective, *TWO, SLOW="0.2")
    stopped.wait_for("step 3 of")  # ranks have fewer steps where the data ends before the limit
    stopped.send(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in stopped.end(143)
    world.start(run, objective, *TWO).end()
    world.start(f"{run}-whole", objective, *TWO).end()
    assert differences(world.last(run), world.last(f"{run}-whole")) == []
