"""One HTML page that shows a demo: curves, frames, videos, speed, data and stages. Opens without a server.

Everything is inlined, so the file can be mailed. A part whose files are missing is left out.
"""

import json
import os
import platform
import statistics
from collections import Counter
from datetime import datetime
from importlib import metadata
from pathlib import Path

from nemo_moviegen.pages import render
from nemo_moviegen.recipe import METRICS_FILE, RECIPE_FILE
from nemo_moviegen.report_charts import AUTOENCODER_REPORT, LABELS, curves_svg, read_metrics, series
from nemo_moviegen.report_samples import data_uri, samples_part
from nemo_moviegen.report_scores import checkpoints_part, scores_part
from nemo_moviegen.writable import write_whole

RUNS = {
    "tae_image": "Image autoencoder",
    "tae": "Autoencoder",
    "t2i": "Text to image",
    "t2iv": "Text to image and video",
}
"""Run folders of a demo, in the order of the stages, and what the page calls them."""
CHARTS = {"tae_image": ("psnr_db",), "tae": ("l1", "psnr_db"), "t2i": ("loss",), "t2iv": ("loss",)}
"""What is drawn of each run: keys logged as train/KEY, and heldout/KEY where held-out clips are measured."""
PACKAGES = (
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "lightning",
    "nvidia-dali-cuda120",
    "transformers",
    "av",
)


def write_report(demo_folder, output_html) -> Path:
    """Write the page about what `demo_folder` holds; returns its path.

    Read: stages.json, {tae,t2i,t2iv}/{recipe.yaml,metrics.jsonl}, clips/manifest.parquet, latents/, and
    generated/settings.json with its videos. Raises ValueError where none of them is there.
    """
    demo, output_html = Path(demo_folder), Path(output_html)
    rooms = [*RUNS, "clips", "latents", "generated", "stages.json"]
    if not any((demo / room).exists() for room in rooms):
        raise ValueError(f"{demo} holds none of {', '.join(rooms)}: give the folder of a demo that has run")
    stages = read_stages(demo)
    metrics = {run: read_metrics(demo / run) for run in RUNS if (demo / run / METRICS_FILE).is_file()}
    recipes = {run: (demo / run / RECIPE_FILE) for run in RUNS}
    page = {
        "title": "Movie Gen demo: from raw video to a prompted sample",
        "subtitle": f"{machine()['processor']}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "facts": facts(stages, metrics),
        "stages": stage_rows(stages),
        "stages_note": f"The demo ran at scale {stages['scale']:g}." if "scale" in stages else "",
        "charts": charts(metrics),
        "autoencoder_report": AUTOENCODER_REPORT.as_posix() if (demo / AUTOENCODER_REPORT).is_file() else "",
        "runs": [run_row(run, rows, recipes[run]) for run, rows in metrics.items() if rows],
        "machine": machine().items(),
        "recipes": [{"name": n, "text": p.read_text()} for n, p in recipes.items() if p.is_file()],
        **data_part(demo),
        **samples_part(demo),
        **scores_part(demo),
        **checkpoints_part(demo),
    }
    html = render("report.html.j2", **page)
    output_html.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output_html, html)
    return output_html


def read_stages(demo) -> dict:
    """stages.json of the demo, {"stages": []} where there is none."""
    path = demo / "stages.json"
    return json.loads(path.read_text()) if path.is_file() else {"stages": []}


def facts(stages, metrics) -> list[tuple[str, str]]:
    """The few numbers at the top of the page: (name, value)."""
    done = [stage for stage in stages["stages"] if stage.get("finished")]
    found = []
    if done:
        found.append(("all stages", _duration(sum(stage["seconds"] for stage in done))))
        found.append(("peak memory", _gib(max(stage["peak_bytes"] for stage in done))))
    tae, video = metrics.get("tae", []), metrics.get("t2iv", [])
    psnr = series(tae, "heldout/psnr_db")[1] or series(tae, "train/psnr_db")[1]
    if psnr:
        found.append(("autoencoder PSNR", f"{psnr[-1]:.1f} dB"))
    for key, unit, name in (
        ("speed/step_seconds", "s", "step of the video model"),
        ("speed/tokens_per_second", "tokens/s", "video model, all ranks"),
    ):
        if typical := _typical(video, key, unit):
            found.append((name, typical))
    return found


