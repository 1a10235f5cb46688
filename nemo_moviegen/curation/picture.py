"""Scores of single frames without a learnt model: borders, aesthetics, quality (s3.2.1, App. B).

`aesthetics` is not the LAION score the paper thresholds at 4.0: it knows exposure, contrast, colour and
sharpness, not taste. Both of ours lie in 0..10, so that a model can take their place under the same column.
"""

import numpy as np

_FLAT = 6.0  # levels of 255: what coding noise leaves of a plain line
_EDGE = 12.0  # levels by which the picture's first line differs from the border's last
_EDGE_SHARE = 0.7  # of that line's pixels


def border_share(look) -> float:
    """Share of the frame, 0..1, that plain bars at its sides cover, the same on all frames of a `Look`.

    A bar is a run of plain scan lines of one colour from the side inward, as long as on the frame where it
    is shortest, that ends there in an edge along most of the line (first derivative). So neither sky nor a
    plain background is a bar. Bars filled with a blurred picture are not found.
    """
    # in luma: at half its resolution, colour runs over the edge
    frames = [_luma(np.float32(frame_HWC)) for frame_HWC in look.frames_THWC]
    turned = [luma_HW.T for luma_HW in frames]
    height, width = look.frames_THWC.shape[1:3]
    top, bottom = _bar(frames), _bar([frame[::-1] for frame in frames])
    left, right = _bar(turned), _bar([frame[::-1] for frame in turned])
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


border_share.version = "3"


def aesthetics(look) -> float:
    """0..10 of the middle frame: root of the product of exposure, contrast, colourfulness and sharpness.

    Each is 1 where a good photograph has it and falls to 0: black, burnt out, grey, flat or blurred.
    """
    frame_HWC = np.float32(look.middle_HWC)
    luma_HW = _luma(frame_HWC)
    parts = [
        _exposure(luma_HW),
        min(1.0, float(luma_HW.std()) / 50),
        min(1.0, 0.3 + _colourfulness(frame_HWC) / 60),  # black and white is no fault, only less
        _sharpness(luma_HW),
    ]
    return 10 * float(np.prod(parts)) ** 0.5


aesthetics.version = "2"


def quality(look) -> float:
    """0..10, the mean over the frames: 10 for a clean picture, less for blur, noise and coding blocks."""
    return float(np.mean([_frame_quality(_luma(np.float32(frame))) for frame in look.frames_THWC]))


quality.version = "2"


def _bar(frames):
    """Number of lines of the bar at line 0 of all frames, each luma [lines, pixels]; 0 for none."""
    shortest, has_edge = None, False
    for luma_NM in frames:
        if luma_NM[0].std() >= _FLAT:  # so with most pictures: spare them the rest
            return 0
        mean_N = luma_NM.mean(axis=1)
        is_plain_N = (luma_NM.std(axis=1) < _FLAT) & (np.abs(mean_N - mean_N[0]) < _FLAT)
        if is_plain_N.all():  # a fade: it says nothing about bars
            continue
        length = int(np.argmin(is_plain_N))
        if shortest is None or length < shortest - 1:
            shortest, has_edge = length, False
        if length <= shortest + 1:
            # scaling and coding blur the edge over a few lines
            steps_M = np.abs(luma_NM[length : length + 4] - mean_N[0]).max(axis=0)
            has_edge |= bool((steps_M > _EDGE).mean() >= _EDGE_SHARE)
    return shortest if shortest and has_edge else 0


def _luma(frame_HWC):
    return frame_HWC @ np.float32([0.299, 0.587, 0.114])


def _exposure(luma_HW):
    """1 for a middle brightness without clipped areas, 0 for black or white."""
    clipped = float(((luma_HW < 8) | (luma_HW > 247)).mean())
    mean = float(luma_HW.mean()) / 255
    return (1 - clipped) * min(1.0, mean / 0.2, (1 - mean) / 0.2)


def _colourfulness(frame_HWC):
    """Hasler and Suesstrunk (2003): 0 for grey, about 15 slight, 45 average, 80 and more strong."""
    red, green, blue = np.moveaxis(frame_HWC, -1, 0)
    first, second = red - green, (red + green) / 2 - blue
    return float(np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean()))


def _sharpness(luma_HW):
    """0..1 by the share of local contrast that one more blur takes (after Crete, 2007).

    Half and more of it in a sharp picture; a quarter and less, which is 0, in one that was blurred already.
    """
    import cv2

    blurred = cv2.blur(luma_HW, (9, 9))
    lost = []
    for axis in (0, 1):
        here, there = (np.abs(np.diff(image, axis=axis)) for image in (luma_HW, blurred))
        lost.append(float(np.maximum(here - there, 0).sum() / max(here.sum(), 1e-6)))
    return float(np.clip((min(lost) - 0.25) / 0.25, 0, 1))


def _frame_quality(luma_HW):
    return 10 * _sharpness(luma_HW) * (1 - _noise(luma_HW)) * (1 - _blockiness(luma_HW))


def _noise(luma_HW):
    """0 for none, 1 for a deviation of 20 levels: Immerkaer's operator (1996), blind to edges and ramps."""
    import cv2

    kernel = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = np.abs(cv2.filter2D(luma_HW, -1, kernel))
    # the median, since texture answers too, but not everywhere
    deviation = float(np.median(response)) / 0.6745 / 6
    return min(1.0, deviation / 20)


def _blockiness(luma_HW):
    """0..1: how much steeper steps are at every eighth line than between. 0 after scaling moves the lines."""
    shares = []
    for axis in (0, 1):
        steps = np.abs(np.diff(luma_HW, axis=axis)).mean(axis=1 - axis)
        if len(steps) < 16:
            return 0.0
        at = steps[7::8].mean()
        between = np.delete(steps, np.s_[7::8]).mean()
        shares.append(float(np.clip((at - between) / max(at + between, 1e-6), 0, 1)))
    return min(shares)
