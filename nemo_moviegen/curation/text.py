"""Burnt-in text: titles, subtitles, channel names (s3.2.1, App. B). PP-OCRv4 through RapidOCR, on a CPU."""

from functools import cache

import numpy as np


def text_score(look) -> float:
    """Highest detection * recognition score, 0..1, of any text on any frame of a `Look`; 0 without text."""
    return max(frame_score(frame_HWC) for frame_HWC in look.frames_THWC)


text_score.version = "1"


def frame_score(frame_HWC) -> float:
    """`text_score` of one uint8 RGB frame.

    What is no writing scores low twice: the detector is unsure, and the recogniser reads nothing into it.
    """
    engine = _engine()
    bgr_HWC = np.ascontiguousarray(frame_HWC[..., ::-1])
    detector = engine.text_det
    # its __call__ returns boxes without their scores
    prepared = detector.get_preprocess(max(bgr_HWC.shape[:2]))(bgr_HWC)
    boxes, detected = detector.postprocess_op(detector.infer(prepared)[0], bgr_HWC.shape[:2])
    if not len(boxes):
        return 0.0
    crops = engine.get_crop_img_list(bgr_HWC, np.asarray(boxes, np.float32))
    read, _ = engine.text_rec(crops)
    found = zip(detected, read, strict=True)
    return max((float(box) * float(score) for box, (text, score) in found if text.strip()), default=0.0)


@cache
def _engine():
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(
        intra_op_num_threads=1,  # tasks share the cores out
        inter_op_num_threads=1,
        det_limit_side_len=32,  # small frames are not enlarged: `Looking.frame_side_px` sets the size
    )
