"""Layers of the temporal autoencoder (Movie Gen s3.1.1): LDM's, each followed by one over time.

Names: B clips, T frames, C channels, H W height and width. Everything is BTHWC: both the 2D view
[BT, C, H, W] and the temporal view [B, C, T, HW] of that memory are channels-last without a copy, 2 to 9
times faster on a CPU than conv3d over BCTHW. Every layer has `forward`, of a whole clip, and `stream`, of
its chunks (streams.py): the same numbers, and at most `most` frames of each layer alive at once.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_moviegen.tae.streams import Waiting, finer, frame_by_frame, windowed

ATTENTION_REACH = 3
"""Latent frames before and after its own that temporal attention sees: those a tile of four can hold, which
is what it is trained on. So a clip of any length is attended to as in training, and has an end in sight."""


class SpaceTimeConv(nn.Module):
    """2D convolution of each frame, then 1D convolution over the frames of each pixel (2.5D).

    Or, by `inflation`, one 3D convolution (3D) or none over time (2D). `stride` is that of height and width;
    `temporal_stride` halves frames, rounding up.
    """

    def __init__(self, inputs, outputs, size, *, stride=1, temporal_stride=1):
        super().__init__()
        # LDM pads only right and bottom before a stride of 2; kept so that its weights fit.
        pad, kernel = (1 if stride == 1 else 0), size.temporal_kernel
        self.stride, self.whole = stride, size.inflation == "3D"
        if self.whole:
            strides = (temporal_stride, stride, stride)
            self.space = nn.Conv3d(inputs, outputs, (kernel, 3, 3), stride=strides, padding=(0, pad, pad))
        else:
            self.space = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=pad)
        self.time = TemporalConv(outputs, kernel, temporal_stride) if size.inflation == "2.5D" else None

    def forward(self, x_BTHWC):
        if self.whole:
            return self.valid_3d(replicated(x_BTHWC, self.space.kernel_size[0] // 2))
        y_BTHWC = self.valid_2d(x_BTHWC)
        return y_BTHWC if self.time is None else self.time(y_BTHWC)

    def stream(self, chunks, most):
        if self.whole:
            kernel, stride = self.space.kernel_size[0], self.space.stride[0]
            return windowed(chunks, self.valid_3d, kernel, stride, most)
        chunks = frame_by_frame(chunks, self.valid_2d)
        return chunks if self.time is None else self.time.stream(chunks, most)

    def valid_2d(self, x_BTHWC):
        return conv2d(self.space, self._uneven(x_BTHWC))

    def valid_3d(self, x_BTHWC):
        """Without padding in time: kernel - 1 frames fewer."""
        x_BCTHW = self._uneven(x_BTHWC).permute(0, 4, 1, 2, 3)
        if x_BCTHW.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with float32_on_cpu(x_BCTHW):
                y_BCTHW = self.space(x_BCTHW.float()).to(torch.get_autocast_dtype("cpu"))
        else:
            y_BCTHW = self.space(x_BCTHW)
        return y_BCTHW.permute(0, 2, 3, 4, 1)

    def _uneven(self, x_BTHWC):
        return F.pad(x_BTHWC, (0, 0, 0, 1, 0, 1)) if self.stride == 2 else x_BTHWC


class TemporalConv(nn.Module):
    """1D convolution over frames with the edge frame repeated on both sides; T -> ceil(T / stride)."""

    def __init__(self, width, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, stride=stride, padding=kernel // 2)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x_BTHWC):
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride[0]
        device = x_BTHWC.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_BTHWC, weight, bias = x_BTHWC.to(dtype), weight.to(dtype), bias.to(dtype)
        if x_BTHWC.shape[1] == 1:  # an image: every tap sees its one frame
            return F.linear(x_BTHWC, weight.sum(-1), bias)
        return ReplicatePaddedConv.apply(x_BTHWC, weight, bias, stride)

    def stream(self, chunks, most):
        return windowed(chunks, self._valid, self.conv.kernel_size[0], self.conv.stride[0], most)

    def _valid(self, x_BTHWC):
        y_BCTP = F.conv2d(
            _as_BCTP(x_BTHWC), self.conv.weight[..., None], self.conv.bias, stride=(self.conv.stride[0], 1)
        )
        return _as_BTHWC(y_BCTP, x_BTHWC.shape[2])


class ReplicatePaddedConv(torch.autograd.Function):
    """The temporal convolution, with a gradient of its own.

    Padding with zeros costs no copy of the clip (6x faster); then each output that reached over an edge gets
    what the repeated edge frame would have given it. Autograd would make a clip of zeros for every such edge.
    """

    @staticmethod
    def forward(ctx, x_BTHWC, weight_OIK, bias_O, stride):
        pad = weight_OIK.shape[2] // 2
        ctx.save_for_backward(x_BTHWC, weight_OIK)
        ctx.stride = stride
        y_BCTP = F.conv2d(
            _as_BCTP(x_BTHWC), weight_OIK[..., None], bias_O, stride=(stride, 1), padding=(pad, 0)
        )
        y_BTHWC = _as_BTHWC(y_BCTP, x_BTHWC.shape[2])
        for frame, edge, taps in edges(x_BTHWC.shape[1], weight_OIK.shape[2], stride):
            y_BTHWC[:, frame] += F.linear(x_BTHWC[:, edge], weight_OIK[..., taps].sum(-1))
        return y_BTHWC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTHWC):
        x_BTHWC, weight_OIK = ctx.saved_tensors
        pad = weight_OIK.shape[2] // 2
        grad_x_BCTP, grad_weight_OIK1, grad_bias_O = torch.ops.aten.convolution_backward(
            _as_BCTP(grad_BTHWC),
            _as_BCTP(x_BTHWC),
            weight_OIK[..., None],
            [weight_OIK.shape[0]],
            [ctx.stride, 1],
            [pad, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], True, True],
        )
        grad_weight_OIK = grad_weight_OIK1[..., 0]
        grad_x_BTHWC = None
        if grad_x_BCTP is not None:
            grad_x_BTHWC = _as_BTHWC(grad_x_BCTP, x_BTHWC.shape[2])
        for frame, edge, taps in edges(x_BTHWC.shape[1], weight_OIK.shape[2], ctx.stride):
            grad_PO, x_PI = grad_BTHWC[:, frame].flatten(0, 2), x_BTHWC[:, edge].flatten(0, 2)
            grad_weight_OIK[..., taps] += (grad_PO.T @ x_PI)[..., None]
            if grad_x_BTHWC is not None:
                grad_x_BTHWC[:, edge] += grad_BTHWC[:, frame] @ weight_OIK[..., taps].sum(-1)
        return grad_x_BTHWC, grad_weight_OIK, grad_bias_O, None


def edges(num_frames, kernel, stride):
    """(output frame, edge input frame, taps that fall outside) of a replicate-padded convolution."""
    pad = kernel // 2
    for frame in range(-(-num_frames // stride)):
        first = frame * stride - pad
        before, after = max(-first, 0), max(first + kernel - num_frames, 0)
        if before:
            yield frame, 0, slice(0, before)
        if after:
            yield frame, num_frames - 1, slice(kernel - after, kernel)


class Downsample(SpaceTimeConv):
    """Halves height and width and, with a temporal stride of 2, frames, rounding up."""

    def __init__(self, width, size, temporal_stride):
        super().__init__(width, width, size, stride=2, temporal_stride=temporal_stride)


class Upsample(nn.Module):
    """Doubles height and width and, with a temporal stride of 2, frames: nearest, then convolution."""

    def __init__(self, width, size, temporal_stride):
        super().__init__()
        self.conv, self.temporal_stride = SpaceTimeConv(width, width, size), temporal_stride

    def forward(self, x_BTHWC, upsample_time=True):
        frames = self.temporal_stride if upsample_time else 1
        x_BTHWC = wider(x_BTHWC)
        if self.conv.whole:
            return self.conv(repeated(x_BTHWC, frames))
        x_BTHWC = repeated(self.conv.valid_2d(x_BTHWC), frames)  # per frame, so before frames are doubled
        return x_BTHWC if self.conv.time is None else self.conv.time(x_BTHWC)

    def stream(self, chunks, most):
        frames = self.temporal_stride
        chunks = finer(chunks, max(1, most // frames))  # what is doubled has `most` frames again
        if self.conv.whole:
            return self.conv.stream(frame_by_frame(chunks, lambda x: repeated(wider(x), frames)), most)
        chunks = frame_by_frame(chunks, lambda x: repeated(self.conv.valid_2d(wider(x)), frames))
        return chunks if self.conv.time is None else self.conv.time.stream(chunks, most)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input (LDM)."""

    def __init__(self, inputs, outputs, size):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), SpaceTimeConv(inputs, outputs, size)
        self.norm2, self.conv2 = Norm(outputs), SpaceTimeConv(outputs, outputs, size)
        # LDM's 1x1 convolution
        self.shortcut = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x_BTHWC):
        h_BTHWC = self.conv1(self.norm1.silu(x_BTHWC))
        return self.shortcut(x_BTHWC) + self.conv2(self.norm2.silu(h_BTHWC))

    def stream(self, chunks, most):
        waiting = Waiting()
        chunks = frame_by_frame(waiting.passing(chunks, self.shortcut), self.norm1.silu)
        chunks = frame_by_frame(self.conv1.stream(chunks, most), self.norm2.silu)
        return frame_by_frame(self.conv2.stream(chunks, most), lambda h: waiting.take(h.shape[1]) + h)


