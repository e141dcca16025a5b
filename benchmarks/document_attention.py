"""Attention within documents in training, beside torch's own: GFLOP/s, forward and backward.

    python benchmarks/document_attention.py [--threads 2] [--dtype float32]

Documents of one length, 4 query heads on 2 key heads of 64. Torch gets them as a batch, which
packed rows of several lengths never are: its best case. The best of several runs, in turns.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai_core.model.document_attention import attend_documents, why_not_native

HEADS, KV_HEADS, WIDTH = 4, 2, 64
SIZES = ((64, 80), (256, 20), (1024, 4), (2048, 2))
"""Tokens of a document, and how many."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"our kernel: {why_not_native() or 'runs'}; {options.threads} threads, {options.dtype}")
    print(f"{'documents':<16}{'ours':>16}{'torch':>16}{'ratio':>14}")
    for length, count in SIZES:
        ours, torchs = measure(length, count, getattr(torch, options.dtype), options.repeats)
        # each pair of a query and a key: a product and a sum for each channel, of keys and values
        work = 4e-9 * HEADS * WIDTH * count * length * (length + 1) / 2
        cells = [f"{work / one[0]:.0f} / {2.5 * work / one[1]:.0f}" for one in (ours, torchs)]
        ratio = f"{torchs[0] / ours[0]:.2f} / {torchs[1] / ours[1]:.2f}"
        print(f"{f'{count} of {length:,}':<16}{cells[0]:>16}{cells[1]:>16}{ratio:>14}", flush=True)


def measure(
    length: int, count: int, dtype: torch.dtype, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of the forward and of the backward pass: ours, torch's."""
    documents = torch.arange(count)[:, None].expand(count, length).contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_documents(q, k, v, documents, WIDTH**-0.5, None)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    best: dict[str, list[float]] = {"ours": [1e9, 1e9], "torchs": [1e9, 1e9]}
    for _ in range(repeats):
        for name, attend in (("ours", ours), ("torchs", torchs)):
            for part, seconds in enumerate(once(attend, length * count, dtype)):
                best[name][part] = min(best[name][part], seconds)
    return best["ours"], best["torchs"]


def once(attend: Attend, num_tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    q, k, v = (
        torch.randn(num_tokens, heads, WIDTH, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    begin = time.perf_counter()
    out = attend(q, k, v)
    middle = time.perf_counter()
    gradient = torch.ones_like(out)
    since = time.perf_counter()
    out.backward(gradient)
    return middle - begin, time.perf_counter() - since


if __name__ == "__main__":
    main()
