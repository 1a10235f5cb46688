"""Temporal autoencoder (Movie Gen s3.1.1): an LDM image autoencoder inflated to 2.5D.

One 1D temporal convolution follows every 2D spatial one, one temporal attention every spatial attention.
A fresh model treats each frame alone: temporal convolutions start as the identity (dirac), temporal
attention adds zero. Convolutions in time pad symmetrically with the edge frame, so they are not causal,
a clip may have any length, and an image is a clip of one frame.

Frames a clip keeps (three halvings in time; what is decoded beyond the clip is dropped):

    17 frames -> 9 -> 5 -> 3 latents -> 6 -> 12 -> 24 frames; the last 7 never existed

A clip goes through whole (`encode`, `decode`: what training uses) or as a stream of a few frames at a time
(`encode_stream`, `decode_stream`: the same numbers in memory that does not grow with the clip).

Names: B clips, T frames, C channels, H W height and width. Outside tensors are BTCHW, inside BTHWC.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_moviegen.sizes import AutoencoderSize
from nemo_moviegen.tae.checks import check_shape, check_values, check_video
from nemo_moviegen.tae.layers import (
    Attention,
    Downsample,
    Norm,
    ResBlock,
    SpaceTimeConv,
    TemporalAttention,
    Upsample,
)
from nemo_moviegen.tae.streams import frame_by_frame, in_parts, marked

FRAMES_AT_ONCE = 2
"""Of a stream, at every level. On a CPU two are as fast as four and take an eighth less memory."""


class Posterior(NamedTuple):
    """Gaussian over latents, [B, T, C, H, W] each."""

    mean_BTCHW: Tensor
    logvar_BTCHW: Tensor

    def sample(self, noise_BTCHW: Tensor) -> Tensor:
        """Latents mean + deviation * noise."""
        return self.mean_BTCHW + torch.exp(0.5 * self.logvar_BTCHW) * noise_BTCHW


class TemporalAutoencoder(nn.Module):
    """Encoder and decoder. `size.temporal_compression` frames make one latent frame (8 in the paper)."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        self.size = size
        self.encoder = Encoder(size)
        self.decoder = Decoder(size)
        init_weights(self)

    def encode(self, video_BTCHW: Tensor) -> Posterior:
        """Posterior [B, ceil(T/8), C, H/8, W/8] of RGB video in [-1, 1]; ValueError for any other input."""
        check_video(video_BTCHW)
        moments_BTHWC = self.encoder(video_BTCHW.permute(0, 1, 3, 4, 2).contiguous())
        mean_BTCHW, logvar_BTCHW = moments_BTHWC.permute(0, 1, 4, 2, 3).chunk(2, dim=2)
        return Posterior(mean_BTCHW, logvar_BTCHW.clamp(-30.0, 20.0))  # LDM's limits

    def decode(self, latent_BTCHW: Tensor, num_frames: int | None = None) -> Tensor:
        """Video [B, num_frames, 3, 8H, 8W], not clamped; all 8T frames where `num_frames` is None."""
        num_frames = self.frames_kept(latent_BTCHW.shape[1], num_frames)
        # One latent frame is constant in time through every replicate-padded layer, so the eight frames
        # of an image are equal: decode one of them instead of eight.
        still = latent_BTCHW.shape[1] == 1
        video_BTHWC = self.decoder(latent_BTCHW.permute(0, 1, 3, 4, 2).contiguous(), upsample_time=not still)
        video_BTCHW = video_BTHWC.permute(0, 1, 4, 2, 3)
        return video_BTCHW.expand(-1, num_frames, -1, -1, -1) if still else video_BTCHW[:, :num_frames]

    @torch.no_grad()
    def encode_stream(self, videos: Iterable[Tensor], most: int = FRAMES_AT_ONCE) -> Iterator[Tensor]:
        """Means of the posterior of one clip that comes in chunks of frames, [B, t, C, H/8, W/8] at a time.

        Together they are `encode` of the whole clip, up to rounding. A layer holds about `most` frames.
        """

        def checked():
            num_frames = 0
            for video_BTCHW, is_last in marked(videos):
                check_shape(video_BTCHW)
                for part_BTCHW, ends in in_parts(video_BTCHW, is_last, most):
                    check_values(part_BTCHW, num_frames)
                    num_frames += part_BTCHW.shape[1]
                    yield part_BTCHW.permute(0, 1, 3, 4, 2).contiguous(), ends

        for moments_BTHWC, _ in self.encoder.stream(checked(), most):
            yield moments_BTHWC[..., : self.size.latent_channels].permute(0, 1, 4, 2, 3)

    @torch.no_grad()
    def decode_stream(
        self, latents: Iterable[Tensor], num_frames: int | None = None, most: int = FRAMES_AT_ONCE
    ) -> Iterator[Tensor]:
        """Frames [B, t, 3, 8H, 8W] of one clip whose latents come in chunks, in order, not clamped.

        Together they are `decode` of the whole clip, up to rounding; frames past `num_frames` are dropped.
        """
        left, num_latents = math.inf if num_frames is None else num_frames, 0

        def counted():
            nonlocal num_latents
            for latent_BTCHW, is_last in marked(latents):
                num_latents += latent_BTCHW.shape[1]
                if is_last:
                    self.frames_kept(num_latents, num_frames)
                yield from in_parts(latent_BTCHW.permute(0, 1, 3, 4, 2).contiguous(), is_last, most)

        for video_BTHWC, _ in self.decoder.stream(counted(), most):
            kept = min(left, video_BTHWC.shape[1])
            left -= kept
            if kept:
                yield video_BTHWC[:, :kept].permute(0, 1, 4, 2, 3)

    def frames_kept(self, num_latents: int, num_frames: int | None) -> int:
        """`num_frames`, or all that `num_latents` decode to; ValueError where they hold another number."""
        compression = self.size.temporal_compression
        frames = compression * num_latents
        if num_frames is None:
            return frames
        if not frames - compression < num_frames <= frames:
            raise ValueError(
                f"{num_latents} latent frames hold {frames - compression + 1} to {frames} frames, "
                f"not {num_frames}: pass the length of the clip that was encoded"
            )
        return num_frames

    def recompute(self, on: bool):
        """Whether training keeps only the input of each level and runs it again for its gradients."""
        self.encoder.recomputes = self.decoder.recomputes = on


