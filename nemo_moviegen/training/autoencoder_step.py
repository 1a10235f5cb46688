"""Losses of an autoencoder over one micro-batch (Movie Gen s3.1.1), and gradients that every rank shares.

video -> posterior, latent drawn from it -> reconstruction --+--> l1 or squared error, LPIPS, KL, penalty
                                                             |
                 discriminator(video, reconstruction) -------+--> its own hinge loss, and its verdict
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_moviegen.flow import draw_noise
from nemo_moviegen.tae.losses import kl_loss, l1_loss, outlier_penalty, squared_error
from nemo_moviegen.tae.model import Posterior

ALWAYS = ("loss", "l1", "squared_error", "kl", "outlier")
"""Losses of every step, by name; perceptual, adversarial and discriminator come where they are on."""


@dataclass(frozen=True)
class Reconstructed:
    """A micro-batch through the autoencoder."""

    video_BTCHW: Tensor
    rebuilt_BTCHW: Tensor
    losses: dict
    """Scalars: loss (the weighted sum without the adversarial one) and its terms before their weights."""
    likeness: Tensor
    """The part of the loss that compares pixels: what the adversarial gradient is levelled with."""


def reconstruct(recipe, autoencoder, video_BTCHW, sample_ids, step, perceptual=None) -> Reconstructed:
    """Losses of one micro-batch. The latent is drawn from the posterior with noise keyed by (seed, id, step).

    `perceptual` is a `tae.perceptual.PerceptualLoss` where `recipe.loss.perceptual` is on.
    """
    weights, dtype = recipe.loss, video_BTCHW.dtype
    # under autocast both come in bfloat16, whose sums over a clip have two digits
    posterior = Posterior(*(part.to(dtype) for part in autoencoder.encode(video_BTCHW)))
    mean_BTCHW = posterior.mean_BTCHW
    noise_BTCHW = draw_noise(mean_BTCHW.shape[1:], recipe.seed, sample_ids, [step] * len(sample_ids))
    latent_BTCHW = posterior.sample(noise_BTCHW.to(mean_BTCHW))
    rebuilt_BTCHW = autoencoder.decode(latent_BTCHW, num_frames=video_BTCHW.shape[1]).to(dtype)
    found = {
        "l1": l1_loss(rebuilt_BTCHW, video_BTCHW),
        "squared_error": squared_error(rebuilt_BTCHW, video_BTCHW),
        "kl": kl_loss(*posterior),
        "outlier": outlier_penalty(mean_BTCHW, weights.outlier_scale),
    }
    likeness = weights.l1 * found["squared_error" if step < weights.squared_error_steps else "l1"]
    if perceptual is not None:
        found["perceptual"] = perceptual(rebuilt_BTCHW, video_BTCHW)
        likeness = likeness + weights.perceptual * found["perceptual"]
    loss = likeness + weights.kl * found["kl"]
    if step >= weights.outlier_from_step:
        loss = loss + weights.outlier * found["outlier"]
    return Reconstructed(video_BTCHW, rebuilt_BTCHW, {"loss": loss, **found}, likeness)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Each tensor, in place, becomes its mean over all ranks, in one message for each dtype.

    In place of DDP's reducer, which wants one backward for each forward: with two optimisers the
    reconstruction is judged once and differentiated twice.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for tensor in own])
        for tensor, part in zip(own, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
