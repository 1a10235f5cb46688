"""Element-wise operations with gradients written down: what autograd gives, in fp64, kept for less."""

import shutil

import pytest
import torch
from torch.nn import functional

from nemo_moviegen.video import fused

S, B, D = 7, 3, 10
EPS = 1e-5


def drawn(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def by_autograd_rms_norm(x, weight):
    return functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def by_autograd_norm_modulate(x, weight, scale, shift):
    return by_autograd_rms_norm(x, weight) * (1 + scale) + shift


def by_autograd_gated_sum(hidden, branch, gate):
    return hidden + branch * gate


def by_autograd_swiglu(gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    return functional.silu(gate) * value


OPERATIONS = {
    "rms_norm": (lambda *a, **k: fused.rms_norm(*a, EPS, **k), by_autograd_rms_norm, ((S, B, D), (D,))),
    "rms_norm of heads": (
        lambda *a, **k: fused.rms_norm(*a, EPS, **k),
        by_autograd_rms_norm,
        ((S, B, 2, D), (D,)),
    ),
    "norm_modulate": (
        lambda *a, **k: fused.norm_modulate(*a, EPS, **k),
        by_autograd_norm_modulate,
        ((S, B, D), (D,), (B, D), (B, D)),
    ),
    "gated_sum": (fused.gated_sum, by_autograd_gated_sum, ((S, B, D), (S, B, D), (B, D))),
    "swiglu": (fused.swiglu, by_autograd_swiglu, ((S, B, 2 * D),)),
}
COMPILED = [name for name in OPERATIONS if name != "swiglu"]


def with_gradients(operation, inputs, **how):
    out = operation(*inputs, **how)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, torch.autograd.grad(out, inputs, weights.to(out.dtype))


@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_every_gradient_are_autograds(name):
    ours, theirs, shapes = OPERATIONS[name]
    inputs = drawn(*shapes)
    out, gradients = with_gradients(ours, inputs)
    expected, expected_gradients = with_gradients(theirs, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for own, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_and_empty_inputs_serve(name):
    """Keys are slices of a larger tensor, and a rank may hold nothing of a clip of a pack."""
    ours, theirs, ((*rows, columns), *others) = OPERATIONS[name]
    (whole, *rest) = drawn((*rows, 2 * columns), *others)
    strided = [whole[..., :columns], *rest]
    for own, other in zip(with_gradients(ours, strided)[1], with_gradients(theirs, strided)[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    empty = [x[:0] if x.dim() > 2 else x for x in drawn((*rows, columns), *others)]
    out, gradients = with_gradients(ours, empty)
    assert out.shape[0] == 0 and all(not g.abs().sum() for g in gradients)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_keeps_its_dtype_and_sums_in_fp32(name):
    ours, theirs, shapes = OPERATIONS[name]
    inputs = [x.detach().bfloat16().requires_grad_() for x in drawn(*shapes)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, gradients = with_gradients(ours, inputs)
    expected, expected_gradients = with_gradients(theirs, exact)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in gradients} == {torch.bfloat16}
    for own, other in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (own.double() - other).abs().max() < 0.03 * other.abs().max().clamp(min=1)


def kept_bytes(operation, inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        operation(*inputs)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("name", "kept"), [("norm_modulate", S * B * (D + 1) + 3 * D + B * D), ("swiglu", S * B * 2 * D)]
)
def test_what_is_kept_for_the_backward_pass(name, kept):
    ours, theirs, shapes = OPERATIONS[name]
    inputs = drawn(*shapes)
    assert kept_bytes(ours, inputs) <= 8 * kept
    assert kept_bytes(theirs, inputs) > 8 * kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_bodies_give_what_written_ones_give_for_any_number_of_tokens():
    for name in COMPILED:
        ours, _, (first, *others) = OPERATIONS[name]
        for tokens in (S, 2 * S):
            shapes = [(tokens, *shape[1:]) if len(shape) > 2 else shape for shape in (first, *others)]
            inputs = drawn(*shapes)
            out, gradients = with_gradients(ours, inputs, compiled=True)
            expected, expected_gradients = with_gradients(ours, inputs)
            for own, other in zip((out, *gradients), (expected, *expected_gradients), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
