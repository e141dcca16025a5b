"""Figures side by side, with the ratio to the best peer and the share of the machine's limit."""

from collections.abc import Callable
from statistics import median

ROWS = (
    ("single stream, tokens/s", "single", "decode_per_second", True),
    ("prefill of 1,024, tokens/s", "prefill", "prefill_per_second", True),
    ("8 at once, generated tokens/s", "conc8", "generated_per_second", True),
    ("8 at once, first token p50, ms", "conc8", "first_token_ms", False),
    ("32 at once, generated tokens/s", "conc32", "generated_per_second", True),
    ("32 at once, first token p50, ms", "conc32", "first_token_ms", False),
    ("32 with a shared prefix, s", "shared32", "seconds", False),
    ("first answer after the start, s", None, "first_answer_seconds", False),
    ("peak memory, MB", None, "peak_memory_mb", False),
)
OURS = "astrai w8a8"


def merged(rounds: list[dict]) -> dict:
    """The median of each figure over several rounds."""
    result: dict = {}
    for name, value in rounds[0].items():
        if isinstance(value, dict):
            figures = [name_ for name_, number in value.items() if isinstance(number, float | int)]
            result[name] = {f: median(one[name][f] for one in rounds) for f in figures}
        elif isinstance(value, float | int):
            result[name] = median(one[name] for one in rounds)
    return result


def table(columns: dict[str, dict], parameters: int, limits: dict[str, float]) -> str:
    """One row a figure; the last columns compare ours with the best peer and with the limit."""
    lines = [["", *columns, "best peer", "limit"]]
    for title, workload, figure, more_is_better in ROWS:
        values = {
            name: found.get(figure)
            for name, results in columns.items()
            if (found := results if workload is None else results.get(workload)) is not None
        }
        known = {name: value for name, value in values.items() if value}
        if OURS not in known:
            continue
        cells = [title, *(f"{known[n]:,.1f}" if n in known else "-" for n in columns)]
        others = [value for name, value in known.items() if name != OURS]
        ratio = "-"
        if others:
            best = max(others) if more_is_better else min(others)
            ratio = f"{known[OURS] / best if more_is_better else best / known[OURS]:.2f}x"
        share = _LIMITS.get(f"{workload}.{figure}")
        bound = f"{share(known[OURS], parameters, limits):.0%}" if share else ""
        lines.append([*cells, ratio, bound])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        cells[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in lines
    )


def _of_reading(rate: float, parameters: int, limits: dict[str, float]) -> float:
    """Of the tokens a second if a byte of each weight were read for each."""
    return rate * parameters / (limits["read_gb_per_second"] * 1e9)


def _of_products(rate: float, parameters: int, limits: dict[str, float]) -> float:
    """Of the tokens a second if each weight were multiplied once for each."""
    return 2 * rate * parameters / (limits["int8_gops"] * 1e9)


_LIMITS: dict[str, Callable[[float, int, dict[str, float]], float]] = {
    "single.decode_per_second": _of_reading,
    "prefill.prefill_per_second": _of_products,
    "conc8.generated_per_second": lambda *a: max(_of_reading(*a) / 8, _of_products(*a)),
    "conc32.generated_per_second": lambda *a: max(_of_reading(*a) / 32, _of_products(*a)),
}