class Encoder(nn.Module):
    """Pixels [B, T, H, W, 3] to moments [B, ceil(T/8), H/8, W/8, 2C]."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        widths = [size.base_width * m for m in size.multipliers]
        self.conv_in = SpaceTimeConv(3, widths[0], size)
        self.levels = nn.ModuleList()
        width = widths[0]
        for index, level_width in enumerate(widths):
            blocks = [
                ResBlock(width if i == 0 else level_width, level_width, size)
                for i in range(size.blocks_per_level)
            ]
            down = [Downsample(level_width, size, size.temporal_strides[index])] if index < 3 else []
            self.levels.append(nn.Sequential(*blocks, *down))
            width = level_width
        self.middle = Middle(width, size)
        self.norm = Norm(width)
        self.conv_out = SpaceTimeConv(width, 2 * size.latent_channels, size)
        self.recomputes = False

    def forward(self, x_BTHWC):
        x_BTHWC = self.conv_in(x_BTHWC)
        for level in (*self.levels, self.middle):
            x_BTHWC = self._run(level, x_BTHWC)
        return self.conv_out(self.norm.silu(x_BTHWC))

    def _run(self, level, x_BTHWC):
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(level, x_BTHWC, use_reentrant=False)
        return level(x_BTHWC)

    def stream(self, chunks, most):
        chunks = self.conv_in.stream(chunks, most)
        for level in self.levels:
            for layer in level:
                chunks = layer.stream(chunks, most)
        chunks = frame_by_frame(self.middle.stream(chunks, most), self.norm.silu)
        return self.conv_out.stream(chunks, most)


class Decoder(nn.Module):
    """Latents [B, T, H, W, C] to pixels [B, 8T, 8H, 8W, 3]; T frames without `upsample_time`."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        widths = [size.base_width * m for m in size.multipliers][::-1]
        self.post_quant = nn.Linear(size.latent_channels, size.latent_channels)  # LDM's 1x1 convolution
        self.conv_in = SpaceTimeConv(size.latent_channels, widths[0], size)
        self.middle = Middle(widths[0], size)
        self.levels = nn.ModuleList()
        width = widths[0]
        for index, level_width in enumerate(widths):
            level = nn.Module()
            level.blocks = nn.Sequential(  # LDM: one block more than the encoder
                *(
                    ResBlock(width if i == 0 else level_width, level_width, size)
                    for i in range(size.blocks_per_level + 1)
                )
            )
            strides = size.temporal_strides[::-1]
            level.up = Upsample(level_width, size, strides[index]) if index < 3 else None
            self.levels.append(level)
            width = level_width
        self.norm = Norm(width)
        self.conv_out = SpaceTimeConv(width, 3, size)
        self.recomputes = False

    def forward(self, x_BTHWC, upsample_time=True):
        x_BTHWC = self._run(self.middle, self.conv_in(self.post_quant(x_BTHWC)))
        for level in self.levels:
            x_BTHWC = self._run(level.blocks, x_BTHWC)
            if level.up is not None:
                x_BTHWC = level.up(x_BTHWC, upsample_time)
        return self.conv_out(self.norm.silu(x_BTHWC))

    _run = Encoder._run

    def stream(self, chunks, most):
        chunks = self.conv_in.stream(frame_by_frame(chunks, self.post_quant), most)
        chunks = self.middle.stream(chunks, most)
        for level in self.levels:
            for layer in (*level.blocks, *([level.up] if level.up is not None else [])):
                chunks = layer.stream(chunks, most)
        return self.conv_out.stream(frame_by_frame(chunks, self.norm.silu), most)


