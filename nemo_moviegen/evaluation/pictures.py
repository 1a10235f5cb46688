"""Originals and reconstructions side by side as a video, and where latents stick out as a picture.

Small frames are enlarged by whole factors, pixel by pixel: what is seen is what was decoded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.video_files import to_uint8, write_mp4

NUM_SHOWN = 4
"""Clips in the video, and frames in the picture of latents."""
MOST_FRAMES = 48
"""Of a clip in the video: three seconds at 16 a second."""
_WIDTH_PX = 1280
_LARGEST_PX, _SMALLEST_PX = 384, 128
_TEXT_PX, _LINE_PX, _GAP_PX = 14, 22, 4


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A clip of the video: the original, then what each run makes of it."""

    job: int
    """Place of the clip in the evaluation."""
    title: str
    panels: list[np.ndarray]
    """uint8 [T, H, W, 3] each, as `shown_frames` gives them."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A frame of the picture of latents."""

    job: int
    title: str
    largest_norm: float
    original: np.ndarray
    """uint8 [H, W, 3]."""
    rebuilt: list[np.ndarray]
    """uint8 [H, W, 3], of each run."""
    norms: list[np.ndarray]
    """[H, W] in latents, of each run; see `outlier_norms`."""


def shown_frames(video_TCHW, num_panels) -> np.ndarray:
    """The first frames of a video in [-1, 1], uint8 [T, H, W, 3]; `num_panels` of them fit side by side."""
    from PIL import Image

    frames_THWC = to_uint8(video_TCHW[:MOST_FRAMES].float().cpu())
    wanted = min(_LARGEST_PX, max(_SMALLEST_PX, _WIDTH_PX // num_panels))
    height, width = frames_THWC.shape[1:3]
    longer = max(height, width)
    if longer <= wanted:
        factor = wanted // longer
        return frames_THWC.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (max(1, round(width * wanted / longer)), max(1, round(height * wanted / longer)))
    return np.stack([Image.fromarray(f).resize(size, Image.Resampling.LANCZOS) for f in frames_THWC])


def side_by_side(clips, names, path, fps) -> Path:
    """Write the clips, one after the other, as H.264: panels beside each other, each under its name.

    `names` has one for each panel. A clip of one frame stands for a second. Panels of one clip have one size,
    those of different clips too. Raises ValueError for an empty list.
    """
    if not clips:
        raise ValueError("no clip to show: give one or more")
    parts = []
    for number, clip in enumerate(clips, start=1):
        height, width = clip.panels[0].shape[1:3]
        frame_HWC = _frame(names, f"{number}/{len(clips)}  {clip.title}", height, width)
        num_frames = len(clip.panels[0])
        video_THWC = np.repeat(frame_HWC[None], num_frames, axis=0)
        for index, panel_THWC in enumerate(clip.panels):
            left = _left(index, width)
            video_THWC[:, _LINE_PX : _LINE_PX + height, left : left + width] = panel_THWC
        parts.append(video_THWC if num_frames > 1 else video_THWC.repeat(max(1, round(fps)), axis=0))
    video_TCHW = np.concatenate(parts).transpose(0, 3, 1, 2)
    return write_mp4(video_TCHW.astype(np.float32) / 127.5 - 1, path, fps)


def latent_dots(frames, names, path) -> Path:
    """Write one PNG: a row for each frame with the original, and each run's reconstruction and outlier norms.

    All maps have one scale, which the colour bar shows: from 0 to the largest norm, or to 4.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = 1 + 2 * len(names)
    height, width = frames[0].original.shape[:2]
    cell = 2.3  # inches
    size = (cell * num_columns + 0.9, (cell * height / width + 0.28) * len(frames) + 0.35)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(frames), num_columns, squeeze=False)
    largest = max(4.0, *(float(norm_HW.max()) for frame in frames for norm_HW in frame.norms))
    for row, frame in zip(axes, frames, strict=True):
        row[0].imshow(frame.original, interpolation="nearest")
        row[0].set_xlabel(shortened(frame.title, 34, len), fontsize=8)
        for index in range(len(names)):
            row[1 + 2 * index].imshow(frame.rebuilt[index], interpolation="nearest")
            norm_HW = frame.norms[index]
            image = row[2 + 2 * index].imshow(
                norm_HW, vmin=0, vmax=largest, cmap="inferno", interpolation="nearest", aspect="auto"
            )
            row[2 + 2 * index].set_box_aspect(height / width)
            row[2 + 2 * index].set_xlabel(f"largest {norm_HW.max():.2f}", fontsize=8)
        for one in row:
            one.set_xticks([])
            one.set_yticks([])
    for one, title in zip(
        axes[0], ["original", *(t for name in names for t in (name, f"norms, {name}"))], strict=True
    ):
        one.set_title(shortened(title, 30, len), fontsize=9)
    bar = figure.colorbar(image, ax=axes[:, -1], fraction=0.08, pad=0.04)
    bar.ax.axhline(3, color="white", linewidth=1.5)
    bar.set_label("deviations from the frame's mean (line: 3)", fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def shortened(text, room, width_of) -> str:
    """The text, its middle left out where `width_of` says that it is wider than `room`."""
    if width_of(text) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
        if width_of(shorter) <= room:
            return shorter
    return "..."


def _left(index, width):
    return index * (width + _GAP_PX)


def _frame(names, title, height, width):
    """uint8 [H, W, 3] with the words on it and room for the panels; sides are even."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT_PX)
    whole_width = _left(len(names), width) - _GAP_PX
    whole_width, whole_height = whole_width + whole_width % 2, height + 2 * _LINE_PX + height % 2
    picture = Image.new("RGB", (whole_width, whole_height), (24, 26, 32))
    draw = ImageDraw.Draw(picture)
    for index, name in enumerate(names):
        text = shortened(name, width - 4, font.getlength)
        draw.text((_left(index, width) + 2, 2), text, fill=(240, 240, 240), font=font)
    text = shortened(title, whole_width - 4, font.getlength)
    draw.text((2, _LINE_PX + height + 2), text, fill=(170, 176, 190), font=font)
    return np.asarray(picture)
