"""Small films with known faults, for curation: each is what one filter is for, or is not for.

Frames are uint8 RGB [T, H, W, 3], 240 x 136 at 16 frames a second unless it says otherwise.
"""

import json
from pathlib import Path

import cv2
import numpy as np

from nemo_moviegen.data.cutting import write_video

FPS = 16
HEIGHT, WIDTH = 136, 240


def scenery(seed, height=2 * HEIGHT, width=2 * WIDTH):
    """A picture with the spectrum of a photograph, and a few things with edges in it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 8):
        grid = rng.normal(size=(2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
        image += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.75**octave
    image = 128 + 95 * image / np.abs(image).max() * 1.6 + rng.normal(size=3) * 12
    for _ in range(14):
        x, y = rng.integers(0, width), rng.integers(0, height)
        color = [float(c) for c in rng.integers(20, 235, 3)]
        cv2.circle(image, (int(x), int(y)), int(rng.integers(5, height // 8)), color, -1)
    return image.clip(0, 255).astype(np.uint8)


def pan(seed=0, num_frames=32, x=2.0, y=0.0):
    """The camera turns: the picture moves by -x, -y px a frame."""
    image = scenery(seed)
    shifts = np.arange(num_frames)[:, None] * [x, y]
    start = np.array([WIDTH, HEIGHT]) / 2 - shifts.mean(axis=0)
    return np.stack([_window(image, *(start + shift)) for shift in shifts])


def still(seed=0, num_frames=32):
    """A photograph as a film."""
    return pan(seed, num_frames, x=0.0)


def zoom(seed=0, num_frames=32, growth=1.02):
    """The picture grows by this factor a frame."""
    image = scenery(seed)
    frames = []
    for number in range(num_frames):
        scale = 1.1 * growth ** (number - num_frames / 2)
        matrix = np.float32([[scale, 0, WIDTH / 2 - scale * WIDTH], [0, scale, HEIGHT / 2 - scale * HEIGHT]])
        frames.append(cv2.warpAffine(image, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR))
    return np.stack(frames)


def shaky(seed=0, num_frames=32, px=3.0):
    """A camera in an unsteady hand."""
    image, rng = scenery(seed), np.random.default_rng(seed)
    shifts = cv2.GaussianBlur(rng.normal(size=(num_frames, 2)), (1, 3), 0) * px
    return np.stack([_window(image, WIDTH / 2 + dx, HEIGHT / 2 + dy) for dx, dy in shifts])


def slideshow(seed=0, num_slides=4, frames_each=8):
    """Photographs one after another."""
    return np.concatenate([still(seed + number, frames_each) for number in range(num_slides)])


def letterboxed(frames_THWC, share=0.2, color=0):
    """Bars above and below that cover this share of the frame."""
    boxed = frames_THWC.copy()
    bar = round(frames_THWC.shape[1] * share / 2)
    boxed[:, :bar] = boxed[:, -bar:] = color
    return boxed


def titled(frames_THWC, text="SUBSCRIBE", size=28):
    """Burnt-in text."""
    from PIL import Image, ImageDraw, ImageFont

    font, written = ImageFont.load_default(size=size), []
    for frame_HWC in frames_THWC:
        image = Image.fromarray(frame_HWC)
        place = (20, frame_HWC.shape[0] - 2 * size)
        ImageDraw.Draw(image).text(
            place, text, font=font, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0)
        )
        written.append(np.asarray(image))
    return np.stack(written)


def blurred(frames_THWC, px=4.0):
    """Out of focus."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), px) for frame in frames_THWC])


def film(folder, name, frames_THWC, *, caption="a film", fps=FPS, **options) -> Path:
    """Write frames as `folder/name` with a caption beside it; a name decides the container."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames_THWC, fps, **options)
    if caption is not None:
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))
    return path


def _window(image, left, top):
    matrix = np.float32([[1, 0, -left], [0, 1, -top]])
    return cv2.warpAffine(image, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
