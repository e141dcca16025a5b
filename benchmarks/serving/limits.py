"""What this machine can do: bytes read and products of bytes a second, on all cores."""

import time
from collections.abc import Callable

import torch


def limits() -> dict[str, float]:
    """The best of several tries, of torch's own operators and of ours."""
    from astrai_core.model.packed import why_not_packed

    memory = torch.ones(1 << 28)  # 1 GiB
    found = {"read_gb_per_second": memory.nbytes / _best(memory.sum) / 1e9}
    del memory
    size = 2048
    bytes_ = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    seconds = [_best(lambda: torch._int_mm(bytes_, bytes_))]  # pyright: ignore
    numbers = torch.rand(size, size)
    if why_not_packed() is None:
        packed, ones = torch.ops.astrai_packed.pack([bytes_]), torch.ones(size)
        seconds.append(_best(lambda: torch.ops.astrai_packed.linear(numbers, packed, ones)))
    found["int8_gops"] = 2 * size**3 / min(seconds) / 1e9
    found["float32_gflops"] = 2 * size**3 / _best(lambda: numbers @ numbers) / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def _best(function: Callable[[], object], tries: int = 12) -> float:
    function()
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
