"""What a page shows of a run: charts, the table of validation losses, ranks, skipped steps, samples."""

import re
from collections import namedtuple

from nemo_moviegen.live.charts import Curve, line_chart, number, spark
from nemo_moviegen.live.metrics_file import series
from nemo_moviegen.live.status import duration

MOST_SHOWN = 20
"""Rows of a list on the page."""
MOST_RANK_SQUARES = 512
"""Ranks with a square each; more of them share one a host."""
_PART = re.compile(r"validation/loss_(\d+)x(\d+)x(\d+)_t(\d\.\d\d)-(\d\.\d\d)")

Panel = namedtuple("Panel", "title keys percent from_zero", defaults=(False, False))
"""A chart: its title with the unit, {name of a curve: key of metrics.jsonl}."""
SPEEDS = (
    Panel("MFU and HFU, share of the dense peak", {"MFU": "speed/mfu", "HFU": "speed/hfu"}, True, True),
    Panel("Model TFLOP/s of a rank", {"TFLOP/s": "speed/tflops_per_gpu"}, from_zero=True),
    Panel("Throughput, tokens/s of all ranks", {"tokens/s": "speed/tokens_per_second"}, from_zero=True),
    Panel("Throughput, frames/s of all ranks", {"frames/s": "speed/frames_per_second"}, from_zero=True),
    Panel("Step time, seconds", {"step": "speed/step_seconds"}, from_zero=True),
    Panel("Waiting for data, share of the step", {"data wait": "speed/data_wait"}, True, True),
    Panel("Memory of rank 0, GiB: most allocated", {"GPU": "memory/peak_gib"}, from_zero=True),
    Panel("Memory of rank 0, GiB: resident", {"resident": "memory/resident_gib"}, from_zero=True),
)
LEARNING = (
    Panel("Learning rate", {"learning rate": "train/learning_rate"}, from_zero=True),
    Panel("Gradient norm before clipping", {"norm": "train/grad_norm"}),
    Panel("PSNR, dB", {"training": "train/psnr_db", "held out": "heldout/psnr_db"}),
    Panel("L1 error, video in [-1, 1]", {"training": "train/l1"}),
)


def loss_chart(metrics, status) -> dict | None:
    """Training loss of clips and of images with the validation loss; skipped steps are marked."""
    curves = []
    for color, (name, is_image) in enumerate((("clips", 0), ("images", 1))):
        steps, values = series(
            metrics.rows, "train/loss", lambda row, i=is_image: row.get("train/is_image", 0) == i
        )
        curves.append(Curve(name=name, steps=steps, values=values, color=color))
    curves.append(Curve(name="held out", **_series(metrics.measured, "validation/loss"), color=2))
    skipped = [row["step"] for row in status.skipped[-MOST_SHOWN * 10 :]]
    return _chart("Loss", curves, status, marks=skipped)


def time_chart(metrics, status) -> dict | None:
    """Validation loss by quarter of time: 0 is noise, 1 is data."""
    last = metrics.measured[-1] if metrics.measured else {}
    keys = sorted(key for key in last if key.startswith("validation/loss_t"))
    curves = [
        Curve(name=f"t {_times(key)}", **_series(metrics.measured, key), color=color)
        for color, key in enumerate(keys)
    ]
    return _chart("Validation loss by time (0 noise, 1 data)", curves, status)


def other_charts(panels, metrics, status) -> list[dict]:
    """The charts of `panels` for which the run has numbers."""
    found = []
    for panel in panels:
        curves = []
        for color, (name, key) in enumerate(panel.keys.items()):
            rows = metrics.measured if "heldout" in key else metrics.rows
            curves.append(Curve(name=name, **_series(rows, key), color=color))
        found.append(_chart(panel.title, curves, status, percent=panel.percent, from_zero=panel.from_zero))
    return [chart for chart in found if chart]


