"""How fast this machine trains a model, tried on a slice of it that is as large as time allows.

A slice is k of the L layers and k / L of the vocabulary, so that its parts keep their proportions
and the whole takes as much longer as it has more to calculate.
"""

import dataclasses
import time

import torch
from torch import Tensor

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_core.model.lora import LoRAConfig, add_lora
from astrai_train.footprint import activated_parameters, of_any_depth, shallower
from astrai_train.losses import cross_entropy
from astrai_train.optim import OptimizerConfig, build_optimizer

_LONGEST = 512
# Some two seconds on two cores of a laptop, where the probe takes four such steps. A machine that
# needs less than _SECONDS gets more to do: many rows are computed faster than few.
_BUDGET = 8e10
_SECONDS = 1.0
_MOST_GROWTH = 8.0


def operations_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of training on one token of a row: forward and twice backward.

    Each parameter that a token meets multiplies and adds once in each pass (an embedding that is
    not the head does not), and each token meets all others of its row twice, in scores and in
    values.
    """
    embedding = config.vocab_size * config.dim
    matrices = activated_parameters(config) - (0 if config.tie_weight else embedding)
    value_width = config.v_head_dim if config.attn_type == "mla" else config.query_dim
    pairs = config.n_layers * config.n_heads * (config.query_dim + value_width) * length
    return 6.0 * (matrices + pairs)


def seconds_per_step(
    config: ModelConfig,
    rows: int,
    length: int,
    accumulate: int,
    optimizer: OptimizerConfig,
    lora: LoRAConfig | None = None,
    precision: str = "32-true",
) -> float:
    """Seconds of one optimizer step of the whole model, uncompiled, on this machine's CPU.

    Args:
        config: the model.
        rows: of a micro-batch.
        length: tokens of a row.
        accumulate: micro-batches of a step.
        optimizer: its update is timed too.
        lora: what is trained of it; None is all.
        precision: the trainer's.
    """
    part = _slice(config, rows, length, _BUDGET)
    spare = _SECONDS / _try(part, optimizer, lora, precision, times=1)[0]
    if spare > 1:
        part = _slice(config, rows, length, _BUDGET * min(spare, _MOST_GROWTH))
    forth_and_back, update = _try(part, optimizer, lora, precision, times=3)
    sliced, few_rows, short = part
    tokens = operations_per_token(config, length) * rows * length
    tried = operations_per_token(sliced, short) * few_rows * short
    return forth_and_back * accumulate * tokens / tried + update * config.n_layers / sliced.n_layers


def _try(
    part: tuple[ModelConfig, int, int],
    optimizer: OptimizerConfig,
    lora: LoRAConfig | None,
    precision: str,
    times: int,
) -> tuple[float, float]:
    """Seconds of a slice's passes and of its update."""
    config, rows, length = part
    torch.manual_seed(0)
    model = Transformer(config)
    if lora is not None:
        add_lora(model, of_any_depth(lora))
    updater = build_optimizer(model, optimizer)
    passes, updates = [], []
    for _ in range(times):
        start = time.perf_counter()
        with computing_in(precision):
            total = _loss(model, rows, length)
        total.backward()
        passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        updater.step()
        updater.zero_grad()
        updates.append(time.perf_counter() - start)
    # the first step also touches new memory; of the others the quickest met least of what else the
    # machine does
    return min(passes[1:] or passes), min(updates[1:] or updates)


def computing_in(precision: str) -> torch.autocast:
    """What a forward pass runs in under a precision of the trainer."""
    mixed = precision == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16, enabled=mixed)


def _loss(model: Transformer, rows: int, length: int) -> Tensor:
    ids = torch.randint(model.config.vocab_size, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    attention = PackedAttention.of_documents(torch.zeros_like(ids))
    hidden = model.hidden_states(ids, positions, attention)
    total, count = cross_entropy(hidden, model.output_weight, ids)
    return total / count


def _slice(
    config: ModelConfig, rows: int, length: int, budget: float
) -> tuple[ModelConfig, int, int]:
    """The largest slice within a budget: first fewer layers, then fewer rows, then less.

    Rows come second because what a step does once, whatever the rows, is done in each layer:
    rounding weights, adding up their gradients.
    """
    short = min(length, _LONGEST)
    whole = operations_per_token(config, short) * short * rows
    if whole > budget:
        layers = max(1, int(config.n_layers * budget / whole))
        vocab_size = max(1, config.vocab_size * layers // config.n_layers)
        config = dataclasses.replace(shallower(config, layers), vocab_size=vocab_size)
    row = operations_per_token(config, short) * short
    rows = max(1, min(rows, int(budget / row)))
    while short > 32 and operations_per_token(config, short) * short > budget:
        short //= 2
    return config, rows, short
