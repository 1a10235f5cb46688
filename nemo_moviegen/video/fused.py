"""Element-wise work between the linear layers, each as one operation with its gradient written down.

Left to autograd, RMSNorm and modulation are eight operations that keep four tensors as large as the hidden
state; here they are one that keeps its input. With `compiled` the bodies below go through torch.compile, once
for all shapes: on a GPU each becomes a kernel or two. Without, they run as they are written: on a CPU the
start of a run does not wait for a compiler. SwiGLU is the local spec's alone and is never compiled.

    operation        keeps for the backward pass
    ---------------  ------------------------------------
    rms_norm         input, one number a row
    norm_modulate    input, one number a token
    gated_sum        the branch, the gate
    swiglu           input

Tokens are [S, B, D] and vectors of a clip [B, D]. Reductions are taken in fp32 where tensors are in bf16.
"""

import functools

import torch
from torch.nn import functional


def rms_norm(x, weight, eps, compiled=False):
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, in the dtype of x."""
    return _RmsNorm.apply(x, weight, eps, compiled)


def norm_modulate(x_SBD, weight_D, scale_BD, shift_BD, eps, compiled=False):
    """adaLN: rms_norm(x, weight) * (1 + scale) + shift, in the dtype of x."""
    return _NormModulate.apply(x_SBD, weight_D, scale_BD, shift_BD, eps, compiled)


def gated_sum(hidden_SBD, branch_SBD, gate_BD, compiled=False):
    """hidden + gate * branch."""
    return _GatedSum.apply(hidden_SBD, branch_SBD, gate_BD, compiled)


def swiglu(gate_value):
    """silu(gate) * value of [..., 2 F], gates first: [..., F]."""
    return _SwiGlu.apply(gate_value)


def kernel(body):
    """`body(*tensors)`, which calls of it run as written, or compiled where the keyword says so."""
    compiled_body = None

    @functools.wraps(body)
    def run(*arguments, compiled):
        nonlocal compiled_body
        if not compiled:
            return body(*arguments)
        if compiled_body is None:
            compiled_body = torch.compile(body, dynamic=True, fullgraph=True)
        return compiled_body(*arguments)

    return run


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, compiled):
        out, rms = _normed(x, weight, eps, compiled=compiled)
        ctx.save_for_backward(x, weight, rms)
        ctx.compiled = compiled
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_normed_backward(grad, *ctx.saved_tensors, compiled=ctx.compiled), None, None


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, shift, eps, compiled):
        out, rms = _modulated(x, weight, scale, shift, eps, compiled=compiled)
        ctx.save_for_backward(x, weight, scale, rms)
        ctx.compiled = compiled
        return out

    @staticmethod
    def backward(ctx, grad):
        return *_modulated_backward(grad, *ctx.saved_tensors, compiled=ctx.compiled), None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, branch, gate, compiled):
        ctx.save_for_backward(branch, gate)
        ctx.compiled = compiled
        return torch.addcmul(hidden, branch, gate)

    @staticmethod
    def backward(ctx, grad):
        return grad, *_gated_backward(grad, *ctx.saved_tensors, compiled=ctx.compiled), None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_value):
        ctx.save_for_backward(gate_value)
        gate, value = gate_value.chunk(2, dim=-1)
        return functional.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad):
        (gate_value,) = ctx.saved_tensors
        gate, value = gate_value.chunk(2, dim=-1)
        grad_both = torch.empty_like(gate_value)
        grad_gate, grad_value = grad_both.chunk(2, dim=-1)
        torch.mul(grad, functional.silu(gate), out=grad_value)
        torch.mul(grad, value, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_both


def _wide(tensor):
    """In the precision that reductions are taken in: at least fp32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _as(tensor, like):
    """In the dtype of `like`; `to` costs a microsecond also where there is nothing to do."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _inverse_rms(x, eps):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _factor(weight, scale):
    return _wide(weight) * (1 + _wide(scale))


@kernel
def _normed(x, weight, eps):
    wide = _wide(x)
    rms = _inverse_rms(wide, eps)
    return _as((wide * rms).mul_(_wide(weight)), x), rms


@kernel
def _normed_backward(grad, x, weight, rms):
    weight_wide, grad_wide, unit = _wide(weight), _wide(grad), _wide(x) * rms
    grad_weight, grad_x = _through_norm(grad_wide, unit, rms, weight_wide)
    return _as(grad_x, x), _as(grad_weight.flatten(0, -2).sum(0), weight)


@kernel
def _modulated(x, weight, scale, shift, eps):
    wide = _wide(x)
    rms = _inverse_rms(wide, eps)
    return _as((wide * rms).mul_(_factor(weight, scale)).add_(_wide(shift)), x), rms


@kernel
def _modulated_backward(grad, x, weight, scale, rms):
    grad_wide, unit = _wide(grad), _wide(x) * rms
    grad_factor, grad_x = _through_norm(grad_wide, unit, rms, _factor(weight, scale))
    grad_factor, grad_shift = grad_factor.sum(0), grad_wide.sum(0)
    grad_weight = (grad_factor * (1 + _wide(scale))).sum(0)
    grad_scale = grad_factor * _wide(weight)
    return _as(grad_x, x), _as(grad_weight, weight), _as(grad_scale, scale), _as(grad_shift, scale)


def _through_norm(grad, unit, rms, factor):
    """Gradients of `factor`, a row for each token, and of x, where out = unit * factor and unit = x * rms."""
    grad_factor = grad * unit
    along = torch.linalg.vecdot(grad_factor, factor).unsqueeze(-1).div_(unit.shape[-1])
    return grad_factor, (grad * factor).addcmul_(unit, along, value=-1).mul_(rms)


@kernel
def _gated_backward(grad, branch, gate):
    return grad * gate, _as((_wide(grad) * branch).sum(0), gate)
