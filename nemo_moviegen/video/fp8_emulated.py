"""FP8 linears on any machine: operands take the values that FP8 has, products are fp32's.

    forward    input  x weight      e4m3, e4m3
    backward   grad   x weight      e5m2, e4m3
               grad^T x input       e5m2, e4m3

Scaled as Transformer Engine does it (transformer_engine/common/recipe): fp8_current by the largest value of
the tensor; fp8_block by that of 128 values along the products' inner axis, of a weight 128 x 128, a power of
two; fp8_delayed by the largest of the 1,024 products before, over all ranks. This is for numbers, not for
speed: a recipe can be judged against bf16 where no FP8 is.

A rank sees its own tensors, so current and block scales depend a little on the layout, as they do on GPUs.
"""

import contextlib
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import nn
from torch.nn import functional

from nemo_moviegen.precision import FP8
from nemo_moviegen.video.linear import Column, Row

FORMATS = {"input": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "gradient": torch.float8_e5m2}
"""Of each operand: "hybrid"."""
BLOCK = 128
_off = False


@contextlib.contextmanager
def in_bf16():
    """While this lasts, emulated linears are those of bf16."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@dataclass
class Scaling:
    """How the operands of one linear are scaled; of fp8_delayed, what it remembers."""

    precision: str
    largest: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FORMATS})
    """Of fp8_delayed: largest absolute values of the products before, newest last, at most 1,024."""

    def scale_of(self, x_RK, operand, axis=-1):
        """What `x_RK` is multiplied by before it is rounded, with as many axes; `axis` is the inner one of
        the product."""
        limit = torch.finfo(FORMATS[operand]).max
        if self.precision == "fp8_delayed":
            return x_RK.new_full((1, 1), _ratio(limit, max(self.largest[operand], default=0.0)))
        if self.precision == "fp8_current":
            return _scale(limit, x_RK.abs().amax(dim=(0, 1), keepdim=True))
        blocks = (BLOCK, BLOCK) if operand == "weight" else ((1, BLOCK) if axis == -1 else (BLOCK, 1))
        scale = torch.exp2(torch.floor(torch.log2(_scale(limit, _largest_of_blocks(x_RK, blocks)))))
        for dim, length in enumerate(blocks):
            scale = scale.repeat_interleave(length, dim=dim).narrow(dim, 0, x_RK.shape[dim])
        return scale

    def rounded(self, x_RK, operand, axis=-1):
        """fp32 values that FP8 has, times their scale."""
        x_RK = x_RK.float()
        scale, limit = self.scale_of(x_RK, operand, axis), torch.finfo(FORMATS[operand]).max
        # what is too large is cut off, as the GPU's conversion does; torch's makes it NaN
        return (x_RK * scale).clamp(-limit, limit).to(FORMATS[operand]).float() / scale

    def remember(self, tensors):
        """Take note of the operands (by name) of a product whose backward pass is over."""
        if self.precision != "fp8_delayed":
            return
        largest = torch.stack([x.abs().amax().float() for x in tensors.values()])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        for name, value in zip(tensors, largest.tolist(), strict=True):
            self.largest[name] = [*self.largest[name], value][-FP8["fp8_delayed"]["fp8_amax_history_len"] :]


def emulated_linear(x, weight, scaling):
    """x [..., K] times weight [N, K] transposed, [..., N] in x's format."""
    return functional.linear(x, weight) if _off else _Emulated.apply(x, weight, scaling)


class _Scaled:
    """Before one of megatron's classes: it has a `Scaling`."""

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self.scaling = Scaling(config.emulated_fp8)


class EmulatedColumn(_Scaled, Column):
    """Whose rows tensor ranks share out."""

    def forward(self, x):
        if self.config.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(x)
        else:
            x = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        return emulated_linear(x, self.weight, self.scaling), None


class EmulatedRow(_Scaled, Row):
    """Whose columns they share out."""

    def forward(self, x):
        part = emulated_linear(x, self.weight, self.scaling)
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(part), None
        return tensor_parallel.reduce_from_tensor_model_parallel_region(part), None


class EmulatedLinear(nn.Linear):
    """Of a part outside the layers, without a bias."""

    def __init__(self, in_width, out_width, scaling):
        super().__init__(in_width, out_width, bias=False)
        self.scaling = scaling

    def forward(self, x):
        return emulated_linear(x, self.weight, self.scaling)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scaling):
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        x_RK = x.flatten(0, -2)
        product = scaling.rounded(x_RK, "input") @ scaling.rounded(weight, "weight").t()
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), scaling = ctx.saved_tensors, ctx.scaling
        x_RK, grad_RN = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = scaling.rounded(grad_RN, "gradient") @ scaling.rounded(weight, "weight")
        # blocks lie along the inner axis, which is the rows' now
        rounded_RN = scaling.rounded(grad_RN, "gradient", axis=0)
        grad_weight = rounded_RN.t() @ scaling.rounded(x_RK, "input", axis=0)
        # only now: a forward pass that is computed again has the scales of the first
        scaling.remember({"input": x_RK, "weight": weight, "gradient": grad_RN})
        return grad_x.to(x.dtype).view_as(x), grad_weight.to(weight.dtype), None


def _ratio(limit, largest):
    return limit / largest if 0 < largest < float("inf") else 1.0


def _scale(limit, largest):
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, limit / largest, torch.ones_like(largest))


def _largest_of_blocks(x_RK, blocks):
    rows, columns = x_RK.shape
    padded = functional.pad(x_RK.abs(), (0, -columns % blocks[1], 0, -rows % blocks[0]))
    return padded.unflatten(1, (-1, blocks[1])).unflatten(0, (-1, blocks[0])).amax(dim=(1, 3))
