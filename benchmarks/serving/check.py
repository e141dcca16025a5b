"""Whether the server's greedy tokens are the model's, by torch alone and without our kernels.

Every event of a stream has one token's text. A second pass over the same tokens, with plain matrix
products in float32 of rows rounded as W8A8 rounds them, must find a token of that text at the top,
or so close to it that rounding elsewhere may have chosen.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.serving.client import events, request
from benchmarks.serving.workloads import Workload

CHECK = Workload(num_requests=4, concurrency=1, prompt=(8, 48), num_new=12)
# of the spread of a row's logits: rounding moves two of them apart by less, 24 random layers deep
TOLERANCE = 0.5


def ask_for_check(url: str, model: str, vocab_size: int) -> list[tuple[list[int], list[str]]]:
    """Prompts and the text of each token of their answers."""

    async def one(prompt: list[int]) -> list[str]:
        body = request(model, prompt, CHECK.num_new)
        texts = []
        async for data in events(url, "/v1/completions", body):
            texts += [choice["text"] for choice in json.loads(data).get("choices", ())]
        return texts

    return [(p, asyncio.run(one(p))) for p in CHECK.prompts(vocab_size, "check")]


@torch.inference_mode()
def check(folder: Path, answers: list[tuple[list[int], list[str]]]) -> str:
    """Say how many tokens were compared, and how many of them torch chooses itself.

    Raises:
        RuntimeError: a token is none that torch could have chosen.
    """
    from astrai_core.model import AutoModel
    from astrai_core.tokenizer import AutoTokenizer

    model = AutoModel.from_pretrained(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _forget_our_kernels(model)
    same = total = 0
    for prompt, texts in answers:
        ids = list(prompt)
        for text in texts:
            logits = model(torch.tensor([ids]))["logits"][0, -1]
            close = (logits > logits.max() - TOLERANCE * logits.std()).nonzero()[:, 0].tolist()
            found = [i for i in close if tokenizer.token_bytes(i).decode(errors="replace") == text]
            if "\ufffd" in text or not text:
                break  # half a character: which token it was cannot be told
            if not found:
                raise RuntimeError(f"after {len(ids)} tokens torch does not choose {text!r}")
            best = int(logits.argmax())
            ids.append(best if best in found else max(found, key=lambda i: float(logits[i])))
            same, total = same + (best in found), total + 1
    if not total:
        raise RuntimeError("no token's text could be compared")
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
