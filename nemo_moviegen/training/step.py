"""One training step in plain torch: latents to a noisy pair to a loss no layout changes (s3.1.2, eq. 2)."""

from dataclasses import dataclass

import torch

from nemo_moviegen import flow
from nemo_moviegen.batch import PackedVideoBatch
from nemo_moviegen.video.model import own_tokens
from nemo_moviegen.video.parallel import sum_over_token_ranks


@dataclass(frozen=True)
class TokenLoss:
    """What one micro-batch adds to the loss of a step."""

    loss_sum: torch.Tensor
    """Squared error summed over the tokens of this rank; each token's is the mean over its channels. Has the
    gradient."""
    num_tokens: torch.Tensor
    """int32: tokens of this context-parallel piece, whatever sequence parallelism leaves on this rank.
    Megatron divides the gradient by their sum over cp, dp and micro-batches. (Elements of the paper's batches
    would overflow int32.)"""
    sums: torch.Tensor
    """fp64 [2]: loss and tokens of this rank, detached, for the report."""


def noisy_pair(batch, seed):
    """(x_t, velocity target, t) of a `VideoBatch`: whole latents, the same on all ranks that share samples.

    x_t and the target have the latents' dtype; t is fp64 in (0, 1), 0 being noise. Of a `PackedVideoBatch`
    they are tuples of a [T, C, H, W] for each clip: a clip has the noise and the time it has in a batch.
    """
    if not isinstance(batch, PackedVideoBatch):
        return _noisy_latents(batch.latent_BTCHW, batch.sample_ids, batch.epochs, seed)
    keys = zip(batch.latents, batch.sample_ids.split(1), batch.epochs.split(1), strict=True)
    clips = [_noisy_latents(latent.unsqueeze(0), *key, seed) for latent, *key in keys]
    x, target, t = zip(*clips, strict=True)
    return tuple(of_clip[0] for of_clip in x), tuple(of_clip[0] for of_clip in target), torch.cat(t)


def _noisy_latents(latent_BTCHW, sample_ids, epochs, seed):
    device, dtype = latent_BTCHW.device, latent_BTCHW.dtype
    noise_BTCHW = flow.draw_noise(latent_BTCHW.shape[1:], seed, sample_ids, epochs, dtype).to(device)
    t_B = flow.draw_time(seed, sample_ids, epochs, torch.float64).to(device)
    x_BTCHW = flow.interpolate(noise_BTCHW, latent_BTCHW, t_B.to(dtype))
    return x_BTCHW, flow.velocity_target(noise_BTCHW, latent_BTCHW), t_B


def token_errors(velocity_SBX, target, config):
    """Squared error of each token of this rank [S/cp/sp, B], the mean over its channels.

    `target` is [B, T, C, H, W], or of a pack (whose B is 1) a tuple of [T, C, H, W].
    """
    target_SBX, _ = own_tokens(target, config)
    return (velocity_SBX.to(target_SBX.dtype) - target_SBX).square().mean(dim=-1)


def token_loss(velocity_SBX, target, config) -> TokenLoss:
    """Loss of this rank's velocity tokens [S/cp/sp, B, X] against the whole target.

    A sum over tokens, so a pack adds what its clips add one by one.
    """
    error_SB = token_errors(velocity_SBX, target, config)
    loss_sum, own_tokens = error_SB.sum(), error_SB.numel()
    shared_by = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return TokenLoss(
        loss_sum=loss_sum,
        num_tokens=torch.tensor(own_tokens * shared_by, dtype=torch.int32, device=loss_sum.device),
        sums=torch.stack((loss_sum.detach().double(), loss_sum.new_tensor(own_tokens, dtype=torch.float64))),
    )


def mean_loss(sums, config):
    """The step's loss over all ranks from the `TokenLoss.sums` of this rank's micro-batches."""
    loss_sum, num_tokens = sum_over_token_ranks(torch.stack(tuple(sums)).sum(dim=0), config)
    return loss_sum / num_tokens
