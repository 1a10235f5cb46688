"""The folder of samples: one file a prompt, a contact sheet, and what they were made with.

    000-a-red-circle.mp4    under its name when it is whole; a png for an image
    settings.json           how they are made, and a row a sample; contact_sheet.png shows the first of them
    settings-I-of-N.json    the same of task I of a job array, beside contact_sheet-I-of-N.png

A job that was killed, or a task that starts again, makes what is not there. Settings are written before the
first sample, so samples of two kinds never mix in one folder.
"""

import collections
import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch

from nemo_moviegen.inputs import Bucket
from nemo_moviegen.video_files import contact_sheet, read_frames, stream_mp4, write_png
from nemo_moviegen.writable import write_whole

SETTINGS_FILE = "settings.json"
SHEET_FILE = "contact_sheet.png"
SHEET_COLUMNS, SHEET_ROWS = 8, 64
"""Frames of a sample on the sheet, and samples at most."""
CAPTION_CHARACTERS = 300
"""Of a prompt that the sheet shows; the settings have all of it."""


def settings_of(models, prompts, bucket, sampler, rewrite, tiling) -> dict:
    """What makes the samples of a folder the samples they are, as its settings say it."""
    return {
        **{f"{kind.replace(' ', '_')}_folder": str(folder) for kind, folder in models.folders().items()},
        "step": models.step,
        "weights": models.weights,
        **{name: getattr(bucket, name) for name in ("num_frames", "height_px", "width_px", "fps")},
        "schedule": sampler.told(),
        "asked_guidance_scale": sampler.guidance_scale,
        "seed": sampler.seed,
        "negative_prompt": sampler.negative_prompt,
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "rewrite": getattr(rewrite, "name", ""),
        "tiling": asdict(tiling),
    }


def check_settings(output, settings):
    """ValueError where samples in `output` are made with other settings."""
    for path in sorted(Path(output).glob(f"{Path(SETTINGS_FILE).stem}*.json")):
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if before.get(name, "") != value]:
            names = ", ".join(name.replace("_sha256", "").replace("_", " ") for name in changed)
            raise ValueError(
                f"{output} holds samples of another {names} ({path.name}): choose another output folder, or "
                "remove them"
            )


def read_samples(folder) -> dict:
    """{number: (prompt, file)} of a finished folder, that of several tasks too; ValueError for another."""
    found = {}
    for file in sorted(Path(folder).glob(f"{Path(SETTINGS_FILE).stem}*.json")):
        for sample in json.loads(file.read_text(encoding="utf-8")).get("samples", []):
            found[sample["number"]] = (sample["prompt"], Path(folder, sample["file"]))
    missing = [str(file) for _, file in found.values() if not file.is_file()]
    if missing or not found:
        what = f"lacks {missing[0]}" if missing else "holds no samples"
        raise ValueError(f"{folder} {what}: give a folder that `moviegen generate` has finished")
    return found


def read_bucket(folder) -> Bucket:
    """The shape and rate of the samples of a folder."""
    first = min(Path(folder).glob(f"{Path(SETTINGS_FILE).stem}*.json"))
    settings = json.loads(first.read_text(encoding="utf-8"))
    return Bucket(**{name: settings[name] for name in ("num_frames", "height_px", "width_px", "fps")})


def put_together(made) -> dict:
    """What the settings say of samples made by several ranks: {} of a rank that made none."""
    made = [told for told in made if told]
    if not made:
        return {}
    num_cut = collections.Counter()
    for told in made:
        num_cut.update(told["num_cut"])
    slowest = max(told["sampling_seconds"] for told in made)
    return {**made[0], "sampling_seconds": slowest, "num_cut": dict(num_cut)}


def write_settings(path, settings) -> Path:
    """Write what samples are made with; returns the file."""
    write_whole(path, json.dumps(settings, indent=2) + "\n")
    return path


def write_sheet(path, samples, prompts) -> Path:
    """The contact sheet of the first samples, as their files show them; returns it."""
    shown = [
        torch.from_numpy(read_frames(file)).permute(0, 3, 1, 2) / 127.5 - 1 for file in samples[:SHEET_ROWS]
    ]
    captions = [_shortened(prompt) for prompt in prompts[:SHEET_ROWS]]
    return contact_sheet(shown, captions, path, num_columns=SHEET_COLUMNS)


def write_sample(chunks, path, fps) -> Path:
    """Write chunks [t, 3, H, W] in [-1, 1] as they come: an mp4, or the frame of a png; returns the path."""
    if path.suffix == ".png":
        part = path.with_name(f".part-{path.name}")
        write_png(torch.cat(list(chunks))[0], part)
        os.replace(part, path)
        return path
    return stream_mp4(chunks, path, fps)


def sample_file(output, number, prompt, num_frames) -> Path:
    """Where the sample of that number goes."""
    ending = "png" if num_frames == 1 else "mp4"
    return Path(output, f"{number:03d}-{_slug(prompt)}.{ending}")


def of_task(path, task) -> Path:
    """The file of one task of an array, which carries its number; the path itself where there is one task."""
    return path if task[1] == 1 else path.with_name(f"{path.stem}-{task[0]}-of-{task[1]}{path.suffix}")


def _slug(prompt):
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "sample"


def _shortened(prompt):
    text = " ".join(prompt.split())
    if len(text) <= CAPTION_CHARACTERS:
        return text
    return f"{text[:CAPTION_CHARACTERS]} ... ({len(text)} characters)"
