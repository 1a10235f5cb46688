"""Curves of training runs as SVG: raw points and their running mean. No torch."""

import io
import json
from pathlib import Path

from nemo_moviegen.recipe import METRICS_FILE

AUTOENCODER_REPORT = Path("autoencoder", "report.html")
"""In the folder of a demo: what its autoencoders rebuild."""
LABELS = {
    "loss": "squared velocity error",
    "l1": "L1 error (range -1 to 1)",
    "psnr_db": "PSNR (dB)",
}
"""Axis label of a logged key, with its unit."""
COLORS = {
    "clips": ("#a9c2ec", "#1d4fa8"),
    "images": ("#f3c9a0", "#c2570c"),
    "held out": ("#a6d8b5", "#1c7c3f"),
}
"""(logged, running mean) of each curve by its name."""


def read_metrics(run_folder) -> list[dict]:
    """Rows of the run's metrics.jsonl in step order, the lines of one step together, later values winning.

    Raises ValueError naming the line that is no JSON object with a step. A torn last line is what a killed
    run leaves: it is dropped.
    """
    path = Path(run_folder) / METRICS_FILE
    lines = path.read_text().splitlines()
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
            rows[step] = rows.get(step, {}) | row
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a JSON object with a step ({error})") from None
    return [rows[step] for step in sorted(rows)]


def series(rows, key) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def running_mean(values, window) -> list[float]:
    """Mean over the `window` values around each one; fewer at the ends, so the curve keeps its length."""
    half = window // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # symmetric also at the ends: no bias on a slope
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def thinned(values, most=1000) -> list:
    """At most `most` of the values, evenly spaced: a screen shows no more."""
    step = -(-len(values) // most) or 1
    return values[::step]


def curves_svg(title, curves, label) -> bytes:
    """SVG of {name in COLORS: (steps, values)}: what was logged and, of 40 points on, its running mean.

    The vertical axis is logarithmic where the values are positive and span more than a factor of 20.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for name, (steps, values) in curves.items():
            raw, smooth = COLORS[name]
            window = len(values) // 20 | 1  # odd
            if window > 1:
                means = running_mean(values, window)
                whole = slice(window // 2, len(values) - window // 2)  # at the ends few values make a jump
                axes.plot(thinned(steps), thinned(values), color=raw, linewidth=0.8, alpha=0.7)
                axes.plot(
                    thinned(steps[whole]),
                    thinned(means[whole]),
                    color=smooth,
                    linewidth=2,
                    label=f"{name}, mean of {window}",
                )
            else:
                axes.plot(steps, values, color=smooth, linewidth=2, marker="o", markersize=3, label=name)
        axes.legend(frameon=False, fontsize=9)
        every = [value for _, values in curves.values() for value in values]
        if min(every) > 0 and max(every) > 20 * min(every):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
