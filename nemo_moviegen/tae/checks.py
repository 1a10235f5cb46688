"""What the autoencoder takes: RGB video in [-1, 1] of whole latents. Anything else is told what to change."""

import math

from torch import Tensor

COMPRESSION = 8
"""Rows and columns of pixels in one latent; frames: `AutoencoderSize.temporal_compression`."""


def check_video(video_BTCHW: Tensor) -> None:
    """ValueError, with what to change, for a tensor that is not RGB video in [-1, 1] of whole latents."""
    check_shape(video_BTCHW)
    check_values(video_BTCHW)


def check_shape(video_BTCHW: Tensor) -> None:
    """What `check_video` checks without a look at the values."""
    shape = tuple(video_BTCHW.shape)
    if len(shape) == 5 and shape[2] != 3 and 3 in (shape[1], shape[4]):
        order = "[clips, 3, frames, height, width]" if shape[1] == 3 else "[clips, frames, height, width, 3]"
        raise ValueError(
            f"video has shape {shape}, which looks like {order}; pass [clips, frames, 3, height, width]: "
            f"x.{'transpose(1, 2)' if shape[1] == 3 else 'permute(0, 1, 4, 2, 3)'}"
        )
    if len(shape) != 5 or shape[2] != 3 or not shape[0] or not shape[1]:
        raise ValueError(
            f"video has shape {shape}; pass [clips, frames, 3, height, width] with one frame or more"
        )
    if shape[3] % COMPRESSION or shape[4] % COMPRESSION or not shape[3] or not shape[4]:
        smaller, larger = fitting_sizes(shape[3], shape[4])
        raise ValueError(
            f"video is {shape[4]}x{shape[3]} px; width and height must be multiples of {COMPRESSION}: crop "
            f"it to {smaller}, pad it to {larger}, or choose such a bucket (data.bucket.width_px, "
            "data.bucket.height_px)"
        )


def check_values(video_BTCHW: Tensor, first_frame: int = 0) -> None:
    """The rest of it, of frames `first_frame` and later of their clip."""
    if not video_BTCHW.is_floating_point():
        raise ValueError(
            f"video is {video_BTCHW.dtype}; convert it to floats in [-1, 1] (x / 127.5 - 1 for bytes)"
        )
    largest = video_BTCHW.detach().abs().amax().item()
    if not math.isfinite(largest):
        bad_T = (~video_BTCHW.isfinite()).flatten(2).any(dim=2).any(dim=0).nonzero().flatten().tolist()
        named = ", ".join(str(first_frame + t) for t in bad_T[:8]) + (", ..." if len(bad_T) > 8 else "")
        raise ValueError(
            f"video holds NaN or infinite values (frames {named}): check the decoder or remove the clip"
        )
    if largest > 1.5:  # resizing filters overshoot a little
        raise ValueError(
            f"video has values up to {largest:.4g}; scale it to [-1, 1] (x / 127.5 - 1 for bytes)"
        )


def fitting_sizes(height_px: int, width_px: int) -> tuple[str, str]:
    """ "WxH px" of whole latents: the largest that is not larger, the smallest that is not smaller."""
    down, up = (
        tuple(
            max(1, length // COMPRESSION + (more and length % COMPRESSION > 0)) * COMPRESSION for length in s
        )
        for more, s in ((False, (width_px, height_px)), (True, (width_px, height_px)))
    )
    return f"{down[0]}x{down[1]} px", f"{up[0]}x{up[1]} px"
