"""One HTML page that shows a demo: curves, frames, videos, speed, data and stages. Opens without a server.

Everything is inlined, so the file can be mailed. A part whose files are missing is left out.
"""

import base64
import json
import os
import platform
import statistics
import tempfile
from collections import Counter
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from nemo_moviegen.report_charts import LABELS, METRICS_FILE, curves_svg, read_metrics, series
from nemo_moviegen.video_files import pick_frames, read_frames, write_mp4

RUNS = {"tae": "Autoencoder", "t2i": "Text to image", "t2iv": "Text to image and video"}
"""Run folders of a demo, in the order of the stages, and what the page calls them."""
CHART_KEYS = ("train/l1", "train/psnr_db", "train/loss")
PACKAGES = (
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "lightning",
    "nvidia-dali-cuda120",
    "transformers",
    "av",
)
NUM_STRIP_FRAMES = 8


def write_report(demo_folder, output_html) -> Path:
    """Write the page about what `demo_folder` holds; returns its path.

    Read: stages.json, {tae,t2i,t2iv}/{recipe.yaml,metrics.jsonl}, clips/manifest.parquet, latents/, and
    generated/settings.json with its videos. Raises ValueError where none of them is there.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    demo, output_html = Path(demo_folder), Path(output_html)
    rooms = [*RUNS, "clips", "latents", "generated", "stages.json"]
    if not any((demo / room).exists() for room in rooms):
        raise ValueError(f"{demo} holds none of {', '.join(rooms)}: give the folder of a demo that has run")
    stages = read_stages(demo)
    metrics = {run: read_metrics(demo / run) for run in RUNS if (demo / run / METRICS_FILE).is_file()}
    recipes = {run: (demo / run / "recipe.yaml") for run in RUNS}
    page = {
        "title": "Movie Gen demo: from raw video to a prompted sample",
        "subtitle": f"{machine()['processor']}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "facts": facts(stages, metrics),
        "stages": stage_rows(stages),
        "stages_note": f"The demo ran at scale {stages['scale']:g}." if "scale" in stages else "",
        "charts": charts(metrics),
        "runs": [run_row(run, rows, recipes[run]) for run, rows in metrics.items() if rows],
        "machine": machine().items(),
        "recipes": [{"name": n, "text": p.read_text()} for n, p in recipes.items() if p.is_file()],
        **data_part(demo),
        **samples_part(demo),
    }
    environment = Environment(
        loader=PackageLoader("nemo_moviegen"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("report.html.j2").render(page)
    output_html.parent.mkdir(parents=True, exist_ok=True)
    part = output_html.with_name(f".{output_html.name}.part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, output_html)
    return output_html


def data_uri(content: bytes, kind) -> str:
    """`content` as a data: address of MIME type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
    for run, key, name in (
        ("tae", "train/psnr_db", "autoencoder PSNR"),
        ("t2iv", "speed/step_seconds", "video step time"),
        ("t2iv", "speed/tokens_per_second", "video tokens/s"),
    ):
        values = series(metrics.get(run, []), key)[1]
        if values:
            value = statistics.fmean(values[-5:]) if key.startswith("train/") else statistics.median(values)
            found.append((name, _value(key, value)))
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
        kinds = {"clips": [r for r in rows if not r.get("train/is_image")]}
        kinds["images"] = [r for r in rows if r.get("train/is_image")]
        for key in CHART_KEYS:
            curves = {kind: series(part, key) for kind, part in kinds.items()}
            curves = {kind: curve for kind, curve in curves.items() if len(curve[1]) > 1}
            if curves:
                label = LABELS.get(key, key)
                svg = curves_svg(RUNS[run], curves, label)
                found.append(
                    {"title": f"{RUNS[run]}: {label} by step", "image": data_uri(svg, "image/svg+xml")}
                )
    return found


