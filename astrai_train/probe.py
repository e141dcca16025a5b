"""How fast this machine trains a model, tried on a slice of it that is as large as time allows.

A slice is k of the L layers and k / L of the vocabulary, so that its parts keep their proportions
and the whole takes as much longer as it has more to calculate.
"""

import dataclasses
import time

import torch

from astrai_core.model import ModelConfig, PackedAttention, Transformer
from astrai_core.model.lora import LoRAConfig, add_lora
from astrai_train.footprint import activated_parameters, of_any_depth, shallower
from astrai_train.losses import cross_entropy
from astrai_train.optim import OptimizerConfig, build_optimizer

_LONGEST = 512
# Some two seconds on two cores of a laptop; the probe takes three such steps.
_BUDGET = 8e10


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
) -> float:
    """Seconds of one optimizer step of the whole model, uncompiled, on this machine's CPU.

    Args:
        config: the model.
        rows: of a micro-batch.
        length: tokens of a row.
        accumulate: micro-batches of a step.
        optimizer: its update is timed too.
        lora: what is trained of it; None is all.
    """
    sliced, few_rows, short = _slice(config, rows, length)
    torch.manual_seed(0)
    model = Transformer(sliced)
    if lora is not None:
        add_lora(model, of_any_depth(lora))
    updater = build_optimizer(model, optimizer)
    passes, updates = [], []
    for _ in range(3):
        start = time.perf_counter()
        _pass(model, few_rows, short)
        passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        updater.step()
        updater.zero_grad()
        updates.append(time.perf_counter() - start)
    # the first step also touches new memory; of the others the quicker one met less of what else
    # the machine does
    tokens = operations_per_token(config, length) * rows * length
    tried = operations_per_token(sliced, short) * few_rows * short
    layers = config.n_layers / sliced.n_layers
    return min(passes[1:]) * accumulate * tokens / tried + min(updates[1:]) * layers


def _pass(model: Transformer, rows: int, length: int) -> None:
    ids = torch.randint(model.config.vocab_size, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    attention = PackedAttention.of_documents(torch.zeros_like(ids))
    hidden = model.hidden_states(ids, positions, attention)
    total, count = cross_entropy(hidden, model.output_weight, ids)
    (total / count).backward()


def _slice(config: ModelConfig, rows: int, length: int) -> tuple[ModelConfig, int, int]:
    """The largest slice within the budget: first fewer rows, then fewer layers, then less."""
    short = min(length, _LONGEST)
    row = operations_per_token(config, short) * short
    if row <= _BUDGET:
        return config, min(rows, int(_BUDGET / row)), short
    layers = max(1, int(config.n_layers * _BUDGET / row))
    vocab_size = max(1, config.vocab_size * layers // config.n_layers)
    sliced = dataclasses.replace(shallower(config, layers), vocab_size=vocab_size)
    while short > 32 and operations_per_token(sliced, short) * short > _BUDGET:
        short //= 2
    return sliced, 1, short
