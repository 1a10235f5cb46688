"""The page about a curation: the funnel as table and plot, and what each step kept and dropped."""

import io
import math
import os
import re
from collections import Counter
from datetime import datetime

import numpy as np

from nemo_moviegen.curation.select import KEPT, TWINS, column_of, embeddings
from nemo_moviegen.curation.store import replacing
from nemo_moviegen.curation.work import read_strips
from nemo_moviegen.pages import render
from nemo_moviegen.report_samples import data_uri

NUM_SHOWN = 6
"""Clips of each kind that a step shows."""
_MOST_REFUSED = 200


def write_report(path, funnel, table, selection, output, recipe):
    """Write the page; one file with everything in it, so that it can be mailed.

    Kept clips are drawn by the recipe's seed, dropped ones are those nearest to the limit: there a threshold
    is judged.
    """
    shown = [_shown(number, step, table, selection, recipe) for number, step in enumerate(selection.steps)]
    names = {table["video"][row].as_py() for part in shown for row in (*part["dropped"], *part["kept"])}
    strips = read_strips(output, names, recipe)
    page = {
        "title": f"Curation: {funnel['folder']}",
        "subtitle": f"recipe {recipe.name}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "facts": _facts(funnel, table, selection),
        "funnel": [_line(step, funnel["steps"]) for step in funnel["steps"]],
        "chart": data_uri(funnel_svg(funnel["steps"]), "image/svg+xml"),
        "steps": [
            _step(part, step, table, strips) for part, step in zip(shown, selection.steps, strict=True)
        ],
        "cameras": _cameras(table, selection),
        "refused": list(funnel["refused"].items())[:_MOST_REFUSED],
        "num_refused": len(funnel["refused"]),
        "reasons": _reasons(funnel["refused"].values()),
        "ignored": ", ".join(f"{count} {ending}" for ending, count in funnel["ignored"].items()),
    }
    html = render("curation.html.j2", **page)
    with replacing(path) as part:
        part.write_text(html, encoding="utf-8", errors="backslashreplace")


def funnel_svg(steps) -> bytes:
    """SVG: rows left after each step, on a logarithmic scale as soon as it spans more than a factor of 20."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [step["rows"] for step in steps]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(9, 0.6 + 0.32 * len(steps)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(steps)), rows, color="#2f6fdb", height=0.66)
        axes.set_yticks(range(len(steps)), [step["name"] for step in steps])
        axes.invert_yaxis()
        positive = [count for count in rows if count]
        if positive and max(positive) > 20 * min(positive):
            axes.set_xscale("log")
            axes.set_xlim(left=0.5)
        for place, step in enumerate(steps):
            text = f" {step['rows']:,} ({step['percent']:.3g}%)"
            axes.text(max(step["rows"], 0.5), place, text, va="center", fontsize=9, color="#5d6678")
        axes.set_xlabel("clips left")
        axes.margins(x=0.16)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _shown(number, step, table, selection, recipe):
    """Rows to show of a step: dropped ones nearest to its limit first, and some that got past it."""
    dropped = np.flatnonzero(selection.dropped_by_N == number)
    kept = np.flatnonzero((selection.dropped_by_N == KEPT) | (selection.dropped_by_N > number))
    entry = next((f for f in recipe.filters if f.name == step.name), None)
    if entry:
        score_N = column_of(table, step.column)
        limits = [limit for limit in (entry.low, entry.high) if math.isfinite(limit)]
        away = [min((abs(score_N[row] - limit) for limit in limits), default=0.0) for row in dropped]
        dropped = dropped[np.argsort(away, kind="stable")]
    lots = np.random.default_rng([recipe.seed, number]).permutation(len(kept))
    part = {
        "dropped": [int(row) for row in dropped[:NUM_SHOWN]],
        "kept": [int(row) for row in kept[np.sort(lots[:NUM_SHOWN])]] if len(dropped) else [],
        "num_dropped": len(dropped),
    }
    return _with_twins(part, table, kept) if step.name == TWINS and len(dropped) else part


def _with_twins(part, table, past):
    """Of clips dropped as copies, what they are copies of: that is shown instead of clips drawn by chance."""
    dropped = part["dropped"]
    cosine_DN = embeddings(table, dropped) @ embeddings(table, past).T
    twins = cosine_DN.argmax(axis=1)
    notes = {row: f"cosine {cosine_DN[n, twins[n]]:.4f}" for n, row in enumerate(dropped)}
    return part | {"kept": [int(past[twin]) for twin in twins], "notes": notes}


def _step(part, step, table, strips):
    def views(rows):
        return [_view(row, step, table, strips) | _note(row) for row in rows]

    def _note(row):
        return {"score": part["notes"][row]} if row in part.get("notes", {}) else {}

    return {
        "name": step.name,
        "condition": step.condition,
        "num_dropped": part["num_dropped"],
        "dropped": views(part["dropped"]),
        "kept": views(part["kept"]),
        "kept_title": "the clips they are copies of, in the same order" if "notes" in part else "passed",
    }


def _view(row, step, table, strips):
    video, start = table["video"][row].as_py(), table["start_seconds"][row].as_py()
    score = table[step.column][row].as_py() if step.column else None
    strip = strips.get((video, start))
    return {
        "name": video if start is None else f"{video} at {start:.1f} s",
        "short": os.path.basename(video),
        "score": "" if score is None or math.isnan(score) else f"{step.column} {score:.3g}",
        "image": data_uri(strip, "image/jpeg") if strip else "",
    }


def _line(step, steps):
    first, previous = steps[0], steps[max(0, steps.index(step) - 1)]
    return step | {
        "dropped": previous["rows"] - step["rows"],
        "hours": f"{step['clip_seconds'] / 3600:.2f}" if step["clip_seconds"] >= 360 else "",
        "seconds": f"{step['clip_seconds']:,.0f} s",
        "share": 100 * step["rows"] / max(first["rows"], 1),
    }


def _facts(funnel, table, selection):
    seconds = np.nan_to_num(column_of(table, "clip_seconds"))[selection.kept].sum()
    return [
        ("files", f"{funnel['num_files']:,}"),
        ("clips kept", f"{len(selection.kept):,}"),
        ("of clips kept", f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:,.1f} h"),
        ("files quarantined", f"{len(funnel['refused']):,}"),
    ]


def _cameras(table, selection):
    """Number of kept clips by camera label, the commonest first."""
    names, counts = np.unique(
        [name or "not told" for name in table["camera"].take(selection.kept).to_pylist()], return_counts=True
    )
    return sorted(((int(n), str(name)) for n, name in zip(counts, names, strict=True)), reverse=True)


def _reasons(reasons):
    """Number of files by kind of reason: its first words, without paths and numbers."""
    kinds = Counter()
    for reason in reasons:
        words = [word for word in re.split(r"[(;:]", reason)[0].split() if "/" not in word]
        kinds[re.sub(r"(?<![-\w])[0-9][0-9.]*", "N", " ".join(words))] += 1
    return sorted(((count, kind) for kind, count in kinds.items()), reverse=True)
