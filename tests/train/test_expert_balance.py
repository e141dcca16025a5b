from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from astrai_core.model import ModelConfig, Transformer
from astrai_core.model.moe import Router, Routing
from astrai_train.expert_balance import BalanceConfig, ExpertBalance, RowLoads, count_loads
from astrai_train.losses import IGNORED
from astrai_train.modules import SEQModule
from astrai_train.optim import OptimizerConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 2,
    "max_len": 32,
    "ffn_type": "moe",
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "dim_ffn_expert": 12,
    "first_k_dense": 1,
}
MOE = ModelConfig(**SHAPE, moe_topk_method="noaux_tc", moe_scoring="sigmoid", norm_topk_prob=True)
ROWS, LENGTH = 8, 12


def make_rows() -> dict[str, Tensor]:
    """Row n has n labels; the last three tokens of each row are padding."""
    ids = torch.randint(40, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    position = torch.arange(LENGTH).repeat(ROWS, 1)
    is_token = position < LENGTH - 3
    learned = is_token & (position < torch.arange(ROWS)[:, None])
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:].masked_fill(~learned, IGNORED),
        "position_ids": position,
        "document_ids": torch.where(is_token, 0, -1),
    }


class Batches:
    """A loader in its simplest form; Lightning takes a list for several loaders."""

    def __init__(self, rows: dict[str, Tensor], batch_size: int):
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return len(self.rows["labels"]) // self.batch_size

    def __iter__(self):
        for n in range(0, len(self.rows["labels"]), self.batch_size):
            yield {name: value[n : n + self.batch_size] for name, value in self.rows.items()}


class Rows(L.LightningDataModule):
    """The rows in micro-batches, split over ranks by turns."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size, self.num_train_batches = batch_size, ROWS // batch_size

    def train_dataloader(self) -> Batches:
        trainer = self.trainer
        assert trainer is not None
        rows = {k: v[trainer.global_rank :: trainer.world_size] for k, v in make_rows().items()}
        return Batches(rows, self.batch_size)

    def val_dataloader(self) -> Batches:
        return self.train_dataloader()


def fit(batch_size: int, accumulate: int, module: SEQModule | None = None, **options) -> SEQModule:
    torch.manual_seed(0)
    module = module or make_module()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate,
        **{"max_epochs": 1, "devices": 1, "num_sanity_val_steps": 0, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=Rows(batch_size))
    return module


def make_module(rate: float = 0.25, **options) -> SEQModule:
    torch.manual_seed(0)
    return SEQModule(
        MOE, optimizer=OptimizerConfig(lr=1e-12), moe=BalanceConfig(bias_update_rate=rate),
        compile=False, **options,
    )  # fmt: skip


def biases(model: Transformer) -> Tensor:
    found = [m.e_score_correction_bias for m in model.modules() if isinstance(m, Router)]
    return torch.stack([bias for bias in found if bias is not None])


def loads_of(model: Transformer, rows: dict[str, Tensor]) -> Tensor:
    """Visits (blocks, experts) of each row's tokens, counted one after the other."""
    loads = torch.zeros(2, 8)
    for row in rows["input_ids"]:
        routings: list[Routing] = []
        model.hidden_states(row[None, : LENGTH - 3], routings=routings)
        for block, routing in enumerate(routings):
            for expert in routing.experts.flatten().tolist():
                loads[block, expert] += 1
    return loads


def moved(loads: Tensor, rate: float) -> Tensor:
    mean = ROWS * (LENGTH - 3) * 2 / 8
    return rate * (mean - loads).sign()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8)])
def test_a_step_moves_the_bias_by_the_loads_of_its_window(batch_size, accumulate):
    loads = loads_of(make_module().model, make_rows())
    model = fit(batch_size, accumulate).model
    torch.testing.assert_close(biases(model), moved(loads, 0.25))


def test_each_step_moves_it_once():
    """Four steps; their own loads depend on the bias, so each is worked out from the last."""
    model, rows, expected = make_module().model, make_rows(), []
    for n in range(0, ROWS, 2):
        loads = loads_of(model, {k: v[n : n + 2] for k, v in rows.items()})
        mean = 2 * (LENGTH - 3) * 2 / 8
        for router, load in zip(
            (m for m in model.modules() if isinstance(m, Router)), loads, strict=True
        ):
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias += 0.25 * (mean - load).sign()
        expected.append(biases(model).clone())
    torch.testing.assert_close(biases(fit(2, 1).model), expected[-1])


def test_validation_moves_nothing():
    with_validation = fit(4, 1, num_sanity_val_steps=2, val_check_interval=1).model
    torch.testing.assert_close(
        biases(with_validation), biases(fit(4, 1, limit_val_batches=0).model)
    )


@pytest.mark.dist
def test_two_ranks_count_together(tmp_path: Path):
    file = tmp_path / "bias.pt"

    class Saving(SEQModule):
        def on_train_end(self):
            torch.save(biases(self.model), f"{file}{self.global_rank}")

    torch.manual_seed(0)
    module = Saving(
        MOE, optimizer=OptimizerConfig(lr=1e-12), moe=BalanceConfig(bias_update_rate=0.25),
        compile=False,
    )  # fmt: skip
    loads = loads_of(make_module().model, make_rows())
    fit(2, 2, module, devices=2, strategy="ddp_fork", limit_val_batches=0)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(f"{file}{rank}"), moved(loads, 0.25))


