"""Losses of the temporal autoencoder (Movie Gen s3.1.1): reconstruction, KL and the outlier penalty.

Pure functions of tensors, scalars out; the training loop weights them.
"""

import torch
from torch import Tensor


def l1_loss(reconstruction_BTCHW: Tensor, video_BTCHW: Tensor) -> Tensor:
    """Mean absolute error over all values; video is in [-1, 1], so 2 is the worst."""
    return (reconstruction_BTCHW - video_BTCHW).abs().mean()


def squared_error(reconstruction_BTCHW: Tensor, video_BTCHW: Tensor) -> Tensor:
    """Mean squared error over all values."""
    return (reconstruction_BTCHW - video_BTCHW).square().mean()


def kl_loss(mean_BTCHW: Tensor, logvar_BTCHW: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1), nats, mean over latent values."""
    return 0.5 * (mean_BTCHW.square() + logvar_BTCHW.exp() - 1 - logvar_BTCHW).mean()


def outlier_penalty(latent_BTCHW: Tensor, scale: float = 3.0) -> Tensor:
    """Mean distance by which latents leave `scale` standard deviations (Movie Gen s3.1.1, eq. 1).

    Mean and deviation are per channel over H and W of each frame, the distances are norms over channels;
    frames count as a batch. Returns a scalar >= 0. The paper weights it by 1e5.
    """
    mean_BTC11 = latent_BTCHW.mean(dim=(3, 4), keepdim=True)
    centred_BTCHW = latent_BTCHW - mean_BTC11
    # The norm over channels of the deviations is the root of the summed variances.
    limit_BT11 = scale * root(centred_BTCHW.square().mean(dim=(3, 4), keepdim=True).sum(dim=2))
    distance_BTHW = root(centred_BTCHW.square().sum(dim=2))
    return (distance_BTHW - limit_BT11).clamp(min=0).mean()


def root(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero, not infinite: constant latents have no deviation."""
    positive = x > 0
    return torch.where(positive, x.where(positive, 1.0).sqrt(), 0.0)
