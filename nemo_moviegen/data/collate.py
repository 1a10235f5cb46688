"""Samples of one shape to a `VideoBatch`, or of any shapes to a `PackedVideoBatch`: latents, padded text
features and their masks."""

import math

import numpy as np
import torch

from nemo_moviegen.batch import PackedVideoBatch, VideoBatch
from nemo_moviegen.data import buffers


def collate(
    samples,
    epochs,
    context_sizes,
    dtype=torch.float32,
    pad="longest",
    latent_channels=None,
    token_limits=None,
    statistics=None,
) -> VideoBatch:
    """The samples as a batch, floating-point tensors as `dtype`, contexts in the order of `context_sizes`.

    With `statistics`, the float32 (mean_C, std_C) of a reader, latents are normalised while they are stacked;
    without they stay as they are. `epochs` says how often each sample was seen. Text is cut to the recipe's
    `token_limits` (see `cut_text`), then padded with zeros to the longest of the batch (pad="longest", at
    least one token, so an encoder that saw no text is one masked token) or to the encoder's limit (pad="max",
    the same shape every step).
    ValueError where shapes differ, or features or channels are not those of the recipe.
    """
    if pad not in ("longest", "max"):
        raise ValueError(f"pad is {pad!r}; use longest or max")
    _check_epochs(samples, epochs)
    _check_shapes(samples)
    _check_channels(samples[:1], latent_channels)
    return VideoBatch(
        latent_BTCHW=stack_latents(samples, statistics).to(dtype),
        **_text_and_keys(samples, epochs, context_sizes, dtype, pad, token_limits),
    )


def collate_packed(
    samples,
    epochs,
    context_sizes,
    dtype=torch.float32,
    *,
    latent_channels=None,
    token_limits=None,
    statistics=None,
) -> PackedVideoBatch:
    """The samples, of any shapes, as one pack in their order; text padded to the longest prompt of the pack.

    Everything else as `collate`: latents stay apart, none is padded. ValueError as there, but for shapes.
    """
    _check_epochs(samples, epochs)
    _check_channels(samples, latent_channels)
    return PackedVideoBatch(
        latents=tuple(stack_latents([sample], statistics)[0].to(dtype) for sample in samples),
        **_text_and_keys(samples, epochs, context_sizes, dtype, "longest", token_limits),
    )


def _text_and_keys(samples, epochs, context_sizes, dtype, pad, token_limits):
    """The fields that a batch and a pack have in common."""
    limits = [token_limits.of(size) if token_limits else size.max_tokens for size in context_sizes]
    padded = [_pad(samples, size, limit, pad) for size, limit in zip(context_sizes, limits, strict=True)]
    _check_text(samples, [mask_BL for _, mask_BL in padded])
    return {
        "contexts": tuple(torch.from_numpy(features_BLD).to(dtype) for features_BLD, _ in padded),
        "masks": tuple(torch.from_numpy(mask_BL) for _, mask_BL in padded),
        "sample_ids": torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
        "epochs": torch.tensor(epochs, dtype=torch.int64),
    }


def stack_latents(samples, statistics=None):
    """Latents of one shape as float32 [B, T, C, H, W], (x - mean) / deviation of each channel where given."""
    stored = [torch.from_numpy(sample.latent_TCHW) for sample in samples]
    if statistics is None:
        return torch.stack(stored).float()
    latent_BTCHW = _uninitialised(len(stored), *stored[0].shape)
    mean_C11, std_C11 = (torch.from_numpy(numbers_C)[:, None, None] for numbers_C in statistics)
    for latent_TCHW, from_TCHW in zip(latent_BTCHW, stored, strict=True):
        for frame_CHW, from_CHW in zip(latent_TCHW, from_TCHW, strict=True):  # a frame stays in the cache
            frame_CHW.copy_(from_CHW).sub_(mean_C11).div_(std_C11)
    return latent_BTCHW


