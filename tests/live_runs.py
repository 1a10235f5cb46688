"""Run folders as training leaves them, without any training."""

import json
from dataclasses import replace
from pathlib import Path

from nemo_moviegen.recipe import recipe_yaml
from recipes import tiny

QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


def metrics_row(step, **changes):
    """A line of metrics.jsonl: every third step takes images, whose loss is lower."""
    is_image = int(step % 3 == 0)
    row = {
        "step": step,
        "train/loss": 0.5 if is_image else 1.0,
        "train/is_image": is_image,
        "train/learning_rate": 1e-4,
        "train/skipped": 0,
        "speed/step_seconds": 2.0,
        "speed/data_seconds": 0.02,
        "speed/data_wait": 0.01,
        "speed/tokens_per_second": 5000.0,
        "speed/mfu": 0.4,
        "speed/hfu": 0.5,
        "memory/peak_gib": 61.5,
    }
    return row | changes


def validation(loss, shapes=("1x8x8", "2x8x8")):
    """Its keys, each quarter of time a tenth above the one before."""
    row = {"validation/loss": loss, "validation/seconds": 4.0}
    for number, quarter in enumerate(QUARTERS):
        row[f"validation/loss_t{quarter}"] = loss + number / 10
        for shape in shapes:
            row[f"validation/loss_{shape}_t{quarter}"] = loss + number / 10
    return row


def write_run(folder, rows, *, num_steps=100, **changes) -> Path:
    """A run folder of tiny.t2iv with these lines of metrics.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = replace(tiny.t2iv(), num_steps=num_steps, **changes)
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_beats(folder, beats):
    """OUTPUT/heartbeats/HOST.json of (rank, host, step, unix_seconds, phase)."""
    by_host = {}
    for beat in beats:
        keys = ("rank", "host", "step", "unix_seconds", "phase")
        by_host.setdefault(beat[1], []).append(dict(zip(keys, beat, strict=True)))
    for host, entries in by_host.items():
        path = Path(folder, "heartbeats", f"{host}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries))


def write_sample(folder, step, number, *, prompt="a red square", width=64, clip=True):
    """One prompt's files as training/samples.py names them."""
    import numpy as np

    from nemo_moviegen.video_files import write_png

    here = Path(folder, "samples", f"step={step}")
    here.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).uniform(-1, 1, (3, 32, width)).astype(np.float32)
    write_png(noise, here / f"{number:03d}.png")
    if clip:
        (here / f"{number:03d}.mp4").write_bytes(b"an mp4")
    facts = {"prompt": prompt, "sample_id": number, "latent_shape": [2, 8, 8], "shows": "frames"}
    (here / f"{number:03d}.json").write_text(json.dumps(facts))
