"""One training step in plain torch: latents to a noisy pair to a loss no layout changes (s3.1.2, eq. 2)."""

from dataclasses import dataclass, replace

import torch

from nemo_moviegen import flow
from nemo_moviegen.batch import PackedVideoBatch
from nemo_moviegen.training_objective import OBJECTIVES
from nemo_moviegen.video.model import own_tokens
from nemo_moviegen.video.parallel import sum_over_token_ranks

FLOW_MATCHING = OBJECTIVES["flow_matching"]


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


def data_dtype(precision) -> torch.dtype:
    """Of latents, noise and loss: bf16 rounds neither the latents nor the target."""
    return torch.float64 if precision == "fp64" else torch.float32


def with_noise(batch, seed, dtype, objective=FLOW_MATCHING):
    """The batch with the noise of its samples, in `dtype`, and their times: the loader's thread draws them
    while the rank computes. A clip has those in a pack that it has in a batch."""
    ids, epochs = batch.sample_ids, batch.epochs
    t_B = objective.draw_time(seed, ids, epochs, torch.float64)
    if not isinstance(batch, PackedVideoBatch):
        noise_BTCHW = flow.draw_noise(batch.latent_BTCHW.shape[1:], seed, ids, epochs, dtype)
        return replace(batch, noise_BTCHW=noise_BTCHW, t_B=t_B)
    keys = zip(batch.latents, ids.split(1), epochs.split(1), strict=True)
    noise = tuple(flow.draw_noise(latent.shape, seed, *key, dtype)[0] for latent, *key in keys)
    return replace(batch, noise=noise, t_B=t_B)


def noisy_pair(batch, seed, objective=FLOW_MATCHING):
    """(x_t, target, t) of a `VideoBatch`: whole latents, the same on all ranks that share samples.

    x_t and the target have the latents' dtype; t is fp64 in (0, 1), 0 being noise. Of a `PackedVideoBatch`
    they are tuples of a [T, C, H, W] for each clip. Noise and times are drawn where the batch has none.
    """
    is_pack = isinstance(batch, PackedVideoBatch)
    latents = batch.latents if is_pack else batch.latent_BTCHW
    dtype = latents[0].dtype
    if batch.t_B is None:
        batch = with_noise(batch, seed, dtype, objective).to(latents[0].device)
    t_B = batch.t_B
    if not is_pack:
        return *objective.noisy_pair(batch.noise_BTCHW, latents, t_B), t_B
    clips = zip(batch.noise, latents, t_B.split(1), strict=True)
    pairs = [objective.noisy_pair(noise[None], latent[None], t_1) for noise, latent, t_1 in clips]
    x, target = (tuple(of_clip[0] for of_clip in some) for some in zip(*pairs, strict=True))
    return x, target, t_B


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
