"""The product of a rank that shares no matrices: torch's, and its weight's gradient where megatron wants
it."""

import pytest
import torch
from torch.nn import functional

from nemo_moviegen.video.linear import linear


def drawn(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rows", [(6,), (5, 3), (0, 2)])
def test_value_and_gradients_are_torchs(dtype, tolerance, rows):
    x, weight = drawn(dtype, (*rows, 300), (70, 300))
    grad = torch.randn((*rows, 70), generator=torch.Generator().manual_seed(1), dtype=dtype)
    for operation in (linear, functional.linear):
        out = operation(x, weight)
        found = (out, *torch.autograd.grad(out, (x, weight), grad))
        if operation is linear:
            ours = found
    for own, other in zip(ours, found, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_weights_gradient_is_added_to_megatrons_sum_over_micro_batches(dtype):
    first, second, weight = drawn(dtype, (5, 3, 8), (2, 3, 8), (4, 8))
    expected = torch.autograd.grad(
        sum(functional.linear(x, weight).square().sum() for x in (first, second)), weight
    )
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    for x in (first, second):
        linear(x, weight).square().sum().backward()
        # megatron's hook drops what it is handed, and adds it where the flag is not set
        assert weight.grad_added_to_main_grad and weight.grad is not None
        weight.grad = None
    torch.testing.assert_close(weight.main_grad, *expected, rtol=1e-5, atol=1e-5)


def test_bf16_and_other_sums_are_left_to_torch_and_megatron():
    x, weight = drawn(torch.bfloat16, (5, 8), (4, 8))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(4, 8), False
    linear(x, weight).sum().backward()
    assert not weight.grad_added_to_main_grad and weight.grad is not None
    x, weight = drawn(torch.float32, (5, 8), (4, 8))
    weight.main_grad, weight.__fsdp_param__ = torch.zeros(4, 8), True  # Megatron FSDP's come and go
    linear(x, weight).sum().backward()
    assert not weight.main_grad.any() and weight.grad is not None