def run_row(run, rows, recipe_path) -> dict:
    """One line of the table of speeds."""
    import yaml

    recipe = yaml.safe_load(recipe_path.read_text()) if recipe_path.is_file() else {}
    speeds = {}
    for name, key in (("step_time", "speed/step_seconds"), ("tokens", "speed/tokens_per_second")):
        values = series(rows, key)[1]
        speeds[name] = _value(key, statistics.median(values)) if values else "-"
    last = [f"{key.removeprefix('train/')} {_number(rows[-1][key])}" for key in CHART_KEYS if key in rows[-1]]
    return {
        "name": recipe.get("name", run),
        "steps": max(row["step"] for row in rows),
        "batch": recipe.get("global_batch", "-"),
        "learning_rate": f"{recipe['optim']['learning_rate']:g}" if recipe else "-",
        "last": ", ".join(last),
        **speeds,
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
    index = demo / "latents" / "index.parquet"
    if index.is_file():
        import pyarrow.parquet as pq

        note += f", {pq.read_metadata(index).num_rows} encoded to latents"
    note += f", {len(quarantined)} quarantined."
    return {"data": rows, "data_note": note, "quarantined": quarantined}


def quarantined_files(demo) -> list[str]:
    """`file: reason` of every file left out, each file once: stages that share clips meet it again."""
    reasons = {}
    for path in sorted(demo.rglob("quarantine*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            reasons.setdefault(row["path"], row["reason"])
    return [f"{path}: {reason}" for path, reason in reasons.items()]


def samples_part(demo) -> dict:
    """Generated videos beside the real and the reconstructed clip of the same caption, where there is one."""
    path = demo / "generated" / "settings.json"
    if not path.is_file():
        return {"samples": [], "sampling": ""}
    settings = json.loads(path.read_text())
    prompts = [sample["prompt"] for sample in settings["samples"]]
    clips = captioned_clips(demo, prompts, "image" if settings["num_frames"] == 1 else "video")
    known = {}
    if clips and (demo / "tae").is_dir():
        from nemo_moviegen.recipe import Bucket
        from nemo_moviegen.training.autoencoder import load_autoencoder

        bucket = Bucket(**{name: settings[name] for name in ("num_frames", "height_px", "width_px", "fps")})
        known = real_and_rebuilt(clips, bucket, load_autoencoder(demo / "tae"))
    samples = []
    for sample in settings["samples"]:
        split, real, rebuilt = known.get(sample["prompt"], (None, None, None))
        generated = read_frames(path.parent / sample["file"])
        views = [("real", real), ("reconstructed", rebuilt), ("generated", generated)]
        views = [view(name, frames, settings["fps"]) for name, frames in views]
        notes = {
            "train": "seen in training",
            "heldout": "held out: this combination was never trained on",
            None: "no clip of the data set has this caption",
        }
        samples.append(
            {
                "prompt": sample["prompt"],
                "note": notes[split],
                "views": views,
                "has_strips": any(v["strip"] for v in views),
                "shape": f"{settings['width_px']} / {settings['height_px']}",
            }
        )
    sampling = (
        f"Sampled with {settings['recipe']}: {settings['schedule']}, guidance "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}, "
        f"{settings['sampling_seconds']:.1f} s for {len(prompts)} prompts."
    )
    return {"samples": samples, "sampling": sampling}


def view(name, frames_THWC, fps) -> dict:
    """What the page shows of uint8 frames, or of None: a looping mp4 and a strip of frames, or one image."""
    shown = {"name": name, "video": "", "image": "", "strip": "", "picked": ""}
    if frames_THWC is None:
        return shown
    if len(frames_THWC) == 1:
        return {**shown, "image": _png(frames_THWC[0])}
    picked = pick_frames(len(frames_THWC), NUM_STRIP_FRAMES)
    gap = np.full((frames_THWC.shape[1], 2, 3), 255, np.uint8)
    strip = np.concatenate([part for i in picked for part in (frames_THWC[i], gap)][:-1], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        video_TCHW = frames_THWC.transpose(0, 3, 1, 2) / 127.5 - 1
        mp4 = write_mp4(video_TCHW, Path(folder) / "clip.mp4", fps).read_bytes()
    return {
        **shown,
        "video": data_uri(mp4, "video/mp4"),
        "image": _png(frames_THWC[len(frames_THWC) // 2]),  # where a phone saves data and does not play
        "strip": _png(strip),
        "picked": f"{picked[0] + 1} to {picked[-1] + 1}",
    }


def captioned_clips(demo, prompts, kind) -> list:
    """For each prompt that is the caption of clips of this kind, the first of them."""
    from nemo_moviegen.data.clips import read_manifest

    manifest = demo / "clips" / "manifest.parquet"
    clips = read_manifest(manifest) if manifest.is_file() else []
    first = {}
    for clip in clips:
        if clip.kind == kind and clip.caption in prompts:
            first.setdefault(clip.caption, clip)
    return list(first.values())


def real_and_rebuilt(clips, bucket, autoencoder) -> dict:
    """{caption: (split, real, reconstructed)} with uint8 frames [T, H, W, 3], as the bucket delivers them."""
    import torch

    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.video_files import to_uint8

    found = {}
    device = next(autoencoder.parameters()).device
    loader = ClipLoader(clips, bucket, batch_size=1, order=range(len(clips)))
    for video_BTCHW, rows in loader:
        with torch.no_grad():
            latent_BTCHW = autoencoder.encode(video_BTCHW.to(device)).mean_BTCHW
            rebuilt_BTCHW = autoencoder.decode(latent_BTCHW, num_frames=video_BTCHW.shape[1]).cpu()
        clip = clips[rows[0]]
        found[clip.caption] = (clip.split, to_uint8(video_BTCHW[0]), to_uint8(rebuilt_BTCHW[0]))
    return found


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


def _png(frame_HWC):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="PNG")
    return data_uri(buffer.getvalue(), "image/png")


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _gib(num_bytes):
    return f"{num_bytes / 2**30:.2f} GiB"


def _number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _value(key, value):
    unit = {"train/psnr_db": " dB", "speed/step_seconds": " s"}.get(key, "")
    return f"{_number(value)}{unit}"
