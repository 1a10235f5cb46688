"""What a Moving Shapes video shows, read from its pixels by rule: no network, the same answer every time.

    background   median of all pixels, the nearest of the known colours
    shape        the largest connected part that differs from it, frame by frame; which template it fits
    colour       median inside the shape
    motion       slope of its centre over time, from frames in which the frame's edge does not cut it

A reading is a word only where the picture says it clearly; "" stands for what cannot be told, and counts as
wrong. On real renders, coded and decoded, every attribute is right in at least 99 of 100 (a test).

Axis letters: T frames, H W height and width, N frames in which the shape is seen.
"""

from dataclasses import dataclass

import numpy as np

from nemo_moviegen.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    coverage,
    half_extent,
)

FARTHEST_RGB = 110.0
"""Distance in levels beyond which a colour is none of the known ones; the nearest two are 129 apart."""
FARTHEST_BACKGROUND = 45.0
LEAST_CONTRAST = 70.0
"""Levels from the background from which a pixel can belong to a shape."""
LEAST_AREA = 0.015
"""Share of the frame from which a part counts as a shape: a speck of 60 px of 64 x 64 does not."""
MOST_AREA = 0.45
"""Share of the frame above which what differs from the background is no shape upon it."""
LEAST_OVERLAP = 0.7
"""Intersection over union with the template of a shape."""
SLOWEST, FASTEST = 0.12, 1.2
"""Frame widths a second between which a speed is one of the known ones."""
LARGEST_TURN = 0.5
"""Of the smaller component of a motion to the larger: 27 degrees off the axis."""
STEADY_AREA, STEADY_RGB, STEADY_PATH = 0.25, 45.0, 0.06
"""Largest deviation of a steady shape from its own median area (share), colour (levels) and path (widths)."""
FEWEST_FRAMES = 3


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One video. Words as in a caption, "" where the picture does not say."""

    color: str = ""
    shape: str = ""
    direction: str = ""
    speed: str = ""
    background: str = ""
    count: int = 0
    """Shapes in the frame, the median over frames."""
    is_consistent: bool = False
    """One shape in every frame, of steady area and colour, on a straight even path."""
    velocity_x: float = 0.0
    """Frame widths a second, to the right; nan where there is no motion to be read."""
    velocity_y: float = 0.0
    """Downwards."""


def read_shapes(frames_THWC, fps) -> Reading:
    """What uint8 frames [T, H, W, 3] at `fps` show; a video of one frame has no direction and no speed."""
    frames_THWC = np.asarray(frames_THWC, np.float32)
    background_rgb = np.median(frames_THWC.reshape(-1, 3), axis=0)
    background = nearest(background_rgb, BACKGROUNDS, FARTHEST_BACKGROUND)
    seen = [_largest_part(frame_HWC, background_rgb) for frame_HWC in frames_THWC]
    counts = [part.count if part else 0 for part in seen]
    count = int(np.median(counts))
    numbers = [number for number, part in enumerate(seen) if part]
    if not numbers or count == 0:
        return Reading(background=background)
    parts = [seen[number] for number in numbers]
    whole = [part for part in parts if not part.is_cut] or parts
    color_rgb = np.median([part.rgb for part in whole], axis=0)
    velocity, path_error = _velocity(parts, np.array(numbers) / fps)
    direction, speed = motion_words(*velocity)
    return Reading(
        color=nearest(color_rgb, COLORS, FARTHEST_RGB),
        shape=_shape(whole),
        direction=direction,
        speed=speed,
        background=background,
        count=count,
        is_consistent=bool(
            set(counts) == {1} and _is_steady(whole, color_rgb) and not path_error > STEADY_PATH
        ),
        velocity_x=float(velocity[0]),
        velocity_y=float(velocity[1]),
    )


def nearest(rgb, known, farthest) -> str:
    """The name of the nearest known colour; "" where that is farther than `farthest` levels."""
    distances = {name: float(np.linalg.norm(np.subtract(rgb, other))) for name, other in known.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= farthest else ""


def motion_words(x, y) -> tuple[str, str]:
    """(direction, speed) of a velocity in frame widths a second; "" for rest, diagonals and rates unknown."""
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    if not SLOWEST <= along <= FASTEST:
        return "", ""
    speed = min(SPEEDS, key=lambda word: abs(SPEEDS[word] - along))
    if across > LARGEST_TURN * along:
        return "", speed
    return max(DIRECTIONS, key=lambda word: np.dot(DIRECTIONS[word], (x, y))), speed


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The shape in one frame: x and y of its centre and sides as fractions of the frame."""

    count: int
    mask_HW: np.ndarray
    rgb: np.ndarray
    x: float
    y: float
    area: float
    is_cut: bool
    """By the edge of the frame, so that centre and area are not those of the shape."""


