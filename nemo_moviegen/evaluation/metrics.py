"""How close reconstructions are, and how far latents stick out (Movie Gen s3.6.1 and s3.1.1, eq. 1).

Videos are in [-1, 1], so their range is 2. PSNR and SSIM are of single frames; the paper's "frame-averaged"
numbers are means over the frames of a clip, and then over clips. The PSNR of a mean squared error, which is
lower wherever frames differ in quality, is another number and not computed here.

Axis letters: B clips, T frames, C channels, H W height and width.
"""

import numpy as np
import torch
from torch import Tensor

from nemo_moviegen.tae.losses import outlier_penalty, root

MOST_PSNR_DB = 100.0
"""PSNR of equal frames, which would be infinite and with it every mean."""
OUTLIER_SCALE = 3.0
"""r of eq. 1: a latent further out than this many deviations is an outlier."""
_WINDOW_PX = 11
_FRAMES_AT_ONCE = 4  # SSIM holds five filtered float64 copies of what it compares


def psnr(reconstruction_TCHW: Tensor, video_TCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame, float64 dB [T], at most `MOST_PSNR_DB`.

    Values outside [-1, 1] are clamped first. ValueError where the shapes differ.
    """
    error_T = torch.cat(
        [(a - b).square().mean(dim=(1, 2, 3)) for a, b in _few_frames(reconstruction_TCHW, video_TCHW)]
    )
    return (10 * torch.log10(4 / error_T)).clamp(max=MOST_PSNR_DB)


def ssim(reconstruction_TCHW: Tensor, video_TCHW: Tensor) -> Tensor:
    """Structural similarity of each frame, float64 [T], 1 for equal frames (Wang et al. 2004).

    Gaussian window of 11x11 pixels, sigma 1.5, on each colour; only windows that lie inside the frame count,
    as in the paper and in scikit-image. Values outside [-1, 1] are clamped first. ValueError where the shapes
    differ or a side is shorter than the window. In float64: in float32 the variance of a flat region is
    rounding, which moves the mean by 1e-5.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(video_TCHW.shape[-2:]) < _WINDOW_PX:
        height, width = video_TCHW.shape[-2:]
        raise ValueError(
            f"frames of {width}x{height} px are smaller than SSIM's window of {_WINDOW_PX}x{_WINDOW_PX}: "
            "measure larger ones"
        )
    edge, means = _WINDOW_PX // 2, []
    for few in _few_frames(reconstruction_TCHW, video_TCHW):
        _, map_TCHW = structural_similarity_index_measure(
            *few, data_range=2.0, sigma=1.5, reduction="none", return_full_image=True
        )
        means.append(map_TCHW[..., edge:-edge, edge:-edge].mean(dim=(1, 2, 3)))
    return torch.cat(means)


def outlier_norms(latent_BTCHW: Tensor) -> Tensor:
    """Distance of each latent from its frame's mean, in deviations: ||X - Mean|| / ||Std||, [B, T, H, W].

    Mean and deviation are per channel over H and W of each frame, the norms over channels. Where all latents
    of a frame are equal nothing sticks out: 0.
    """
    centred_BTCHW = latent_BTCHW - latent_BTCHW.mean(dim=(3, 4), keepdim=True)
    deviation_BT11 = root(centred_BTCHW.square().mean(dim=(3, 4), keepdim=True).sum(dim=2))
    distance_BTHW = root(centred_BTCHW.square().sum(dim=2))
    return torch.where(deviation_BT11 > 0, distance_BTHW / deviation_BT11, 0.0)


def outlier_summary(latent_BTCHW: Tensor) -> dict:
    """The norms in numbers: largest, 99.9th percentile, share above `OUTLIER_SCALE`, and eq. 1 itself.

    Eq. 1 is in the latent's own units, the others in deviations.
    """
    latent_BTCHW = latent_BTCHW.double()
    norms_N = outlier_norms(latent_BTCHW).flatten()
    return {
        "largest_norm": float(norms_N.max()),
        "norm_p999": float(np.quantile(norms_N.cpu().numpy(), 0.999)),
        "outlier_share": float((norms_N > OUTLIER_SCALE).double().mean()),
        "outlier_penalty": float(outlier_penalty(latent_BTCHW, OUTLIER_SCALE)),
    }


def _few_frames(reconstruction_TCHW, video_TCHW):
    """Both, a few frames at a time, float64 in [-1, 1]."""
    if reconstruction_TCHW.shape != video_TCHW.shape:
        raise ValueError(
            f"a reconstruction of shape {tuple(reconstruction_TCHW.shape)} cannot be compared with a video "
            f"of shape {tuple(video_TCHW.shape)}: give both the same frames"
        )
    parts = (video.split(_FRAMES_AT_ONCE) for video in (reconstruction_TCHW, video_TCHW))
    for one_TCHW, other_TCHW in zip(*parts, strict=True):
        yield one_TCHW.double().clamp(-1, 1), other_TCHW.double().clamp(-1, 1)
