"""Whether the server's greedy tokens are the model's, by torch alone and without our kernels.

A second pass over the same tokens, with plain matrix products in float32 of rows rounded as W8A8
rounds them, must find each token at the top, or so close to it that rounding elsewhere may have
chosen. How many tokens came in one piece, guessed ahead or not, makes no difference.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.serving.client import events, request
from benchmarks.serving.workloads import Workload

CHECK = Workload(num_requests=4, concurrency=1, prompt=(8, 48), num_new=24)
# of the spread of a row's logits: rounding moves two of them apart by less, 24 random layers deep
TOLERANCE = 0.5

Answers = list[tuple[list[int], list[int]]]
"""Prompts and the tokens that answered them."""


def ask_for_check(url: str, model: str, vocab_size: int) -> Answers:
    """Ask a few prompts."""

    async def one(prompt: list[int]) -> list[int]:
        body = request(model, prompt, CHECK.num_new) | {"return_token_ids": True}
        ids = []
        async for data in events(url, "/v1/completions", body):
            for choice in json.loads(data).get("choices", ()):
                ids += choice.get("token_ids") or []
        return ids

    return [(p, asyncio.run(one(p))) for p in CHECK.prompts(vocab_size, "check")]


@torch.inference_mode()
def check(folder: Path, answers: Answers) -> str:
    """Say how many tokens were compared, and how many of them torch chooses itself.

    Raises:
        RuntimeError: a token is none that torch could have chosen.
    """
    from astrai_core.model import AutoModel

    model = AutoModel.from_pretrained(folder, torch.float32)
    _forget_our_kernels(model)
    same = total = 0
    for prompt, ids in answers:
        if len(ids) != CHECK.num_new:
            raise RuntimeError(f"{len(ids)} tokens came where {CHECK.num_new} were asked for")
        logits = model(torch.tensor([prompt + ids[:-1]]))["logits"][0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        below = (logits.amax(1) - chosen) / logits.std(1)  # of the spread
        if (wrong := (below > TOLERANCE).nonzero()).numel():
            raise RuntimeError(f"torch does not choose token {int(wrong[0])} of {ids}")
        same, total = same + int((below == 0).sum()), total + len(ids)
    return f"{same} of {total} greedy tokens are torch's own, the others tie within rounding"


class _Plain(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round()
        return (rounded @ layer.weight.float().t()) * layer.weight_scale * scale


class _PlainEmbedding(_Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def project(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _forget_our_kernels(model: nn.Module) -> None:
    from astrai_core.model.quantization import QuantisedEmbedding, W8A8Linear

    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, W8A8Linear):
                setattr(owner, name, _Plain(child))
            elif isinstance(child, QuantisedEmbedding):
                setattr(owner, name, _PlainEmbedding(child))
