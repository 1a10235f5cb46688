"""The default embedding of a clip for finding near-duplicates: no download, a millisecond a clip.

The paper's is SSCD, a copy-detection network. Any function of a `Look` can take this one's place.
"""

import numpy as np

_SIDE = 32
_LUMA = 8  # lowest frequencies kept on each axis
_COLOR = 4


def embedding(look) -> np.ndarray:
    """float32 [285] of unit length: low frequencies of three frames' luma and colour; zero for plain frames.

    Luma has no mean, so brightness does not count and unrelated clips have a cosine near 0; frequencies are
    weighted against the spectrum of photographs, so that more than the coarsest shape counts. Scaling and
    coding move the cosine by less than 0.01; a mirror image, another crop or moment do by more.
    """
    last = len(look.frames_THWC) - 1
    chosen = [look.frames_THWC[round(last * part)] for part in (0, 0.5, 1)]
    vector = np.concatenate([_frame(frame_HWC) for frame_HWC in chosen])
    length = np.linalg.norm(vector)
    # a deviation below a level is coding noise, whatever its pattern
    return (vector / length if length > _SIDE else np.zeros_like(vector)).astype(np.float32)


embedding.version = "1"


def _frame(frame_HWC):
    import cv2

    small = cv2.resize(frame_HWC, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    planes = np.float32(cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)) - [0, 128, 128]
    luma, red, blue = (cv2.dct(np.float32(planes[..., c])) for c in range(3))
    without_mean = _weighted(luma, _LUMA)[1:]
    return np.concatenate([without_mean, *(_weighted(plane, _COLOR) for plane in (red, blue))])


def _weighted(spectrum, side):
    rows, columns = np.mgrid[:side, :side]
    return (spectrum[:side, :side] * np.hypot(rows, columns).clip(1)).ravel()
