"""Lines as SVG, over steps or whatever else: no script, no font, nothing from a network.

Colours are variables of the page (`--line-0`, `--line-1`, ...), so that light and dark both work.
"""

import math
from collections.abc import Callable, Mapping
from html import escape

from astrai_train.report.history import Points, thinned

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 30
_MOST_POINTS = 400
_MOST_DOTS = 40
LINE_COLORS = 8
"""Colours that the pages define, `--line-0` on; more lines than these share them."""


def line_chart(
    lines: Mapping[str, Points], x_name: str = "step", x_text: Callable[[float], str] | None = None
) -> str:
    """Draw lines by their names; a line of few points shows each as a dot with its value.

    Args:
        lines: points (x, value) in the order of x.
        x_name: what x is.
        x_text: how an x is written; as a number where not given.

    Returns:
        An `<svg>` element, or nothing where no line has a finite value.
    """
    x_text = x_text or number
    drawn = {name: thinned(points, _MOST_POINTS) for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    x_ticks = ticks(min(0, *steps), max(steps))
    y_ticks = ticks(min(values), max(values))
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    left, right = x_ticks[0], max(steps)

    def x(step: float) -> float:
        return _LEFT + (step - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="chart">']
    parts += [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
        f'y2="{y(tick):.1f}"/><text class="tick" text-anchor="end" x="{_LEFT - 8}" '
        f'y="{y(tick) + 4:.1f}">{number(tick)}</text>'
        for tick in y_ticks
    ]
    parts += [
        f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{_HEIGHT - 8}">'
        f"{x_text(tick)}</text>"
        for tick in x_ticks
        if tick <= right
    ]
    order = list(lines)  # a line keeps its colour when another one is empty
    for name, points in drawn.items():
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        color = f"var(--line-{order.index(name) % LINE_COLORS})"
        parts.append(f'<polyline class="line" style="stroke:{color}" points="{path}"/>')
        if len(points) <= _MOST_DOTS:
            parts += [
                f'<circle r="3" style="fill:{color}" cx="{x(step):.1f}" cy="{y(value):.1f}">'
                f"<title>{escape(name)} {number(value)} at {x_name} {x_text(step)}</title></circle>"
                for step, value in points
            ]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span a range, about so many of them."""
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [index * size for index in range(first, last + 1)]


def number(value: float) -> str:
    """A value as short as it can be read: 4 significant digits, thousands apart."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.4g}'):g}"
