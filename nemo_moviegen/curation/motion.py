"""How much moves, and how the camera does: from pairs of consecutive frames (s3.2.1, App. B).

Both scores are per frame at the video's own rate, like the paper's: at 60 frames a second the same pan
scores half of what it does at 30.
"""

import numpy as np

REFERENCE_WIDTH_PX = 768
"""Motion is told in pixels of a frame of this width, the narrowest of Table 38's."""
_CELL = 8  # side of the blocks that vote for the camera's motion, in pixels of the flow
_LEAST_TEXTURE = 2.5  # deviation in levels; flow in plain blocks is a guess
_LEAST_MOTION = 0.0006  # widths a frame: 1.5% a second at 25 frames a second


def motion_score(look) -> float:
    """VMAF's motion feature: mean difference of blurred luma between consecutive frames, in levels of 255.

    0 for a still picture, 2 is the paper's limit, 5 to 15 is lively. 0 for an image.
    """
    import cv2

    if not len(look.pairs_P2HW):
        return 0.0
    blurred = [[cv2.GaussianBlur(np.float32(f), (5, 5), 1.0) for f in pair] for pair in look.pairs_P2HW]
    return float(np.mean([np.abs(after - before).mean() for before, after in blurred]))


motion_score.version = "1"


def motion_vectors(look) -> float:
    """Mean length of the optical flow between consecutive frames, in px of a frame 768 px wide."""
    if not len(look.flow_PHW2):
        return 0.0
    return float(np.linalg.norm(look.flow_PHW2, axis=-1).mean()) * REFERENCE_WIDTH_PX


motion_vectors.version = "1"


def camera_motion(look) -> tuple[str, float]:
    """One of the paper's 16 labels and a confidence 0..1; "" where the flow does not tell.

    Told apart: static shot, handheld shot, pan left and right, tilt up and down, zoom in and out. The other
    eight move the camera itself (truck, push, pedestal, arc, tracking): they differ from these by parallax,
    which makes the flow uneven, and an uneven flow gets no label.
    """
    motions = [
        _camera_step(flow_HW2, pair_2HW[0])
        for flow_HW2, pair_2HW in zip(look.flow_PHW2, look.pairs_P2HW, strict=True)
    ]
    motions = [motion for motion in motions if motion is not None]
    if len(motions) < 3 or len(motions) < len(look.flow_PHW2) / 2:
        return "", 0.0
    x_P, y_P, growth_P, share_P = np.array(motions).T
    confidence = float(share_P.mean())
    label = _label(x_P, y_P, growth_P)
    return (label, confidence) if label and confidence >= 0.7 else ("", confidence)


camera_motion.version = "3"


def _camera_step(flow_HW2, luma_HW):
    """Shift (right, down) and growth of the whole picture, and the share of blocks that do so; or None."""
    import cv2

    height, width = flow_HW2.shape[:2]
    luma_HW = cv2.resize(luma_HW, (width, height), interpolation=cv2.INTER_AREA)
    rows, columns = height // _CELL, width // _CELL
    shape = (rows, _CELL, columns, _CELL)
    blocks = luma_HW[: rows * _CELL, : columns * _CELL].astype(np.float32).reshape(shape)
    has_texture = blocks.std(axis=(1, 3)).ravel() > _LEAST_TEXTURE
    if has_texture.sum() < max(6, 0.25 * rows * columns):
        return None
    flow = np.median(flow_HW2[: rows * _CELL, : columns * _CELL].reshape(*shape, 2), axis=(1, 3))
    y, x = np.mgrid[:rows, :columns]
    places = (np.stack([x, y], -1).reshape(-1, 2) + 0.5) * _CELL / width - [0.5, height / width / 2]
    places, moved = places[has_texture], flow.reshape(-1, 2)[has_texture]
    cv2.setRNGSeed(0)
    matrix, inliers = cv2.estimateAffinePartial2D(
        places, places + moved, method=cv2.RANSAC, ransacReprojThreshold=0.0015
    )
    if matrix is None:
        return None
    growth = float(np.hypot(matrix[0, 0], matrix[1, 0])) - 1
    return matrix[0, 2], matrix[1, 2], growth, float(inliers.mean())


def _label(x_P, y_P, growth_P):
    """The paper's word for steps of the picture. The picture goes left where the camera turns right."""
    shift_P = np.hypot(x_P, y_P)
    rim_P = np.abs(growth_P) / 2  # what growth moves at the picture's rim
    if shift_P.mean() < _LEAST_MOTION / 2 and rim_P.mean() < _LEAST_MOTION / 2:
        return "static shot"
    if rim_P.mean() > max(_LEAST_MOTION, 1.5 * shift_P.mean()) and _is_steady(growth_P):
        return "zoom in" if growth_P.mean() > 0 else "zoom out"
    if shift_P.mean() < _LEAST_MOTION or rim_P.mean() > shift_P.mean():
        return ""
    x, y = x_P.mean(), y_P.mean()
    steadiness = np.hypot(x, y) / shift_P.mean()
    if steadiness < 0.4:
        return "handheld shot" if _turns(x_P, y_P) else ""
    if steadiness < 0.9:
        return ""
    if abs(x) > 3 * abs(y):
        return "pan right" if x < 0 else "pan left"
    if abs(y) > 3 * abs(x):
        return "tilt up" if y > 0 else "tilt down"
    return ""


def _turns(x_P, y_P):
    """Whether the direction of one step says little about the next: as in a shaking hand."""
    steps_P2 = np.stack([x_P, y_P], axis=1)
    along = (steps_P2[1:] * steps_P2[:-1]).sum(axis=1)
    return along.mean() < 0.5 * (steps_P2**2).sum(axis=1).mean()


def _is_steady(values_P):
    return abs(values_P.mean()) >= 0.9 * np.abs(values_P).mean()
