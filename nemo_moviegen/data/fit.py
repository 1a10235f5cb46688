"""How one decoded frame becomes a picture of the bucket's size: upright, square pixels, covered, cropped.

    frame W x H, pixels 4:3, to be turned by 90 degrees           bucket w x h
    -> scaled, antialiased, to the smallest size that covers the bucket once it is upright
    -> turned and mirrored as the file's display matrix says      -> the middle of it, h x w

Colours: Y'CbCr to RGB with the matrix and range the file states; BT.601 and limited range where it states
none, as FFmpeg does. 10 and 12 bits are scaled to the same range, not cut. Gamut and transfer curve stay as
they are, so BT.2020 and HLG (made to be watched untreated) come out as an ordinary screen shows them. PQ
does not, and is refused.
"""

from dataclasses import dataclass

import numpy as np

WHITE = 65280
"""Of a picture's uint16 levels: 256 times those of 8 bits."""
_PQ = 16  # SMPTE ST 2084, FFmpeg's number


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where a source's pixels go. Scaled first, then transposed, then mirrored, then cropped."""

    scaled_height_px: int
    scaled_width_px: int
    transposed: bool
    """Rows become columns."""
    mirrored_rows: bool
    """Top and bottom change places."""
    mirrored_columns: bool
    top_px: int
    left_px: int
    height_px: int
    width_px: int


def fit_of(frame, pixel_aspect, height_px, width_px) -> Fit:
    """The fit of a source to a bucket's size, told by one of its frames (PyAV's).

    `pixel_aspect` is width by height of a pixel, as its stream has it; None or 0 is square. ValueError where
    the frame's colours are PQ, or it is to be turned by an angle that is no quarter of a circle.
    """
    if getattr(frame, "color_trc", None) == _PQ:
        raise ValueError(
            "HDR with the PQ curve, which looks gray and flat untreated: tone-map it to SDR first, "
            "for instance with FFmpeg's zscale and tonemap filters"
        )
    transposed, mirrored_rows, mirrored_columns = _orientation(frame)
    shown = (frame.height, frame.width * float(pixel_aspect or 1))
    if transposed:
        shown = shown[::-1]
    scale = max(height_px / shown[0], width_px / shown[1])
    height, width = max(height_px, round(shown[0] * scale)), max(width_px, round(shown[1] * scale))
    scaled = (width, height) if transposed else (height, width)
    return Fit(
        scaled_height_px=scaled[0],
        scaled_width_px=scaled[1],
        transposed=transposed,
        mirrored_rows=mirrored_rows,
        mirrored_columns=mirrored_columns,
        top_px=(height - height_px) // 2,
        left_px=(width - width_px) // 2,
        height_px=height_px,
        width_px=width_px,
    )


def draw(frame, fit, scaler, picture_CHW):
    """Fill `picture_CHW`, uint16 RGB, 0 to WHITE; `scaler` is a VideoReformatter of the thread's own."""
    scaled = scaler.reformat(
        frame,
        width=fit.scaled_width_px,
        height=fit.scaled_height_px,
        format="gbrp16le",  # 16 bits: a level of 8 bits is not rounded before the caller's own arithmetic
        interpolation="BILINEAR",  # of a scaled width when it shrinks a frame: antialiased
        threads=1,  # the loader scales several clips at once instead
    )
    rows = slice(fit.top_px, fit.top_px + fit.height_px)
    columns = slice(fit.left_px, fit.left_px + fit.width_px)
    for plane, channel in zip(scaled.planes, (1, 2, 0), strict=True):
        plane_HW = np.frombuffer(plane, "<u2").reshape(-1, plane.line_size // 2)
        plane_HW = plane_HW[: fit.scaled_height_px, : fit.scaled_width_px]
        if fit.transposed:
            plane_HW = plane_HW.T
        if fit.mirrored_rows:
            plane_HW = plane_HW[::-1]
        if fit.mirrored_columns:
            plane_HW = plane_HW[:, ::-1]
        np.minimum(plane_HW[rows, columns], WHITE, out=picture_CHW[channel])


def _orientation(frame):
    """(transposed, mirrored_rows, mirrored_columns): what makes the frame upright.

    The display matrix (a b; c d) puts the pixel (x, y) at (a x + c y, b x + d y), up to a shift.
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if a and d and not (b or c):
        return False, d < 0, a < 0
    if b and c and not (a or d):
        return True, b < 0, c < 0
    raise ValueError(
        "its display matrix turns it by an angle that is no quarter of a circle: turn it upright"
    )
