"""The Moving Shapes benchmark: does a model draw what the prompt says, also where the combination is new?

    captions of the set, seen and held out -> videos (`generate`) -> read by rule -> scores.json

Prompts are those of the rendered set: the first of the split train, whose every combination of words is in
the set if it has as many clips, and of the split heldout, whose pairs of colour and direction never are.
"""

import json
from dataclasses import asdict
from pathlib import Path

from nemo_moviegen.data.synthetic import caption, draw_spec, image_caption
from nemo_moviegen.evaluation.scores import score_rows
from nemo_moviegen.evaluation.shape_reading import read_shapes
from nemo_moviegen.generation.files import sample_file
from nemo_moviegen.generation.generate import generate
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.sampling import Sampler
from nemo_moviegen.video_files import read_frames
from nemo_moviegen.writable import write_whole

SCORES = "scores.json"
_SAMPLER = Sampler(batch_size=16)
GROUPS = {"train": "seen", "heldout": "held out"}
STILL = ("color", "shape", "background")
MOVING = ("direction", "speed")
JOINT = "color and direction"
WORDS = "all words"
ATTRIBUTES = (*STILL, *MOVING, JOINT, WORDS, "one shape", "consistent")
"""Rows of the scores. `all words`: every attribute the caption names; the last two are of no word."""


PER_TASK = ("samples", "sampling_seconds", "num_cut")
"""Settings of `generate` that are of one task's samples."""


def evaluate_shapes(
    models,
    output,
    *,
    num_seen=192,
    num_heldout=48,
    num_frames=16,
    size_px=64,
    rates=(16.0,),
    shapes_seed=0,
    sampler=_SAMPLER,
    tiling=None,
    task=(0, 1),
) -> dict | None:
    """Make the videos of the benchmark and read them; returns what scores.json holds.

    {"settings": of `generate`, "rows": [{group, attribute, right, of, share, low, high}], "samples": [{file,
    group, prompt, fps, asked, read, right}]}. With several `rates` every prompt is made at each, in groups of
    their own. Videos that are there are not made again. `task` (I, N) makes every Nth from the Ith; all but
    the last to end return None, as do ranks but the first. ValueError as `generate`, and for numbers that
    make no benchmark.
    """
    if num_seen < 0 or num_heldout < 0 or num_seen + num_heldout < 1:
        raise ValueError(f"{num_seen} seen and {num_heldout} held-out prompts: ask for one at least")
    specs = [("train", draw_spec(shapes_seed, index)) for index in range(num_seen)]
    specs += [("heldout", draw_spec(shapes_seed, index, "heldout")) for index in range(num_heldout)]
    told = image_caption if num_frames == 1 else caption
    prompts = [told(spec) for _, spec in specs]
    wanted = []
    for fps in rates:
        folder = Path(output, f"videos-{fps:g}-fps")
        bucket = Bucket(num_frames=num_frames, height_px=size_px, width_px=size_px, fps=fps)
        made = generate(models, prompts, folder, bucket, sampler, tiling=tiling, task=task)
        for row, ((split, spec), prompt) in enumerate(zip(specs, prompts, strict=True)):
            group = GROUPS[split] if len(rates) == 1 else f"{GROUPS[split]}, {fps:g} fps"
            wanted.append((sample_file(folder, row, prompt, num_frames), group, prompt, spec, fps))
    if not made:  # another rank than the first
        return None
    if missing := sum(not file.is_file() for file, *_ in wanted):
        print(
            f"task {task[0]}/{task[1]} is done; other tasks owe {missing} videos, the last of them reads all"
        )
        return None
    samples = [judge(*sample) for sample in wanted]
    settings = json.loads(made[-1].read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in PER_TASK} | {"fps": list(rates)}
    scores = {"settings": settings, "rows": score_rows(samples, ATTRIBUTES), "samples": samples}
    write_whole(Path(output, SCORES), json.dumps(scores, indent=1) + "\n")
    return scores


def judge(file, group, prompt, spec, fps) -> dict:
    """One sample: what its prompt asked for, what its file shows, which attributes are right."""
    frames_THWC = read_frames(file)
    reading = read_shapes(frames_THWC, fps)
    words = STILL if len(frames_THWC) == 1 else (*STILL, *MOVING)
    right = {word: getattr(reading, word) == getattr(spec, word) for word in words}
    if "direction" in right:
        right[JOINT] = right["color"] and right["direction"]
    right[WORDS] = all(right.values())
    right |= {"one shape": reading.count == 1, "consistent": reading.is_consistent}
    asked = {word: getattr(spec, word) for word in words}
    file = str(file.relative_to(file.parents[1]))
    return {
        "file": file,
        "group": group,
        "prompt": prompt,
        "fps": fps,
        "asked": asked,
        "read": asdict(reading),
        "right": right,
    }