class Attention(nn.Module):
    """Single-head attention over the pixels of a frame (LDM)."""

    def __init__(self, width):
        super().__init__()
        self.norm = Norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTHWC):
        y_BTPC = self.norm(x_BTHWC).flatten(2, 3)
        y_BTPC = F.scaled_dot_product_attention(*self.qkv(y_BTPC).chunk(3, dim=-1))
        return x_BTHWC + self.out(y_BTPC).reshape(x_BTHWC.shape)

    def stream(self, chunks, most):
        return frame_by_frame(chunks, self)


class TemporalAttention(Attention):
    """Single-head attention over the frames of a pixel, `ATTENTION_REACH` to both sides."""

    def forward(self, x_BTHWC):
        return self.attend(x_BTHWC, 0, x_BTHWC.shape[1])

    def attend(self, x_BTHWC, first, end):
        """Output of the frames first .. end - 1, from all that are given."""
        num_frames = x_BTHWC.shape[1]
        y_BPTC = self.norm(x_BTHWC).flatten(2, 3).transpose(1, 2)
        q_BPTC, k_BPTC, v_BPTC = self.qkv(y_BPTC).chunk(3, dim=-1)
        mask_TT = None
        if num_frames > ATTENTION_REACH + 1:
            place_T = torch.arange(num_frames, device=x_BTHWC.device)
            mask_TT = (place_T[first:end, None] - place_T[None]).abs() <= ATTENTION_REACH
        y_BPTC = F.scaled_dot_product_attention(q_BPTC[:, :, first:end], k_BPTC, v_BPTC, attn_mask=mask_TT)
        asked_BTHWC = x_BTHWC[:, first:end]
        return asked_BTHWC + self.out(y_BPTC).transpose(1, 2).reshape(asked_BTHWC.shape)

    def stream(self, chunks, most):
        kept, start, done = None, 0, 0  # frames in hand, number of their first, frames given
        for chunk, is_last in chunks:
            kept = chunk if kept is None else torch.cat([kept, chunk], dim=1)
            ready = start + kept.shape[1] - (0 if is_last else ATTENTION_REACH)
            if ready > done:
                yield self.attend(kept, done - start, ready - start), is_last
                done = ready
                cut = max(0, done - ATTENTION_REACH - start)
                kept, start = kept[:, cut:], start + cut


