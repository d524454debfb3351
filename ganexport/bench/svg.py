"""Line charts as inline SVG: no library, no script, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 14, 52
#: Number of colours in the page's palette; further lines are dashed.
COLOURS = 8
_DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: In the legend.
        points: (x, y), in the order they are joined.
        marks: Whether each point gets a dot with its values as a tooltip.
        line: Whether the points are joined.
        index: Number of its colour; its position when None.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = True
    line: bool = True
    index: int | None = None


class Axis:
    """A scale from values to pixels with its ticks.

    Args:
        values: All that must fit.
        log: Logarithmic; values must be positive.
        zero: A linear axis begins at zero.
    """

    def __init__(self, values: Sequence[float], *, log: bool = False, zero: bool = False) -> None:
        self.log = log
        low, high = min(values), max(values)
        if log:
            self.ticks = _log_ticks(low, high)
            self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
            if self.low == self.high:
                self.low, self.high = self.low / 2, self.high * 2
        else:
            self.ticks = _linear_ticks(0.0 if zero else low, high)
            self.low, self.high = self.ticks[0], self.ticks[-1]

    def at(self, value: float, start: float, end: float) -> float:
        """Pixel of a value on an axis from ``start`` to ``end``."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return start + share * (end - start)


def _linear_ticks(low: float, high: float) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2.5
    ticks = [10.0**d * m for d in decades for m in ((1,) if wide else (1, 2, 5))]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    before = [t for t in ticks if t < low * 0.999]
    after = [t for t in ticks if t > high * 1.001]
    return [*before[-1:], *inside, *after[:1]]


def number(value: float) -> str:
    """A tick's label: 0.5, 12, 3.4k, 2M, 5G."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}" if 1000 <= abs(value) < 10000 else f"{value:.3g}"


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """A chart with its legend as an HTML figure; an empty string without points.

    Args:
        title: Caption, and what a screen reader says.
        curves: Lines; points that a logarithmic axis cannot show are left out.
        x_label: With its unit.
        y_label: With its unit.
        log_x: Logarithmic x.
        log_y: Logarithmic y.
        x_ticks: Exactly these ticks (batch sizes).
    """
    shown = [(i if c.index is None else c.index, c, _drawable(c, log_x, log_y)) for i, c in enumerate(curves)]
    shown = [entry for entry in shown if entry[2]]
    if not shown:
        return ""
    x = Axis([p[0] for _, _, points in shown for p in points], log=log_x)
    y = Axis([p[1] for _, _, points in shown for p in points], log=log_y, zero=True)
    if x_ticks:
        x.ticks = [t for t in x_ticks if x.low <= t <= x.high]
    parts = [*_grid(x, y), *_labels(x_label, y_label)]
    for index, curve, points in shown:
        parts += _curve(index, curve, points, x, y)
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line x1="1" y1="5" x2="25" y2="5" '
        f'class="c{i % COLOURS}"{_dash(i)}/></svg>{escape(c.name)}</li>'
        for i, c, _ in shown
    )
    body = "".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _drawable(curve: Curve, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in curve.points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _dash(index: int) -> str:
    dash = _DASHES[index // COLOURS % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _grid(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks:
        at = y.at(tick, bottom, _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks:
        at = x.at(tick, _LEFT, right)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    return parts


def _labels(x_label: str, y_label: str) -> list[str]:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="label" transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _curve(index: int, curve: Curve, points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    pixels = [(x.at(px, _LEFT, right), y.at(py, bottom, _TOP)) for px, py in points]
    parts = []
    if curve.line and len(pixels) > 1:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in pixels)
        parts.append(f'<polyline class="c{index % COLOURS}"{_dash(index)} points="{path}"/>')
    if curve.marks or len(pixels) == 1:
        parts += [
            f'<circle class="c{index % COLOURS}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{escape(curve.name)}: '
            f"{number(vx)}, {number(vy)}</title></circle>"
            for (px, py), (vx, vy) in zip(pixels, points, strict=True)
        ]
    return parts
