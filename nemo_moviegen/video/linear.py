"""Linear layers of the local spec: megatron's classes, and the product of a rank that shares no matrices.

On one tensor rank megatron's linears go through an autograd function in Python for collectives that nobody
needs, 3% of a demo's step. Here the weight's gradient is added where megatron sums it over micro-batches, in
the product itself (its gradient_accumulation_fusion, which on GPUs needs NVIDIA Apex).
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn import functional


def linear(x, weight):
    """x [..., K] times weight [N, K] transposed: [..., N], with a gradient."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _Linear.apply(x, weight)
    return functional.linear(x, weight)


class _Alone:
    """Before one of megatron's classes: on one tensor rank `linear` is all it does."""

    def forward(self, x):
        if self.config.tensor_model_parallel_size > 1 or self.bias is not None:
            return super().forward(x)
        return linear(x, self.weight), None


class Column(_Alone, ColumnParallelLinear):
    """Whose rows tensor ranks share out."""


class Row(_Alone, RowParallelLinear):
    """Whose columns they share out."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight if _is_summed_by_megatron(weight) else None
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_RK, grad_RN = x.flatten(0, -2), grad.flatten(0, -2)
        if ctx.parameter is None:
            return grad @ weight, grad_RN.t() @ x_RK
        ctx.parameter.main_grad.addmm_(grad_RN.t(), x_RK)
        ctx.parameter.grad_added_to_main_grad = True
        # megatron's hook waits for a gradient, and drops this one
        return grad @ weight, torch.empty_like(weight)


def _is_summed_by_megatron(weight):
    """Whether megatron's DDP has given it a place for its gradient; Megatron FSDP makes and frees its own."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and main_grad.dtype == weight.dtype and not hasattr(weight, "__fsdp_param__")