class Norm(nn.GroupNorm):
    """Group norm of each frame: LDM's 32 groups, fewer where a group would hold under four channels."""

    def __init__(self, width):
        super().__init__(max(1, min(32, width // 4)), width, eps=1e-6)

    def forward(self, x_BTHWC):
        y_NCHW = super().forward(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
        return y_NCHW.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])

    def silu(self, x_BTHWC):
        """SiLU of the norm."""
        return F.silu(self(x_BTHWC), inplace=not torch.is_grad_enabled())


def conv2d(conv: nn.Conv2d, x_BTHWC: Tensor) -> Tensor:
    """`conv` of every frame, without leaving the BTHWC layout."""
    y = conv(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


def float32_on_cpu(x: Tensor):
    """For 3D convolutions under autocast: torch 2.13's gradient of their weights in bfloat16 reads, on a CPU
    and with few channels, memory that nobody wrote, so now and then it is NaN.
    """
    return torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else contextlib.nullcontext()


def replicated(x_BTHWC: Tensor, pad: int) -> Tensor:
    """With the first and the last frame `pad` times more."""
    first, last = (x_BTHWC[:, edge].expand(-1, pad, -1, -1, -1) for edge in (slice(0, 1), slice(-1, None)))
    return torch.cat([first, x_BTHWC, last], dim=1)


def repeated(x_BTHWC: Tensor, times: int) -> Tensor:
    """Every frame `times` times."""
    return x_BTHWC if times == 1 else x_BTHWC.repeat_interleave(times, dim=1)


def wider(x_BTHWC: Tensor) -> Tensor:
    """Every pixel as 2x2 of them."""
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC[:, :, :, None, :, None].expand(B, T, H, 2, W, 2, C).reshape(B, T, 2 * H, 2 * W, C)


def _as_BCTP(x_BTHWC):
    """P: pixels of a frame. Channels-last, a view."""
    return x_BTHWC.flatten(2, 3).permute(0, 3, 1, 2)


def _as_BTHWC(y_BCTP, height):
    return y_BCTP.permute(0, 2, 3, 1).unflatten(2, (height, -1))