def _uninitialised(*shape):
    """A float32 tensor in memory that is used again: pinned, for its copy to the GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.empty(shape, pin_memory=True)
    return torch.from_numpy(buffers.take(4 * math.prod(shape)).view(np.float32).reshape(shape))


def _check_epochs(samples, epochs):
    if not samples or len(samples) != len(epochs):
        raise ValueError(
            f"{len(samples)} samples and {len(epochs)} epochs: a batch needs one epoch for each sample"
        )


def _check_shapes(samples):
    first = samples[0]
    for sample in samples:
        if sample.latent_TCHW.shape != first.latent_TCHW.shape:
            raise ValueError(
                f"{sample.clip_id} has latents {sample.latent_TCHW.shape}, "
                f"{first.clip_id} {first.latent_TCHW.shape}: a batch takes one shape, see BatchOrder"
            )


def _check_channels(samples, latent_channels):
    for sample in samples:
        channels = sample.latent_TCHW.shape[1]
        if latent_channels is not None and channels != latent_channels:
            raise ValueError(
                f"{sample.clip_id} has {channels} latent channels, the model takes {latent_channels}: "
                f"set size.input_channels={channels} size.output_channels={channels}, or encode again"
            )


def _check_text(samples, masks):
    """Attention over no key at all is undefined: kernels return anything from zeros to NaN."""
    for row, sample in enumerate(samples):
        if masks and not any(mask_BL[row].any() for mask_BL in masks):
            raise ValueError(
                f"{sample.clip_id} has no text token of any encoder, not even of an empty prompt: "
                "run `moviegen encode` again"
            )


def cut_text(features_LD, limit):
    """Features of at most `limit` tokens: the first ones and always the last, the closing token's.

    The closing token is the one CLIP reads a prompt's meaning from (each of its tokens sees only those before
    it), and the end that T5's text was trained with. The features themselves stay as they are.
    """
    if len(features_LD) <= limit:
        return features_LD
    return np.concatenate([features_LD[: limit - 1], features_LD[-1:]])


def limit_text(contexts, context_sizes, token_limits):
    """Features [L, width] by encoder, each cut to `token_limits`: a prompt as training saw it."""
    return {size.name: cut_text(contexts[size.name], token_limits.of(size)) for size in context_sizes}


def _pad(samples, size, limit, pad):
    """Features [B, L, width] and mask [B, L] of one text encoder."""
    features = []
    for sample in samples:
        if size.name not in sample.contexts:
            raise ValueError(
                f"{sample.clip_id} has no {size.name} features, only {', '.join(sample.contexts) or 'none'}: "
                "run `moviegen encode` with this recipe's text encoders"
            )
        features_LD = sample.contexts[size.name]
        if features_LD.ndim != 2 or features_LD.shape[1] != size.width:
            raise ValueError(
                f"{sample.clip_id}: features of {size.name} are {features_LD.shape}, the recipe's width is "
                f"{size.width}: run `moviegen encode` with this recipe's encoders, or set the size's width"
            )
        if len(features_LD) > size.max_tokens:
            raise ValueError(
                f"{sample.clip_id}: {len(features_LD)} tokens of {size.name}, the recipe takes "
                f"{size.max_tokens}: run `moviegen encode` with this recipe, or raise the size's max_tokens"
            )
        features.append(cut_text(features_LD, limit))
    length = limit if pad == "max" else max(1, *(len(f) for f in features))
    return pad_features(features, length, size.width)


def pad_features(features, length, width):
    """Features [L, width], L up to `length`, as float32 [B, length, width] and bool mask [B, length]."""
    features_BLD = _uninitialised(len(features), length, width)
    mask_BL = np.zeros((len(features), length), bool)
    for row, features_LD in enumerate(features):
        # torch: numpy takes ten times as long from float16
        features_BLD[row, : len(features_LD)].copy_(torch.from_numpy(features_LD))
        features_BLD[row, len(features_LD) :].zero_()
        mask_BL[row, : len(features_LD)] = True
    return features_BLD.numpy(), mask_BL
