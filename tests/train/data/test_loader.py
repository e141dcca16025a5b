"""Where the loader stands, with and without Lightning around it."""

import logging

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from astrai_train.data.datasets import SEQDataset
from astrai_train.data.loader import ResumableLoader
from astrai_train.data.packing import PADDING
from astrai_train.data.ragged import Ragged
from astrai_train.data.sampler import ResumableDistributedSampler
from astrai_train.data.storage import Storage

ROWS = 11


def loader(num_workers=0, batch_size=3, rank=0, world_size=1, rows=ROWS, repeats=1):
    """Rows of two equal tokens: the number of the row."""
    ids = Ragged.of([[n, n] for n in range(rows)], np.uint16)
    storage = Storage("seq", {"input_ids": ids}, [("a", rows)], np.arange(rows))
    sampler = ResumableDistributedSampler(rows, seed=3, rank=rank, world_size=world_size)
    return ResumableLoader(SEQDataset(storage, 2, 0), sampler, batch_size, num_workers, repeats)


def numbers(batch):
    """The rows of a batch, None for one of padding."""
    used = batch["document_ids"][:, 0] != PADDING
    pairs = zip(batch["input_ids"][:, 0].tolist(), used.tolist(), strict=True)
    return [row if is_used else None for row, is_used in pairs]


def epochs(loader, count):
    return [[numbers(batch) for batch in loader] for _ in range(count)]


def test_an_epoch_has_each_row_once_and_full_batches():
    first, second = epochs(loader(), 2)
    assert first != second
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [3] * 4
        rows = [row for batch in epoch for row in batch]
        assert {*rows[:ROWS]} == {*range(ROWS)}
        assert rows[ROWS:] == [None]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 5, 8])
def test_a_saved_place_goes_on_as_if_nothing_happened(num_workers, batches):
    whole = [batch for epoch in epochs(loader(), 3) for batch in epoch]
    first = loader(num_workers)
    seen = []
    while len(seen) < batches:
        for batch in first:
            seen.append(numbers(batch))
            if len(seen) == batches:
                break
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    iter(resumed)  # Lightning makes iterators that it does not read
    rest = [batch for epoch in epochs(resumed, 2) for batch in epoch]
    assert seen == whole[:batches]
    assert rest[: len(whole) - batches] == whole[batches : batches + len(rest)]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_world_size_sees_the_rest_of_the_epoch_once(before, after):
    ranks = [loader(rank=r, world_size=before, batch_size=2) for r in range(before)]
    seen = [numbers(next(iter(one))) for one in ranks]
    state = ranks[0].state_dict()
    assert all(one.state_dict() == state for one in ranks)
    resumed = [loader(rank=r, world_size=after, batch_size=1) for r in range(after)]
    for one in resumed:
        one.load_state_dict(state)
    rest = [[numbers(batch) for batch in one] for one in resumed]
    assert len({len(one) for one in rest}) == 1
    rows = [row for one in [*seen, *(b for r in rest for b in r)] for row in one]
    assert sorted(row for row in rows if row is not None) == list(range(ROWS))


def test_breaking_off_begins_the_next_epoch():
    whole = epochs(loader(), 2)
    one = loader()
    next(iter(one))
    assert epochs(one, 1) == whole[1:]


def test_each_batch_can_be_handed_out_several_times():
    once = epochs(loader(), 2)
    thrice = epochs(loader(repeats=3), 2)
    assert thrice == [[batch for batch in epoch for _ in range(3)] for epoch in once]
    assert len(loader(repeats=3)) == len(thrice[0])


@pytest.mark.parametrize("batches", range(1, 10))
def test_a_place_between_repetitions_is_one_to_go_on_from(batches):
    whole = [batch for epoch in epochs(loader(rows=7, repeats=2), 3) for batch in epoch]
    first, seen = loader(rows=7, repeats=2), []
    while len(seen) < batches:
        for batch in first:
            seen.append(numbers(batch))
            if len(seen) == batches:
                break
    second = loader(rows=7, repeats=2)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(whole):
        seen += [numbers(batch) for batch in second]
    assert seen == whole


def test_an_epoch_broken_off_between_repetitions_is_over():
    broken = loader(repeats=2)
    next(iter(broken))
    assert [numbers(batch) for batch in broken] == epochs(loader(repeats=2), 2)[1]


def test_making_batches_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epochs(loader(), 2)
    assert torch.equal(torch.get_rng_state(), before)


class Counter(L.LightningModule):
    """Keeps the rows it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, numbers(batch)))
        return self.weight

    def validation_step(self, batch):
        assert len(batch["input_ids"]) == 3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Writes a checkpoint in a hook once so many batches were trained on."""

    def __init__(self, hook, batches, path):
        self._save = (batches, path)
        setattr(self, hook, self._at)

    def _at(self, trainer, module, *_):
        batches, path = self._save
        if len(module.seen) == batches:
            trainer.save_checkpoint(path)


def fit(callback=None, checkpoint=None, steps=10, accumulate=1):
    module = Counter()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps // accumulate,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        callbacks=callback,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=checkpoint)
    return module.seen


@pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*")
@pytest.mark.parametrize(
    ("hook", "batches", "accumulate"),
    [
        ("on_train_batch_end", 2, 1),
        ("on_train_batch_end", 2, 2),
        ("on_train_batch_end", 4, 1),
        ("on_train_batch_end", 4, 2),
        ("on_validation_end", 4, 1),
        ("on_train_epoch_end", 8, 1),
        ("on_train_batch_end", 9, 1),
    ],
)
def test_lightning_resumes_at_any_place(tmp_path, hook, batches, accumulate, caplog):
    caplog.set_level(logging.ERROR)
    path = tmp_path / "a.ckpt"
    whole = fit(SaveAt(hook, batches, path), accumulate=accumulate)
    assert len(whole) == 10
    assert fit(checkpoint=path, accumulate=accumulate) == whole[batches:]
