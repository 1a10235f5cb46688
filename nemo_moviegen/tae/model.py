"""Temporal autoencoder (Movie Gen s3.1.1): an LDM image autoencoder inflated to 2.5D.

One 1D temporal convolution follows every 2D spatial one, one temporal attention every spatial attention.
A fresh model treats each frame alone: temporal convolutions start as the identity (dirac), temporal
attention adds zero. Convolutions in time pad symmetrically with the edge frame, so they are not causal,
a clip may have any length, and an image is a clip of one frame.

Frames a clip keeps (three halvings in time; what is decoded beyond the clip is dropped):

    17 frames -> 9 -> 5 -> 3 latents -> 6 -> 12 -> 24 frames; the last 7 never existed

Names: B clips, T frames, C channels, H W height and width. Outside tensors are BTCHW, inside they are
BTHWC: both the 2D view [BT, C, H, W] and the temporal view [B, C, T, HW] of that memory are
channels-last without a copy, 2 to 9 times faster on a CPU than conv3d over BCTHW.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_moviegen.recipe import AutoencoderSize

COMPRESSION = 8
"""Frames, rows and columns of pixels in one latent."""


class Posterior(NamedTuple):
    """Gaussian over latents, [B, T, C, H, W] each."""

    mean_BTCHW: Tensor
    logvar_BTCHW: Tensor

    def sample(self, noise_BTCHW: Tensor) -> Tensor:
        """Latents mean + deviation * noise."""
        return self.mean_BTCHW + torch.exp(0.5 * self.logvar_BTCHW) * noise_BTCHW


class TemporalAutoencoder(nn.Module):
    """Encoder and decoder; `encode` and `decode` are the whole interface."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        self.size = size
        self.encoder = Encoder(size)
        self.decoder = Decoder(size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """A fresh model carries every colour through, blurred: without it training settles on grey shapes.

        orthogonal over channels, centre tap only   convolutions and shortcuts outside residual branches
        mean of 2x2 pixels                          downsampling
        zero                                        the last convolution of each residual branch, all biases
        dirac                                       convolutions over time
        0.05                                        deviation of the posterior: more hides the first signal
        torch's default                             the other convolutions of residual branches
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.space.weight)
                if isinstance(module.shortcut, nn.Linear):
                    nn.init.orthogonal_(module.shortcut.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, SpaceTimeConv) and "conv1" not in name and "conv2" not in name:
                weight_OIHW = module.space.weight
                channels_OI = nn.init.orthogonal_(torch.empty(weight_OIHW.shape[:2]))
                nn.init.zeros_(weight_OIHW)
                if isinstance(module, Downsample):
                    weight_OIHW[:, :, :2, :2] = channels_OI[..., None, None] / 4
                else:
                    weight_OIHW[:, :, 1, 1] = channels_OI
        latent_channels = self.size.latent_channels
        nn.init.zeros_(self.encoder.conv_out.space.weight[latent_channels:])
        nn.init.constant_(self.encoder.conv_out.time.conv.bias[latent_channels:], 2 * math.log(0.05))

    def encode(self, video_BTCHW: Tensor) -> Posterior:
        """Posterior [B, ceil(T/8), C, H/8, W/8] of RGB video in [-1, 1]; ValueError for any other input."""
        check_video(video_BTCHW)
        moments_BTHWC = self.encoder(video_BTCHW.permute(0, 1, 3, 4, 2).contiguous())
        mean_BTCHW, logvar_BTCHW = moments_BTHWC.permute(0, 1, 4, 2, 3).chunk(2, dim=2)
        return Posterior(mean_BTCHW, logvar_BTCHW.clamp(-30.0, 20.0))  # LDM's limits

    def decode(self, latent_BTCHW: Tensor, num_frames: int | None = None) -> Tensor:
        """Video [B, num_frames, 3, 8H, 8W], not clamped; all 8T frames where `num_frames` is None."""
        frames = COMPRESSION * latent_BTCHW.shape[1]
        num_frames = frames if num_frames is None else num_frames
        if not frames - COMPRESSION < num_frames <= frames:
            raise ValueError(
                f"{latent_BTCHW.shape[1]} latent frames hold {frames - COMPRESSION + 1} to {frames} frames, "
                f"not {num_frames}: pass the length of the clip that was encoded"
            )
        # One latent frame is constant in time through every replicate-padded layer, so the eight frames
        # of an image are equal: decode one of them instead of eight.
        still = latent_BTCHW.shape[1] == 1
        video_BTHWC = self.decoder(latent_BTCHW.permute(0, 1, 3, 4, 2).contiguous(), upsample_time=not still)
        video_BTCHW = video_BTHWC.permute(0, 1, 4, 2, 3)
        return video_BTCHW.expand(-1, num_frames, -1, -1, -1) if still else video_BTCHW[:, :num_frames]


def check_video(video_BTCHW: Tensor) -> None:
    """ValueError, with what to change, for a tensor that is not RGB video in [-1, 1] of whole latents."""
    shape = tuple(video_BTCHW.shape)
    if len(shape) != 5 or shape[2] != 3 or not shape[0] or not shape[1]:
        raise ValueError(
            f"video has shape {shape}; pass [clips, frames, 3, height, width] with one frame or more"
        )
    if shape[3] % COMPRESSION or shape[4] % COMPRESSION or not shape[3] or not shape[4]:
        raise ValueError(
            f"video is {shape[4]}x{shape[3]} px; width and height must be multiples of {COMPRESSION}: "
            "choose such a bucket (data.bucket.width_px, data.bucket.height_px)"
        )
    if not video_BTCHW.is_floating_point():
        raise ValueError(
            f"video is {video_BTCHW.dtype}; convert it to floats in [-1, 1] (x / 127.5 - 1 for bytes)"
        )
    largest = video_BTCHW.detach().abs().amax().item()
    if not math.isfinite(largest):
        raise ValueError("video holds NaN or infinite values: check the decoder or remove the clip")
    if largest > 1.5:  # resizing filters overshoot a little
        raise ValueError(
            f"video has values up to {largest:.4g}; scale it to [-1, 1] (x / 127.5 - 1 for bytes)"
        )


class Encoder(nn.Module):
    """Pixels [B, T, H, W, 3] to moments [B, ceil(T/8), H/8, W/8, 2C]."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        widths = [size.base_width * m for m in size.multipliers]
        kernel = size.temporal_kernel
        self.conv_in = SpaceTimeConv(3, widths[0], kernel)
        self.levels = nn.ModuleList()
        width = widths[0]
        for index, level_width in enumerate(widths):
            blocks = [
                ResBlock(width if i == 0 else level_width, level_width, kernel)
                for i in range(size.blocks_per_level)
            ]
            down = [Downsample(level_width, kernel)] if index < 3 else []
            self.levels.append(nn.Sequential(*blocks, *down))
            width = level_width
        self.middle = middle(width, kernel)
        self.norm = Norm(width)
        self.conv_out = SpaceTimeConv(width, 2 * size.latent_channels, kernel)

    def forward(self, x_BTHWC):
        x_BTHWC = self.conv_in(x_BTHWC)
        for level in self.levels:
            x_BTHWC = level(x_BTHWC)
        return self.conv_out(F.silu(self.norm(self.middle(x_BTHWC))))


class Decoder(nn.Module):
    """Latents [B, T, H, W, C] to pixels [B, 8T, 8H, 8W, 3]; T frames without `upsample_time`."""

    def __init__(self, size: AutoencoderSize):
        super().__init__()
        widths = [size.base_width * m for m in size.multipliers][::-1]
        kernel = size.temporal_kernel
        self.conv_in = SpaceTimeConv(size.latent_channels, widths[0], kernel)
        self.middle = middle(widths[0], kernel)
        self.levels = nn.ModuleList()
        width = widths[0]
        for index, level_width in enumerate(widths):
            level = nn.Module()
            level.blocks = nn.Sequential(  # LDM: one block more than the encoder
                *(
                    ResBlock(width if i == 0 else level_width, level_width, kernel)
                    for i in range(size.blocks_per_level + 1)
                )
            )
            level.up = Upsample(level_width, kernel) if index < 3 else None
            self.levels.append(level)
            width = level_width
        self.norm = Norm(width)
        self.conv_out = SpaceTimeConv(width, 3, kernel)

    def forward(self, x_BTHWC, upsample_time=True):
        x_BTHWC = self.middle(self.conv_in(x_BTHWC))
        for level in self.levels:
            x_BTHWC = level.blocks(x_BTHWC)
            if level.up is not None:
                x_BTHWC = level.up(x_BTHWC, upsample_time)
        return self.conv_out(F.silu(self.norm(x_BTHWC)))


def middle(width: int, kernel: int) -> nn.Module:
    """Block, attention in space, attention in time, block: the lowest level, where a frame is H/8 x W/8."""
    return nn.Sequential(
        ResBlock(width, width, kernel),
        Attention(width, "space"),
        Attention(width, "time"),
        ResBlock(width, width, kernel),
    )


class SpaceTimeConv(nn.Module):
    """2D convolution of each frame, then 1D convolution over the frames of each pixel."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1):
        super().__init__()
        # LDM pads only right and bottom before a stride of 2; kept so that its weights fit.
        self.space = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1 if stride == 1 else 0)
        self.time = TemporalConv(outputs, kernel, stride=stride)

    def forward(self, x_BTHWC):
        if self.space.stride[0] == 2:
            x_BTHWC = F.pad(x_BTHWC, (0, 0, 0, 1, 0, 1))
        return self.time(conv2d(self.space, x_BTHWC))


class TemporalConv(nn.Module):
    """1D convolution over frames with the edge frame repeated on both sides; T -> ceil(T / stride)."""

    def __init__(self, width: int, kernel: int, *, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, stride=stride, padding=kernel // 2)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_BTHWC):
        conv, (num_frames, height) = self.conv, x_BTHWC.shape[1:3]
        (kernel,), (stride,), (pad,) = conv.kernel_size, conv.stride, conv.padding
        x_BCTP = x_BTHWC.flatten(2, 3).permute(0, 3, 1, 2)  # P: pixels of a frame
        y_BCTP = F.conv2d(x_BCTP, conv.weight[..., None], conv.bias, stride=(stride, 1), padding=(pad, 0))
        y_BTHWC = y_BCTP.permute(0, 2, 3, 1).unflatten(2, (height, -1))
        # Zero padding costs no copy of the clip (6x faster); then each output that reached over an edge
        # gets what the repeated edge frame would have given it.
        frames, edges = [], []
        for frame in range(y_BTHWC.shape[1]):
            first = frame * stride - pad
            before, after = max(-first, 0), max(first + kernel - num_frames, 0)
            if before:
                frames.append(frame)
                edges.append(F.linear(x_BTHWC[:, 0], conv.weight[..., :before].sum(-1)))
            if after:
                frames.append(frame)
                edges.append(F.linear(x_BTHWC[:, -1], conv.weight[..., kernel - after :].sum(-1)))
        return AddToFrames.apply(y_BTHWC, frames, *edges)


class AddToFrames(torch.autograd.Function):
    """`y[:, frame] += addend` in place; autograd's indexing would copy the clip's gradient each time."""

    @staticmethod
    def forward(ctx, y_BTHWC, frames, *addends_BHWC):
        ctx.frames = frames
        ctx.mark_dirty(y_BTHWC)
        for frame, addend_BHWC in zip(frames, addends_BHWC, strict=True):
            y_BTHWC[:, frame] += addend_BHWC
        return y_BTHWC

    @staticmethod
    def backward(ctx, grad_BTHWC):
        return grad_BTHWC, None, *(grad_BTHWC[:, frame] for frame in ctx.frames)


class Downsample(SpaceTimeConv):
    """Halves height, width and, rounding up, frames."""

    def __init__(self, width: int, kernel: int):
        super().__init__(width, width, kernel, stride=2)


class Upsample(nn.Module):
    """Doubles height, width and frames: nearest neighbour, then convolution."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = SpaceTimeConv(width, width, kernel)

    def forward(self, x_BTHWC, upsample_time):
        x_BTHWC = x_BTHWC.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x_BTHWC = conv2d(self.conv.space, x_BTHWC)  # per frame, so before the frames are doubled
        if upsample_time:
            x_BTHWC = x_BTHWC.repeat_interleave(2, dim=1)
        return self.conv.time(x_BTHWC)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input (LDM)."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), SpaceTimeConv(inputs, outputs, kernel)
        self.norm2, self.conv2 = Norm(outputs), SpaceTimeConv(outputs, outputs, kernel)
        self.shortcut = (
            nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()
        )  # LDM's 1x1 convolution

    def forward(self, x_BTHWC):
        h_BTHWC = self.conv1(F.silu(self.norm1(x_BTHWC)))
        return self.shortcut(x_BTHWC) + self.conv2(F.silu(self.norm2(h_BTHWC)))


class Attention(nn.Module):
    """Single-head attention over the pixels of a frame ("space") or the frames of a pixel ("time")."""

    def __init__(self, width: int, over: str):
        super().__init__()
        self.over_time = over == "time"
        self.norm = Norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTHWC):
        y_BTPC = self.norm(x_BTHWC).flatten(2, 3)
        y = y_BTPC.transpose(1, 2) if self.over_time else y_BTPC
        y = F.scaled_dot_product_attention(*self.qkv(y).chunk(3, dim=-1))
        y = self.out(y)
        y_BTPC = y.transpose(1, 2) if self.over_time else y
        return x_BTHWC + y_BTPC.reshape(x_BTHWC.shape)


class Norm(nn.GroupNorm):
    """Group norm of each frame: LDM's 32 groups, fewer where a group would hold under four channels."""

    def __init__(self, width: int):
        super().__init__(max(1, min(32, width // 4)), width, eps=1e-6)

    def forward(self, x_BTHWC):
        y_NCHW = super().forward(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
        return y_NCHW.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


def conv2d(conv: nn.Conv2d, x_BTHWC: Tensor) -> Tensor:
    """`conv` of every frame, without leaving the BTHWC layout."""
    y = conv(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])
