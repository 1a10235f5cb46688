"""Moving Shapes: a synthetic data set whose captions say exactly what each clip shows.

Colour x shape x direction x speed on a plain background, rendered to real VP9 files. Every attribute is
one word of the caption, so what a model learnt from a prompt can be measured on its samples. Some colour
and direction pairs never occur in training (`heldout_pairs`): a model that draws them has composed.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.data.clips import Clip
from nemo_moviegen.data.cutting import image_of, write_video

COLORS = {"red": (225, 40, 35), "green": (40, 190, 60), "blue": (50, 95, 245), "yellow": (240, 215, 40)}
COLORS |= {"white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y), y pointing down."""
SPEEDS = {"slowly": 0.33, "quickly": 0.66}
"""Frame widths a second: 1.3 and 2.6 px a frame at 64 px and 16 fps."""
BACKGROUNDS = {"black": (10, 10, 10), "navy": (16, 26, 64)}

_HELDOUT = (("red", "left"), ("green", "right"), ("blue", "up"), ("yellow", "down"))


@dataclass(frozen=True, kw_only=True)
class ShapeSpec:
    """One clip: the words of its caption and the numbers a caption leaves open, as fractions of the frame."""

    color: str
    shape: str
    direction: str
    speed: str
    background: str = "black"
    area: float = 0.12
    """Share of the frame the shape covers, the same for every shape."""
    start_x: float = 0.5
    """Centre of the shape at time zero, from the left and from the top."""
    start_y: float = 0.5

    def __post_init__(self):
        known = {
            "color": COLORS,
            "shape": SHAPES,
            "direction": DIRECTIONS,
            "speed": SPEEDS,
            "background": BACKGROUNDS,
        }
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(words)}"
                )


def heldout_pairs() -> tuple[tuple[str, str], ...]:
    """The (color, direction) pairs that occur in the held-out split only."""
    return _HELDOUT


def caption(spec) -> str:
    """What the clip shows, every attribute one word."""
    return (
        f"a {spec.color} {spec.shape} moves {spec.direction} {spec.speed} on a {spec.background} background"
    )


def image_caption(spec) -> str:
    """What one frame of the clip shows: the caption without its motion."""
    return f"a {spec.color} {spec.shape} on a {spec.background} background"