def validation_table(measured) -> dict | None:
    """Last validation loss of each latent shape (rows) and quarter of time (columns); None without one.

    A cell has its loss, how it changed since the measurement before, its course, and how much of the largest
    loss of the table it is.
    """
    last = measured[-1] if measured else {}
    keys = {match.groups(): key for key in last if (match := _PART.fullmatch(key))}
    if not keys:
        return None
    times = sorted({groups[3:] for groups in keys})
    shapes = sorted({groups[:3] for groups in keys}, key=lambda shape: [int(side) for side in shape])
    largest = max(last[key] for key in keys.values())
    rows = []
    for frames, height, width in shapes:
        cells = []
        for time in times:
            key = keys.get((frames, height, width, *time))
            cells.append(_cell(series(measured, key)[1], largest) if key else None)
        pixels = f"{8 * int(width)}x{8 * int(height)} px"
        rows.append({"frames": frames, "size": f"{height}x{width}", "pixels": pixels, "cells": cells})
    return {"step": last["step"], "times": [f"t {a} to {b}" for a, b in times], "rows": rows}


def _cell(values, largest):
    if not values:
        return None
    change = values[-1] / values[-2] - 1 if len(values) > 1 and values[-2] else None
    return {
        "loss": f"{values[-1]:.4f}",
        "change": "" if change is None else f"{change:+.1%}",
        "is_worse": change is not None and change > 0,
        "spark": spark(values),
        "share": round(100 * values[-1] / largest) if largest > 0 else 0,
    }


def rank_squares(beats, late, now) -> list[dict]:
    """A square a rank, or a host where ranks are many: what it is, whether it is behind, what it does."""
    behind = {beat.rank for beat in late}
    if len(beats) <= MOST_RANK_SQUARES:
        groups = [[beat] for beat in beats]
    else:
        by_host = {}
        for beat in beats:
            by_host.setdefault(beat.host, []).append(beat)
        groups = list(by_host.values())
    squares = []
    for group in groups:
        worst = min(group, key=lambda beat: (beat.step, beat.unix_seconds))
        who = f"rank {worst.rank} on {worst.host}"
        if len(group) > 1:
            who = f"{worst.host}, {len(group)} ranks, the last of them rank {worst.rank}"
        squares.append(
            {
                "is_behind": any(beat.rank in behind for beat in group),
                "said": f"{who}: step {worst.step}, {worst.phase}, {now - worst.unix_seconds:.0f} s ago",
            }
        )
    return squares


def beat_rows(beats, now) -> list[dict]:
    """The first of some `heartbeat.Beat`s, with how long ago each was."""
    ages = [(beat, duration(now - beat.unix_seconds)) for beat in beats[:MOST_SHOWN]]
    keys = ("rank", "host", "step", "phase")
    return [{"age": age, **{key: getattr(beat, key) for key in keys}} for beat, age in ages]


def skipped_rows(skipped) -> list[dict]:
    """The last skipped steps and rollbacks, the newest first, as the page says them."""
    rows = []
    for row in reversed(skipped[-MOST_SHOWN:]):
        if "rolled_back_to" in row:
            what = f"rolled back to {row['rolled_back_to']}"
        else:
            loss, norm = (_said(row.get(key)) for key in ("loss", "grad_norm"))
            what = f"{row.get('reason', '')} (loss {loss}, gradient norm {norm})"
        ids = row.get("sample_ids", [])
        more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
        rows.append({"step": row["step"], "what": what, "samples": ", ".join(map(str, ids[:6])) + more})
    return rows


def _times(key):
    return key.rpartition("_t")[2].replace("-", " to ")


def _said(value):
    return number(value) if isinstance(value, (int, float)) and abs(value) < float("inf") else str(value)


def _series(rows, key):
    steps, values = series(rows, key)
    return {"steps": steps, "values": values}


def _chart(title, curves, status, percent=False, from_zero=False, marks=()):
    curves = [curve for curve in curves if curve.values]
    svg = line_chart(curves, last=status.step, percent=percent, from_zero=from_zero, marks=marks)
    if not svg:
        return None
    legend = [
        {"name": curve.name, "color": curve.color, "last": number(curve.values[-1], percent)}
        for curve in curves
    ]
    return {"title": title, "svg": svg, "legend": legend}