class Middle(nn.Module):
    """Block, attention in space, attention in time, block: the lowest level, where a frame is H/8 x W/8."""

    def __init__(self, width: int, size: AutoencoderSize):
        super().__init__()
        self.block1, self.block2 = ResBlock(width, width, size), ResBlock(width, width, size)
        self.attention = Attention(width)
        self.temporal_attention = TemporalAttention(width) if size.inflation != "2D" else None

    def layers(self):
        """In order."""
        layers = (self.block1, self.attention, self.temporal_attention, self.block2)
        return [layer for layer in layers if layer is not None]

    def forward(self, x_BTHWC):
        for layer in self.layers():
            x_BTHWC = layer(x_BTHWC)
        return x_BTHWC

    def stream(self, chunks, most):
        for layer in self.layers():
            chunks = layer.stream(chunks, most)
        return chunks


@torch.no_grad()
def init_weights(autoencoder: TemporalAutoencoder):
    """A fresh model carries every colour through, blurred: without it training settles on grey shapes.

    orthogonal over channels, centre tap only   convolutions and shortcuts outside residual branches
    mean of 2x2 pixels                          downsampling
    zero                                        the last convolution of each residual branch, all biases
    dirac                                       convolutions over time
    identity                                    the convolution of one tap before the decoder
    0.05                                        deviation of the posterior: more hides the first signal
    torch's default                             the other convolutions of residual branches
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.space.weight)
            if isinstance(module.shortcut, nn.Linear):
                nn.init.orthogonal_(module.shortcut.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
        elif isinstance(module, SpaceTimeConv):
            residual = "conv1" in name or "conv2" in name
            in_time = centre_tap(module.space.weight) if module.whole else module.space.weight
            if module.whole:
                in_space = in_time.clone()
                nn.init.zeros_(module.space.weight)
                if residual and "conv1" in name:
                    nn.init.kaiming_uniform_(in_space, a=math.sqrt(5))  # torch's default, of one frame
                    in_time.copy_(in_space)
            if not residual:
                channels_OI = nn.init.orthogonal_(torch.empty(in_time.shape[:2]))
                nn.init.zeros_(in_time)
                if isinstance(module, Downsample):
                    in_time[:, :, :2, :2] = channels_OI[..., None, None] / 4
                else:
                    in_time[:, :, 1, 1] = channels_OI
    nn.init.eye_(autoencoder.decoder.post_quant.weight)
    latent_channels, out = autoencoder.size.latent_channels, autoencoder.encoder.conv_out
    nn.init.zeros_(centre_tap(out.space.weight)[latent_channels:])
    nn.init.constant_(out.space.bias[latent_channels:], 2 * math.log(0.05))


def centre_tap(weight: Tensor) -> Tensor:
    """[O, I, 3, 3]: what a convolution, 2D or 3D, does to the frame in its middle; a view."""
    return weight if weight.dim() == 4 else weight[:, :, weight.shape[2] // 2]