def _largest_part(frame_HWC, background_rgb):
    """The largest connected part that is not background, or None."""
    from scipy import ndimage

    difference_HW = np.linalg.norm(frame_HWC - background_rgb, axis=-1)
    labels_HW, _ = ndimage.label(difference_HW > LEAST_CONTRAST)
    areas = np.bincount(labels_HW.ravel())[1:] / labels_HW.size
    if not len(areas) or not LEAST_AREA <= areas.max() <= MOST_AREA:
        return None
    mask_HW = labels_HW == 1 + int(areas.argmax())
    core_HW = ndimage.binary_erosion(mask_HW, iterations=2)
    rgb = np.median(frame_HWC[core_HW if core_HW.any() else mask_HW], axis=0)
    # the shape ends where its colour is half of the way to the background's, however bright it is
    mask_HW &= difference_HW > np.linalg.norm(rgb - background_rgb) / 2
    height, width = mask_HW.shape
    rows, columns = np.nonzero(mask_HW)
    return _Part(
        count=int((areas >= LEAST_AREA).sum()),
        mask_HW=mask_HW,
        rgb=rgb,
        x=(columns.mean() + 0.5) / width,
        y=(rows.mean() + 0.5) / height,
        area=mask_HW.mean(),
        is_cut=bool(rows.min() == 0 or columns.min() == 0 or rows.max() == height - 1)
        or bool(columns.max() == width - 1),
    )


def _shape(parts) -> str:
    """The shape whose template, of the same centre and area, overlaps most with what is seen."""
    overlaps = {shape: np.mean([_overlap(part, shape) for part in parts]) for shape in SHAPES}
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else ""


def _overlap(part, shape):
    # a triangle's centre of area lies a sixth of its height below the middle of its box
    below = half_extent(shape, part.area) / 3 if shape == "triangle" else 0.0
    template_HW = coverage(shape, part.mask_HW.shape, part.area, part.x, part.y - below) > 0.5
    return (template_HW & part.mask_HW).sum() / (template_HW | part.mask_HW).sum()


def _velocity(parts, seconds_N):
    """((x, y) in frame widths a second, largest distance from the straight path); nan where none is told.

    Theil and Sen's slope, the median over all pairs of frames: a few wrong frames do not move it. Frames in
    which the shape is cut count where too few are whole: its centre then moves the same way, slower.
    """
    whole = np.array([not part.is_cut for part in parts])
    if whole.sum() < FEWEST_FRAMES:
        whole[:] = True
    if whole.sum() < FEWEST_FRAMES:
        return np.full(2, np.nan), np.nan
    seconds_N = seconds_N[whole]
    center_N2 = np.array([(part.x, part.y) for part in parts])[whole]
    first, second = np.triu_indices(len(seconds_N), k=1)
    gaps = (seconds_N[second] - seconds_N[first])[:, None]
    velocity = np.median((center_N2[second] - center_N2[first]) / gaps, axis=0)
    rest_N2 = center_N2 - velocity * seconds_N[:, None]
    rest_N2 -= np.median(rest_N2, axis=0)
    return velocity, float(np.abs(rest_N2).max())


def _is_steady(parts, color_rgb):
    areas = np.array([part.area for part in parts])
    colors_N3 = np.array([part.rgb for part in parts])
    return (
        np.abs(areas / np.median(areas) - 1).max() <= STEADY_AREA
        and np.linalg.norm(colors_N3 - color_rgb, axis=-1).max() <= STEADY_RGB
    )