def stage_rows(stages) -> list[dict]:
    """Rows of the table of stages; `share` is the bar's width in percent of the longest stage."""
    longest = max((stage["seconds"] for stage in stages["stages"]), default=0) or 1
    return [
        {
            "name": stage["name"],
            "duration": _duration(stage["seconds"]),
            "memory": _gib(stage["peak_bytes"]),
            "share": round(100 * stage["seconds"] / longest, 1),
            "command": stage["command"],
        }
        for stage in stages["stages"]
        if stage.get("finished")
    ]


def charts(metrics) -> list[dict]:
    """Curves of every run; images and clips apart where a run has both, for their losses differ."""
    found = []
    for run, rows in metrics.items():
        clips = [row for row in rows if not row.get("train/is_image")]
        images = [row for row in rows if row.get("train/is_image")]
        for key in CHARTS[run]:
            curves = {
                "clips": series(clips, f"train/{key}"),
                "images": series(images, f"train/{key}"),
                "held out": series(rows, f"heldout/{key}"),
            }
            curves = {name: curve for name, curve in curves.items() if curve[0]}
            if curves:
                svg = curves_svg(RUNS[run], curves, LABELS[key])
                title = f"{RUNS[run]}: {LABELS[key]} by step"
                found.append({"title": title, "image": data_uri(svg, "image/svg+xml")})
    return found


def run_row(run, rows, recipe_path) -> dict:
    """One line of the table of speeds."""
    import yaml

    recipe = yaml.safe_load(recipe_path.read_text()) if recipe_path.is_file() else {}
    optim = recipe.get("optim", {})
    keys = [f"{part}/{key}" for key in CHARTS[run] for part in ("train", "heldout")]
    return {
        "name": recipe.get("name", run),
        "steps": max(row["step"] for row in rows),
        "batch": recipe.get("global_batch", "-"),
        "learning_rate": f"{optim['learning_rate']:g}" if optim else "-",
        "step_time": _typical(rows, "speed/step_seconds", "s") or "-",
        "throughput": _typical(rows, "speed/tokens_per_second", "tokens/s")
        or _typical(rows, "speed/frames_per_second", "frames/s")
        or "-",
        "last": ", ".join(
            f"{key.removeprefix('train/').replace('/', ' ')} {_number(values[-1])}"
            for key in keys
            if (values := series(rows, key)[1])
        ),
    }


def data_part(demo) -> dict:
    """Counts of the clips by kind, split and codec, of the latents, and the quarantined files."""
    from nemo_moviegen.data.clips import read_manifest

    path = demo / "clips" / "manifest.parquet"
    clips = read_manifest(path) if path.is_file() else []
    counts, seconds = Counter(), Counter()
    for clip in clips:
        counts[(clip.kind, clip.split, clip.codec)] += 1
        seconds[(clip.kind, clip.split, clip.codec)] += clip.end_seconds - clip.start_seconds
    rows = [
        {"kind": k, "split": s, "codec": c, "count": n, "seconds": f"{seconds[(k, s, c)]:.0f}"}
        for (k, s, c), n in sorted(counts.items())
    ]
    quarantined = quarantined_files(demo)
    note = f"{len(clips)} clips and images in the manifest"
    for folder, what in (("latents", "encoded to train on"), ("latents_heldout", "encoded and held out")):
        index = demo / folder / "index.parquet"
        if index.is_file():
            import pyarrow.parquet as pq

            note += f", {pq.read_metadata(index).num_rows} {what}"
    note += f", {len(quarantined)} quarantined."
    return {"data": rows, "data_note": note, "quarantined": quarantined, "funnel": funnel_rows(demo)}


def funnel_rows(demo) -> list[dict]:
    """Name, condition, clips left and percent of each step of curation; [] where there was none."""
    path = demo / "clips" / "funnel.json"
    steps = json.loads(path.read_text())["steps"] if path.is_file() else []
    return [{**step, "percent": f"{step['percent']:.3g}"} for step in steps]


def quarantined_files(demo) -> list[str]:
    """`file: reason` of every file left out, each file once: stages that share clips meet it again."""
    reasons = {}
    for path in sorted(demo.rglob("quarantine*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            reasons.setdefault(row["path"], row["reason"])
    return [f"{path}: {reason}" for path, reason in reasons.items()]


def machine() -> dict[str, str]:
    """What the report was made on: processor, memory, accelerator, Python and package versions."""
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    found = {
        "processor": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "memory": _gib(psutil.virtual_memory().total),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # the GPU build of DALI has another name
    return found


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _gib(num_bytes):
    return f"{num_bytes / 2**30:.2f} GiB"


def _number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _typical(rows, key, unit):
    """Median of what the rows logged, with its unit; empty where nothing is."""
    values = series(rows, key)[1]
    return f"{_number(statistics.median(values))} {unit}" if values else ""
