"""The page about an evaluation: its table, the video and the picture of latents, in one file to be mailed."""

from datetime import datetime
from pathlib import Path

from nemo_moviegen.evaluation.pictures import MOST_FRAMES, NUM_SHOWN
from nemo_moviegen.evaluation.rows import columns, notes, shown_rows
from nemo_moviegen.pages import render
from nemo_moviegen.report_samples import data_uri

_LARGEST_EMBEDDED = 16 * 2**20
"""Bytes of a video inside the page; a larger one is linked, and has to stay beside it."""


def write_report(metrics, path, *, video, dots) -> Path:
    """Write the page about `metrics` with the files `video` and `dots`; returns its path."""
    path, video, dots = Path(path), Path(video), Path(dots)
    heads, rows = columns(metrics), shown_rows(metrics)
    embedded = video.stat().st_size <= _LARGEST_EMBEDDED
    page = {
        "title": "Reconstructions of " + ", ".join(metrics["settings"]["runs"]),
        "subtitle": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "heads": heads,
        "texts": [head in ("", "run", "latent") for head in heads],
        "rows": rows,
        "notes": notes(metrics),
        "num_shown": NUM_SHOWN,
        "most_frames": MOST_FRAMES,
        "video": data_uri(video.read_bytes(), "video/mp4") if embedded else video.name,
        "dots": data_uri(dots.read_bytes(), "image/png"),
        "settings": {name: value for name, value in metrics["settings"].items() if name != "runs"},
        "runs": metrics["settings"]["runs"],
    }
    html = render("autoencoder.html.j2", **page)
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path
