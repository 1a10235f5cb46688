"""Patches, positions, time and context: all that becomes a token or a condition (Movie Gen s3.1.3, s3.1.4).

B clips, T C H W latent axes, S tokens, D model width, L text tokens.
"""

import math

import torch
from torch import nn


def patchify(latent_BTCHW, size):
    """Tokens [S, B, patch width] in (frame, row, column) order; a patch lists frame, row, column, channel."""
    B, T, C, H, W = latent_BTCHW.shape
    size.num_tokens((T, H, W))  # raises for shapes that do not fit
    t, h, w = size.patch_frames, size.patch_height, size.patch_width
    patches = latent_BTCHW.reshape(B, T // t, t, C, H // h, h, W // w, w)
    return patches.permute(1, 4, 6, 0, 2, 5, 7, 3).reshape(-1, B, t * h * w * C)


def unpatchify(tokens_SBX, latent_shape, size):
    """The [B, T, C, H, W] that `patchify` made into tokens; `latent_shape` is (T, H, W)."""
    T, H, W = latent_shape
    t, h, w = size.patch_frames, size.patch_height, size.patch_width
    C = size.output_channels
    patches = tokens_SBX.reshape(T // t, H // h, W // w, -1, t, h, w, C)
    return patches.permute(3, 0, 4, 7, 1, 5, 2, 6).reshape(-1, T, C, H, W)


def patchify_pack(latents, size):
    """Tokens [S, 1, patch width] of latents [T, C, H, W] of any shapes, one clip after the other."""
    return torch.cat([patchify(latent_TCHW.unsqueeze(0), size) for latent_TCHW in latents])


class FactorizedPositions(nn.Module):
    """Three learned tables whose rows are summed for a token's frame, row and column (NaViT; s3.1.3)."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.frame = nn.Parameter(torch.empty(size.max_frames, size.width))
        self.row = nn.Parameter(torch.empty(size.max_height, size.width))
        self.column = nn.Parameter(torch.empty(size.max_width, size.width))

    def token_indices(self, latent_shape):
        """int64 [S, 3]: frame, row and column of every token of a latent (T, H, W), in `patchify`'s order."""
        T, H, W = latent_shape
        size = self.size
        axes = (T // size.patch_frames, H // size.patch_height, W // size.patch_width)
        return torch.cartesian_prod(*(torch.arange(n, device=self.frame.device) for n in axes)).reshape(-1, 3)

    def forward(self, indices_S3):
        """Positions [S, 1, D] of the tokens with these indices."""
        frame, row, column = indices_S3.unbind(1)
        return (self.frame[frame] + self.row[row] + self.column[column]).unsqueeze(1)


def linear(in_width, out_width):
    """A linear without a bias, as all of the model are."""
    return nn.Linear(in_width, out_width, bias=False)


class TimeEmbedding(nn.Module):
    """Flow time in [0, 1] -> [B, D]: sines and cosines of 1000 t, then two linears (DiT; our default).

    Here and below `linear` makes the linears from (input width, output width).
    """

    def __init__(self, size, linear=linear):
        super().__init__()
        self.num_frequencies = size.time_frequencies
        self.expand = linear(size.time_frequencies, size.width)
        self.mix = linear(size.width, size.width)

    def forward(self, t_B):
        half = self.num_frequencies // 2
        # fp64: t scaled by 1000 has too few digits in bf16 to tell neighbouring times apart
        frequencies = torch.exp(
            -math.log(10_000) / half * torch.arange(half, dtype=torch.float64, device=t_B.device)
        )
        angles = 1000 * t_B.double()[:, None] * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.expand.weight.dtype)
        return self.mix(nn.functional.silu(self.expand(waves)))


class ContextProjections(nn.Module):
    """Each encoder's features through its own linear and LayerNorm, then one sequence (s3.1.4)."""

    def __init__(self, size, linear=linear):
        super().__init__()
        self.contexts = size.contexts
        self.linears = nn.ModuleList(linear(c.width, size.width) for c in size.contexts)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in size.contexts)

    def forward(self, contexts, masks):
        """Features [B, L_i, width_i] and bool masks [B, L_i] -> context [L, B, D], mask [B, L]."""
        if len(contexts) != len(self.contexts):
            names = ", ".join(c.name for c in self.contexts)
            raise ValueError(f"got features of {len(contexts)} text encoders, the model takes {names}")
        projected = []
        for context, features, linear, norm in zip(
            self.contexts, contexts, self.linears, self.norms, strict=True
        ):
            if features.shape[-1] != context.width:
                raise ValueError(
                    f"{context.name} features are {features.shape[-1]} wide, the model takes {context.width}"
                )
            projected.append(norm(linear(features)))
        return torch.cat(projected, dim=1).transpose(0, 1), torch.cat(tuple(masks), dim=1)


class SharedModulation(nn.Module):
    """One SiLU and linear for all layers, which add their own bias [6, D]: time [B, D] -> [6, B, D]."""

    def __init__(self, size, linear=linear):
        super().__init__()
        self.linear = linear(size.width, 6 * size.width)

    def forward(self, time_BD):
        B, D = time_BD.shape
        return self.linear(nn.functional.silu(time_BD)).view(B, 6, D).transpose(0, 1)
