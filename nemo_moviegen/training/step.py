"""One training step in plain torch: latents to a noisy pair to a loss no layout changes (s3.1.2, eq. 2)."""

from dataclasses import dataclass

import torch

from nemo_moviegen import flow
from nemo_moviegen.video.embeddings import patchify
from nemo_moviegen.video.parallel import split_tokens, sum_over_token_ranks


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

    x_t and the target have the latents' dtype; t is fp64 in (0, 1), 0 being noise.
    """
    latent_BTCHW = batch.latent_BTCHW
    device, dtype = latent_BTCHW.device, latent_BTCHW.dtype
    noise_BTCHW = flow.draw_noise(latent_BTCHW.shape[1:], seed, batch.sample_ids, batch.epochs, dtype).to(
        device
    )
    t_B = flow.draw_time(seed, batch.sample_ids, batch.epochs, torch.float64).to(device)
    x_BTCHW = flow.interpolate(noise_BTCHW, latent_BTCHW, t_B.to(dtype))
    return x_BTCHW, flow.velocity_target(noise_BTCHW, latent_BTCHW), t_B


def token_errors(velocity_SBX, target_BTCHW, config):
    """Squared error of each token of this rank [S/cp/sp, B], the mean over its channels."""
    target_SBX = split_tokens(patchify(target_BTCHW, config.size), config)
    return (velocity_SBX.to(target_SBX.dtype) - target_SBX).square().mean(dim=-1)


def token_loss(velocity_SBX, target_BTCHW, config) -> TokenLoss:
    """Loss of this rank's velocity tokens [S/cp/sp, B, X] against the whole target."""
    error_SB = token_errors(velocity_SBX, target_BTCHW, config)
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
