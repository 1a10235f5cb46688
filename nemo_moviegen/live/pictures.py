"""The sample grid of a page: what a run made of its fixed prompts (training/samples.py), step by step."""

import base64
import io
import json
from pathlib import Path

from nemo_moviegen.progress import SAMPLES_FOLDER

MOST_PICTURES = 48
"""Strips on a page: of each prompt those of the newest steps, and that of the first."""
MOST_PROMPTS = 16
STRIP_PX = 720
"""Width of a strip on the page at most; the file beside the run is as it was written."""
_SMALL_BYTES = 16384


def sample_grid(run_folder, known) -> list[dict]:
    """For each prompt its text, shape and strips (step, picture, mp4 beside the page), the newest first.

    Pictures are part of the page. `known` keeps them from one making of it to the next.
    """
    prompts = {}
    for step, folder in _steps(run_folder):
        for path in sorted(folder.glob("*.json")):
            facts = _facts(path)
            if facts is not None:
                prompts.setdefault(facts["sample_id"], []).append((step, path, facts))
    shown = list(prompts.values())[:MOST_PROMPTS]
    most = max(2, MOST_PICTURES // max(1, len(shown)))
    return [_prompt(strips, most, Path(run_folder), known) for strips in shown]


def _steps(run_folder):
    found = []
    for folder in Path(run_folder, SAMPLES_FOLDER).glob("step=*"):
        number = folder.name.partition("=")[2]
        if number.isdigit():
            found.append((int(number), folder))
    return sorted(found)


def _prompt(strips, most, run_folder, known):
    picked = strips if len(strips) <= most else [strips[0], *strips[1 - most :]]
    _, _, facts = strips[-1]
    shape = "x".join(map(str, facts["latent_shape"]))
    rows = []
    for step, path, _ in reversed(picked):
        clip = path.with_suffix(".mp4")
        href = clip.relative_to(run_folder).as_posix() if clip.is_file() else ""
        rows.append({"step": step, "image": _picture(path.with_suffix(".png"), known), "clip": href})
    return {
        "prompt": facts["prompt"] or f"sample {facts['sample_id']}, which has no caption",
        "shape": shape,
        "shows": facts["shows"],
        "strips": [row for row in rows if row["image"]],
    }


def _facts(path):
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    keys = {"prompt", "sample_id", "latent_shape", "shows"}
    return facts if isinstance(facts, dict) and keys <= facts.keys() else None


def _picture(path, known):
    """A data: address of the strip, smaller where it is wide; "" where it can not be read."""
    try:
        key = (str(path), path.stat().st_mtime_ns)
        if key not in known:
            known[key] = _data_uri(path)
        return known[key]
    except OSError:
        return ""


def _data_uri(path):
    content, kind = path.read_bytes(), "png"
    if len(content) > _SMALL_BYTES:
        from PIL import Image

        image = Image.open(io.BytesIO(content)).convert("RGB")
        if image.width > STRIP_PX:
            image = image.resize((STRIP_PX, max(1, round(image.height * STRIP_PX / image.width))))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=80)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
