"""Linear layers on this machine: every kernel that could multiply, at several numbers of rows.

    python benchmarks/linear.py [--threads 2]

Milliseconds of the whole layer, rounding of its inputs included; best of many runs, the kernels
taking turns so that a noisy moment meets all of them. Between two runs the caches are flushed:
in a model, a layer's weights come from memory. "exact" says whether the integer kernel passes the
proof; one that does not is never used.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai_core.model.quantization import choose, kernels, quantize_groups, quantize_rows

ROWS = (1, 4, 8, 32, 256)
SHAPES = ((5632, 2048), (1536, 512))
FLUSHED_BYTES = 80_000_000
Kernel = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--cpu_time", action="store_true", help="of one thread, for shared machines"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the slow ones")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    print(f"kernels: {choose().reason}; {torch.get_num_threads()} threads")
    for outputs, inputs in SHAPES:
        candidates = make_candidates(outputs, inputs, quick=options.quick)
        print(f"\n{inputs} x {outputs}, ms" + "".join(f"{f'M={rows}':>10}" for rows in ROWS))
        table = {name: ["-"] * len(ROWS) for name in candidates}
        for column, rows in enumerate(ROWS):
            for name, seconds in measure(candidates, rows, inputs, options.repeats, clock).items():
                table[name][column] = f"{seconds * 1e3:.2f}"
        for name, cells in table.items():
            print(f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


@torch.inference_mode()
def measure(
    candidates: dict[str, Kernel],
    rows: int,
    inputs: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    x, other = torch.randn(rows, inputs), torch.empty(FLUSHED_BYTES // 4)
    best: dict[str, float] = {}
    for _ in range(max(3, repeats if rows < ROWS[-1] else repeats // 2)):
        for name, kernel in candidates.items():
            other.add_(1)
            begin = clock()
            kernel(x)
            best[name] = min(best.get(name, 1e9), clock() - begin)
    return best


def make_candidates(outputs: int, inputs: int, *, quick: bool) -> dict[str, Kernel]:
    weight = torch.randn(outputs, inputs)
    values, scale = quantize_rows(weight)
    scale = scale[:, 0].contiguous()
    nibbles, group_scale = quantize_groups(weight)
    half = weight.bfloat16()
    ops = torch.ops.astrai
    found: dict[str, Kernel] = {
        "float32": lambda x: F.linear(x, weight),
        "w8a8, chosen": lambda x: ops.w8a8_linear(x, values, scale, handle),
        "int8, chosen": lambda x: ops.int8_linear(x, values, scale),
        "int4, chosen": lambda x: ops.int4_linear(x, nibbles, group_scale),
    }
    handle = kernels.new_handle()
    for name, kernel in kernels.TORCH_KERNELS.items():
        if quick and name == "_int_mm":
            continue
        label = f"{name} ({'exact' if kernels.is_exact(kernel) else 'not exact'})"
        found[label] = by_torch(kernel, values, scale)
    if quick:
        return found
    found["bfloat16"] = lambda x: F.linear(x.bfloat16(), half)
    half_scale = scale.bfloat16()
    found["_weight_int8pack_mm, bfloat16"] = lambda x: torch.ops.aten._weight_int8pack_mm(
        x.bfloat16(), values, half_scale
    )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
    )
    zeros = torch.ones(inputs // 128, outputs, 2, dtype=torch.bfloat16)
    found["_weight_int4pack_mm, bfloat16"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), packed, 128, zeros
    )
    return found


def by_torch(kernel: kernels.IntegerKernel, values: Tensor, scale: Tensor) -> Kernel:
    handle = kernels.new_handle()

    def run(x: Tensor) -> Tensor:
        rounded, x_scale = quantize_rows(x)
        return kernel(rounded, values, handle) * scale * x_scale

    return run


if __name__ == "__main__":
    main()
