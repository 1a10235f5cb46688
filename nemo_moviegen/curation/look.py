"""What scorers see of a clip: a few frames, and pairs of consecutive frames for motion; decoded once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nemo_moviegen.curation.footage import decode, narrowed, shrunk

VERSION = "2"
FLOW_WIDTH_PX = 320
"""Optical flow is computed at this width."""


@dataclass(frozen=True)
class Look:
    """Frames of one clip, upright."""

    frames_THWC: np.ndarray
    """uint8 RGB, evenly spaced; T is odd."""
    pairs_P2HW: np.ndarray
    """uint8 luma: each of P frames with the one after it. P = 0 for an image."""

    @property
    def middle_HWC(self) -> np.ndarray:
        """The clip's middle frame."""
        return self.frames_THWC[len(self.frames_THWC) // 2]

    @cached_property
    def flow_PHW2(self) -> np.ndarray:
        """float32: where each pixel goes to from frame to frame, (right, down) in shares of the width.

        Dense inverse search (OpenCV). Motion vectors of the codec would be free, but VP9 and AV1 decoders
        export none, and H.264's say what was cheap to code, not what moved.
        """
        import cv2

        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        height, width = self.pairs_P2HW.shape[2:]
        scale = min(1.0, FLOW_WIDTH_PX / width)
        # its patches need some pixels: thin pictures are enlarged
        scale = max(scale, 32 / min(height, width))
        size = (round(width * scale), round(height * scale))
        small = [
            [cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in pair] for pair in self.pairs_P2HW
        ]
        flows = [search.calc(before, _as_bright_as(before, after), None) for before, after in small]
        return np.stack(flows) / size[0] if flows else np.zeros((0, *size[::-1], 2), np.float32)


def _as_bright_as(before_HW, after_HW):
    """`after` with the mean and contrast of `before`: a flickering lamp moves nothing."""
    gain = (before_HW.std() + 1) / (after_HW.std() + 1)
    return ((after_HW - after_HW.mean()) * gain + before_HW.mean() + 0.5).clip(0, 255).astype(np.uint8)


def look_at(path, span, fps, settings) -> Look:
    """The frames of a span of a video (a scene's `Span`), as `Looking` wants them; one frame is an image.

    ValueError where the span holds no frame.
    """
    frame_seconds = 1 / fps
    wanted_T = _evenly(span, settings.num_frames, 0.0)
    wanted_P = _evenly(span, settings.num_pairs, frame_seconds)
    frames, pairs, before = [], [], []
    for seconds, frame in decode(path, span.start):
        if seconds >= span.end - 0.01 * frame_seconds:
            break
        if seconds < span.start - 0.01 * frame_seconds:
            continue
        if before:
            after = narrowed(frame, settings.pair_width_px, "gray")
            pairs += [(first, after) for first in before]
            before = []
        while len(frames) < len(wanted_T) and seconds >= wanted_T[len(frames)] - 0.51 * frame_seconds:
            frames.append(shrunk(frame, settings.frame_side_px))
        while (
            len(pairs) + len(before) < len(wanted_P)
            and seconds >= wanted_P[len(pairs) + len(before)] - 0.51 * frame_seconds
        ):
            before.append(narrowed(frame, settings.pair_width_px, "gray"))
        if len(frames) == len(wanted_T) and len(pairs) == len(wanted_P):
            break
    if not frames:
        raise ValueError(f"no frame between {span.start} and {span.end} s")
    frames += [frames[-1]] * (len(wanted_T) - len(frames))
    shape = frames[0].shape[:2]
    return Look(
        np.stack(frames), np.array(pairs, np.uint8).reshape(len(pairs), 2, *_pair_shape(pairs, shape))
    )


def _evenly(span, count, room):
    """Middles of `count` equal parts of the span without its last `room` seconds."""
    return span.start + (np.arange(count) + 0.5) / count * max(span.seconds - room, 0.0)


def _pair_shape(pairs, shape):
    return pairs[0][0].shape if pairs else shape