def draw_spec(seed, index, split="train") -> ShapeSpec:
    """Clip `index` of the set with this seed; a pure function of its arguments.

    Consecutive indices walk through a shuffle of all combinations of the split, so a set of any length is
    balanced. A one-second clip keeps its shape in the frame, but for the edge of the widest fast ones.
    """
    combinations = [
        words
        for words in itertools.product(COLORS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
        if ((words[0], words[2]) in _HELDOUT) == (split == "heldout")
    ]
    row = np.random.default_rng((seed, split == "heldout")).permutation(len(combinations))[
        index % len(combinations)
    ]
    color, shape, direction, speed, background = combinations[row]
    rng = np.random.default_rng((seed, split == "heldout", index))
    travel = SPEEDS[speed] * np.array(DIRECTIONS[direction])
    # the path is centred: what room the travel leaves around the middle is given to chance
    room = np.where(travel != 0, (0.7 - np.abs(travel)).clip(0.04) / 2, 0.2)
    start_x, start_y = 0.5 - travel / 2 + rng.uniform(-room, room)
    return ShapeSpec(
        color=color,
        shape=shape,
        direction=direction,
        speed=speed,
        background=background,
        area=float(rng.uniform(0.11, 0.13)),
        start_x=float(start_x),
        start_y=float(start_y),
    )


def render(spec, num_frames=16, size_px=64, fps=16) -> np.ndarray:
    """Frames of the clip, uint8 [T, H, W, 3], soft edges. A shape that leaves comes back opposite."""
    step_x, step_y = DIRECTIONS[spec.direction]
    travel_T = SPEEDS[spec.speed] * np.arange(num_frames, dtype=np.float32) / fps
    half = half_extent(spec.shape, spec.area)
    x_T, y_T = (
        _wrap(start + step * travel_T, half)
        for start, step in ((spec.start_x, step_x), (spec.start_y, step_y))
    )
    coverage_THW1 = coverage(spec.shape, (size_px, size_px), spec.area, x_T, y_T)[..., None]
    color, background = (np.float32(rgb) for rgb in (COLORS[spec.color], BACKGROUNDS[spec.background]))
    return (background + coverage_THW1 * (color - background) + 0.5).astype(np.uint8)


def coverage(shape, size_HW, area, x, y) -> np.ndarray:
    """Share of each pixel a shape covers, float32 [..., H, W], its edge one pixel soft.

    `area` is its share of the frame; its centre `x`, `y` (numbers, or arrays of one shape) counts from the
    left and from the top, in widths and heights of the frame.
    """
    height, width = size_HW
    x_W = (np.arange(width, dtype=np.float32) + 0.5) / width - np.asarray(x, np.float32)[..., None]
    y_H = (np.arange(height, dtype=np.float32) + 0.5) / height - np.asarray(y, np.float32)[..., None]
    distance_HW = _distance(shape, x_W[..., None, :], y_H[..., :, None], half_extent(shape, area))
    # a pixel whose centre lies d pixels outside the edge is covered to 1/2 - d
    return np.clip(0.5 - distance_HW * width, 0, 1)


def write_moving_shapes(
    folder, num_clips, *, num_frames=16, size_px=64, fps=16, seed=0, split="train", images=True, progress=True
) -> list[Clip]:
    """Render `num_clips` clips to VP9 files in `folder`; returns their rows (the caller writes the manifest).

    With `images`, one frame of each clip, at a time drawn per clip, follows it as an image row. The files of
    two splits or seeds do not collide. Beside each file lies a JSON with its captions, split and attributes,
    as `moviegen curate` reads them.
    """
    from rich.progress import track

    if num_clips < 1 or num_frames < 1 or size_px % 2:
        raise ValueError(
            f"{num_clips} clips of {num_frames} frames of {size_px} px: counts start at 1, sizes are even"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    indices = range(num_clips)
    for index in track(indices, description="moving shapes", disable=not progress):
        spec = draw_spec(seed, index, split)
        clip_id = f"shapes-{split}-{seed}-{index:06d}"
        path = write_video(folder / f"{clip_id}.mp4", render(spec, num_frames, size_px, fps), fps)
        sidecar = {
            "caption": caption(spec),
            "image_caption": image_caption(spec),
            "split": split,
            "attributes": asdict(spec),
        }
        path.with_suffix(".json").write_text(json.dumps(sidecar, indent=1) + "\n")
        clip = Clip(
            clip_id=clip_id,
            path=str(path),
            kind="video",
            start_seconds=0.0,
            end_seconds=num_frames / fps,
            source_fps=float(fps),
            width_px=size_px,
            height_px=size_px,
            codec="vp9",
            caption=caption(spec),
            split=split,
            attributes=json.dumps(asdict(spec)),
        )
        frame = int(np.random.default_rng((seed, split == "heldout", index, 1)).integers(num_frames))
        rows += [clip, image_of(clip, frame / fps, image_caption(spec))] if images else [clip]
    return rows


def half_extent(shape, area):
    """Half the width and height of the box around a shape that covers `area` of the frame."""
    per_extent = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # area of a shape of half extent 1
    return float(np.sqrt(area / per_extent[shape]))


def _wrap(center, half):
    """Centres on a ring one shape longer than the frame: out at one side is in at the other."""
    return (center + half) % (1 + 2 * half) - half


def _distance(shape, x, y, half):
    """Signed distance to the shape's edge, negative inside; exact along the sides."""
    if shape == "circle":
        return np.hypot(x, y) - half
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half
    side = (2 * np.abs(x) - y - half) / np.sqrt(np.float32(5))  # apex up, as wide as high
    return np.maximum(side, y - half)
