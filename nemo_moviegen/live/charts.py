"""Curves as inline SVG that takes its colours from the page: light and dark, any width, a few KB each."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 26
MOST_BINS = 200
"""Points of a curve: each is the mean of the values around it, a band behind them goes from least to most."""
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_POINTS = 60, 16, 24


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    name: str
    steps: list[int]
    values: list[float]
    color: int
    """Number of a colour of the page: class c0, c1, ..."""


def line_chart(curves, *, first=0, last=None, percent=False, marks=(), from_zero=False) -> str:
    """SVG of `Curve`s over the steps from `first` to `last`, "" where none has a value.

    The vertical axis is logarithmic where all values are positive and span more than a factor of 20, unless
    it is to start at zero. `marks` are steps that get a tick at the bottom: those that were skipped.
    """
    binned = [(curve, bins(curve.steps, curve.values)) for curve in curves if curve.values]
    if not binned:
        return ""
    last = max(last or 0, *(curve.steps[-1] for curve, _ in binned), first + 1)
    # the band of a curve of many values may be torn open by one of them: the lines set the scale
    means = [mean for _, points in binned for _, mean, _, _ in points]
    low, high = min(means), max(means)
    if from_zero:
        low = min(0.0, low)
    is_log = not from_zero and low > 0 and high > 20 * low
    scale = math.log10 if is_log else float
    low, high = _widened(scale(low), scale(high), from_zero)

    def x(step):
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first)

    def y(value):
        at = scale(max(value, 1e-300)) if is_log else value
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    parts = [_axes(low, high, is_log, percent, first, last, x, y)]
    for curve, points in binned:
        parts.append(_band(points, curve.color, x, y) + _line(points, curve.color, x, y))
    bottom = HEIGHT - _BOTTOM
    parts += [f'<path class="mark" d="M{x(s):.1f} {bottom}v-7"/>' for s in marks if first <= s <= last]
    label = escape(", ".join(curve.name for curve, _ in binned))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} by step">{"".join(parts)}</svg>'
    )


def spark(values) -> str:
    """A small SVG line of `values`, "" for fewer than two."""
    if len(values) < 2:
        return ""
    means = [mean for _, mean, _, _ in bins(range(len(values)), values, _SPARK_POINTS)]
    low, high = min(means), max(means)
    across = (_SPARK_WIDTH - 2) / max(len(means) - 1, 1)
    up = (_SPARK_HEIGHT - 4) / ((high - low) or 1)
    points = " ".join(
        f"{1 + i * across:.1f},{_SPARK_HEIGHT - 2 - (mean - low) * up:.1f}" for i, mean in enumerate(means)
    )
    return (
        f'<svg class="spark" viewBox="0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}" aria-hidden="true">'
        f'<polyline class="line c0" points="{points}"/></svg>'
    )


def bins(steps, values, most=MOST_BINS) -> list[tuple[float, float, float, float]]:
    """(mean step, mean, least, most) of at most `most` runs of neighbours, about as long each."""
    count = min(most, len(values))
    ends = [len(values) * (i + 1) // count for i in range(count)]
    points, start = [], 0
    for end in ends:
        part = values[start:end]
        middle = sum(steps[start:end]) / (end - start)
        points.append((middle, sum(part) / len(part), min(part), max(part)))
        start = end
    return points


def ticks(low, high, count=4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    rough = (high - low) / count
    if rough <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value, percent=False) -> str:
    """Three digits of it, with k, M, G, T for the large; as percent where it is a share."""
    if percent:
        return f"{100 * value:.3g}%"
    if abs(value) < 1000:
        return f"{value:.3g}"
    power = min(int(math.log10(abs(value))) // 3, 4)
    scaled = value / 1000**power
    return f"{scaled:.4g}{'kMGT'[power - 1]}"


def _widened(low, high, from_zero):
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        room = abs(high) * 0.1 or 1.0
        return low - (0 if from_zero else room), high + room
    room = 0.05 * (high - low)
    return low - (0 if from_zero else room), high + room


def _axes(low, high, is_log, percent, first, last, x, y):
    right = WIDTH - _RIGHT
    parts = []
    for tick in _log_ticks(low, high) if is_log else ticks(low, high):
        at = y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        said = number(tick, percent)
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{said}</text>')
    for tick in ticks(first, last):
        at = x(tick)
        anchor = "end" if at > right - 14 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(tick)}</text>')
    return "".join(parts)


def _log_ticks(low, high):
    """Of an axis in powers of ten; with the twos and fives between them where few lie within."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def _line(points, color, x, y):
    if len(points) == 1:
        step, mean, _, _ = points[0]
        return f'<circle class="dot c{color}" cx="{x(step):.1f}" cy="{y(mean):.1f}" r="3"/>'
    path = " ".join(f"{x(step):.1f},{y(mean):.1f}" for step, mean, _, _ in points)
    return f'<polyline class="line c{color}" points="{path}"/>'


def _band(points, color, x, y):
    if all(least == most for _, _, least, most in points):
        return ""
    above = [f"{x(step):.1f},{y(most):.1f}" for step, _, _, most in points]
    below = [f"{x(step):.1f},{y(least):.1f}" for step, _, least, _ in reversed(points)]
    return f'<polygon class="band c{color}" points="{" ".join(above + below)}"/>'