def test_a_frozen_router_and_a_rate_of_zero_keep_the_bias():
    module = make_module()
    router = next(m for m in module.modules() if isinstance(m, Router))
    router.weight.requires_grad_(False)
    first, second = biases(fit(8, 1, module).model)
    assert not first.any()
    assert second.any()
    assert not biases(fit(8, 1, make_module(rate=0.0)).model).any()


def test_a_recomputed_forward_counts_once():
    """Backward runs each block again, as it does where activations are not kept."""
    module = make_module()
    for block in module.model.layers:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    loads = loads_of(make_module().model, make_rows())
    torch.testing.assert_close(biases(fit(8, 1, module).model), moved(loads, 0.25))


def routing_of(experts: list[list[int]], num_experts: int) -> Routing:
    chosen = torch.tensor(experts)
    torch.manual_seed(0)
    scores = torch.rand(len(experts), num_experts, requires_grad=True)
    return Routing(scores=scores, experts=chosen, weights=scores.gather(1, chosen))


def test_loads_are_counted_by_row_and_without_padding():
    routing = routing_of([[0, 1], [0, 2], [1, 2], [0, 1], [2, 3], [3, 3]], 4)
    loads = count_loads([routing], torch.tensor([[0, 0, -1], [0, 1, 1]]), with_loss=False)
    assert loads is not None
    assert loads.losses is None
    assert loads.visits.tolist() == [[[2, 1, 1, 0], [1, 1, 1, 3]]]


def test_the_loss_of_a_row_by_hand():
    routing = routing_of([[0, 1], [0, 2], [1, 2], [0, 1], [2, 3], [3, 1]], 4)
    loads = count_loads([routing], torch.tensor([[0, 0, -1], [0, 1, 1]]), with_loss=True)
    assert loads is not None
    assert loads.losses is not None
    shares = torch.tensor([[2, 1, 1, 0], [1, 2, 1, 2]]) / torch.tensor([[4], [6]])
    probabilities = (routing.scores / routing.scores.sum(1, keepdim=True)).view(2, 3, 4)
    means = torch.stack([probabilities[0, :2].mean(0), probabilities[1].mean(0)])
    torch.testing.assert_close(loads.losses, 4 * (shares * means).sum(1))


def test_an_even_load_has_a_loss_of_one_a_block():
    routing = Routing(
        scores=torch.full((4, 4), 0.3), experts=torch.arange(4)[:, None], weights=torch.ones(4, 1)
    )
    loads = count_loads([routing, routing], torch.zeros(1, 4), with_loss=True)
    assert loads is not None
    torch.testing.assert_close(loads.losses, torch.tensor([2.0]))


def gradients(batch_size: int, accumulate: int, weight: float) -> Tensor:
    """Of the routers, after one step."""
    kept: list[Tensor] = []

    class Keeping(SEQModule):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            routers = [m for m in self.modules() if isinstance(m, Router)]
            kept.extend(r.weight.grad.clone() for r in routers if r.weight.grad is not None)

    torch.manual_seed(0)
    fit(
        batch_size, accumulate,
        Keeping(MOE, compile=False, moe=BalanceConfig(aux_loss_weight=weight)),
    )  # fmt: skip
    return torch.stack(kept)


def test_the_auxiliary_loss_does_not_depend_on_micro_batches():
    whole = gradients(8, 1, 0.5)
    torch.testing.assert_close(gradients(2, 4, 0.5), whole, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradients(8, 1, 0.0), whole, rtol=1e-2)


def test_an_auxiliary_loss_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"moe\.aux_loss_weight 0\.1 is for .* ffn_type moe"):
        SEQModule(ModelConfig(), moe=BalanceConfig(aux_loss_weight=0.1))
    with pytest.raises(ValueError, match=r"moe\.bias_update_rate must be 0 or more, not -1"):
        BalanceConfig(bias_update_rate=-1)


def test_what_is_logged_of_the_loads_by_hand():
    balance = ExpertBalance(Transformer(MOE), BalanceConfig())
    visits = torch.tensor([[[4, 4, 0, 0, 4, 4, 0, 0]], [[2, 2, 2, 2, 2, 2, 2, 2]]])
    balance.observe(RowLoads(visits, None), torch.ones(1))
    metrics = balance.end_window(lambda value: value)
    assert metrics["train/moe_max_violation"].item() == pytest.approx((1 + 0) / 2)
    assert metrics["train/moe_idle_experts"].item() == pytest.approx(4 / 16)


def violation_after_training(rate: float) -> float:
    """Of a run in which two of eight experts begin with nearly all visits."""
    torch.manual_seed(0)
    module = SEQModule(MOE, compile=False, moe=BalanceConfig(bias_update_rate=rate))
    for router in (m for m in module.modules() if isinstance(m, Router)):
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias[:2] += 0.3
    fit(8, 1, module, max_epochs=40, limit_val_batches=0)
    loads = loads_of(module.model, make_rows())
    return (loads.amax(1) / loads.mean(1) - 1).mean().item()


def test_the_moving_bias_spreads_a_skewed_load():
    assert violation_after_training(0.01) < violation_after_training(0.0) / 2
