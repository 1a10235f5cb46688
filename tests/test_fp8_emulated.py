"""Emulated FP8: values that FP8 has, scales as they should be, products and gradients near those of bf16."""

import pytest
import torch
from ranks import run_on_ranks

from nemo_moviegen.video.fp8_emulated import FORMATS, Scaling, emulated_linear, in_bf16

KINDS = ("fp8_delayed", "fp8_current", "fp8_block")


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def e4m3(x):
    """Nearest e4m3 number of each value by its definition: 3 bits of mantissa, exponents from -6, at most
    448."""
    x = x.double().clamp(-448, 448)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return torch.round(x / step) * step  # torch.round: to even


def test_values_are_those_of_e4m3():
    x = torch.cat([values(64, 64) * 10.0**power for power in range(-6, 3)])
    rounded = (x.clamp(-448, 448)).to(FORMATS["input"]).double()
    assert torch.equal(rounded, e4m3(x))


@pytest.mark.parametrize("operand", FORMATS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_nothing_is_cut_off_and_the_error_is_half_a_step(kind, operand):
    x = values(256, 384) * torch.logspace(-3, 3, 384)
    scaling = Scaling(kind)
    scale = scaling.scale_of(x, operand)
    limit = torch.finfo(FORMATS[operand]).max
    assert (x * scale).abs().max() <= limit * (1 + 1e-6)
    digits = 3 if operand != "gradient" else 2
    normal = (x * scale).abs() >= torch.finfo(FORMATS[operand]).tiny
    error = ((scaling.rounded(x, operand) - x) / x).abs()[normal]
    assert error.max() <= 2.0 ** -(digits + 1) * (1 + 1e-6)


def test_blocks_lie_along_the_inner_axis_and_scale_by_powers_of_two():
    x = torch.ones(200, 300)
    x[:, :128] = 1000.0
    x[5, 250] = 3.0
    scaling = Scaling("fp8_block")
    rows, columns, square = (
        scaling.scale_of(x, "input"),
        scaling.scale_of(x, "input", axis=0),
        scaling.scale_of(x, "weight"),
    )
    assert torch.equal(torch.log2(rows), torch.log2(rows).round())
    assert rows[0, 0] == 0.25 and rows[0, 130] == 256 and rows[5, 130] == 128  # 448 / 1000, / 1, / 3
    assert columns[0, 0] == 0.25 and columns[130, 250] == 256 and columns[0, 250] == 128
    assert square[0, 0] == 0.25 and square[0, 130] == 128 and square[130, 130] == 256


def test_a_block_of_outliers_costs_the_others_nothing():
    """What block scaling is for."""
    x = values(256, 256)
    x[:, :128] *= 1e5
    small = x[:, 128:]

    def error(kind):
        return ((Scaling(kind).rounded(x, "input")[:, 128:] - small).norm() / small.norm()).item()

    assert error("fp8_block") < 0.05 < 0.5 < error("fp8_current")


def test_delayed_scales_are_those_of_the_products_before_and_what_is_new_is_cut_off():
    scaling = Scaling("fp8_delayed")
    operands = {"input": torch.full((8, 8), 2.0), "weight": torch.ones(8, 8), "gradient": torch.ones(8, 8)}
    assert scaling.scale_of(operands["input"], "input").item() == 1
    scaling.remember(operands)
    assert scaling.scale_of(operands["input"], "input").item() == 224
    assert scaling.scale_of(operands["gradient"], "gradient").item() == 57344
    assert scaling.rounded(torch.full((8, 8), 50.0), "input").unique().tolist() == [2.0]
    scaling.remember(operands | {"input": torch.full((8, 8), 50.0)})
    scaling.remember(operands)
    assert scaling.scale_of(operands["input"], "input").item() == pytest.approx(448 / 50)
    for _ in range(1024):
        scaling.remember(operands)
    assert scaling.scale_of(operands["input"], "input").item() == 224


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_infinities_leave_the_scale_alone(kind):
    scaling = Scaling(kind)
    zero = torch.zeros(8, 16)
    scaling.remember(dict.fromkeys(FORMATS, zero))
    assert torch.equal(scaling.rounded(zero, "input"), zero)
    assert torch.equal(scaling.scale_of(zero, "input").unique(), torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_rounded_operands(kind, dtype):
    x, weight, grad = values(6, 40, 48, dtype=dtype), values(32, 48, seed=1, dtype=dtype), values(6, 40, 32)
    x.requires_grad_(), weight.requires_grad_()
    scaling = Scaling(kind)
    for _ in range(2):  # delayed scaling learns from the first
        x.grad = weight.grad = None
        known = Scaling(kind, {name: list(largest) for name, largest in scaling.largest.items()})
        out = emulated_linear(x, weight, scaling)
        out.backward(grad.to(dtype))
    flat, grad_RN = x.detach().flatten(0, 1), grad.to(dtype).flatten(0, 1)
    own = {"input": known.rounded(flat, "input"), "weight": known.rounded(weight.detach(), "weight")}
    expected = own["input"] @ own["weight"].t()
    assert out.dtype == dtype and torch.equal(out.detach().flatten(0, 1), expected.to(dtype))
    assert torch.equal(x.grad.flatten(0, 1), (known.rounded(grad_RN, "gradient") @ own["weight"]).to(dtype))
    columns = known.rounded(grad_RN, "gradient", axis=0).t() @ known.rounded(flat, "input", axis=0)
    assert torch.equal(weight.grad, columns.to(dtype))
    plain = torch.nn.functional.linear(x.float(), weight.float())
    assert 0.01 < ((out - plain).norm() / plain.norm()).item() < 0.06


def test_it_is_switched_off_where_bf16_is_measured():
    x, weight = values(4, 16), values(8, 16, seed=1)
    with in_bf16():
        assert torch.equal(emulated_linear(x, weight, Scaling("fp8_current")), x @ weight.t())
    assert not torch.equal(emulated_linear(x, weight, Scaling("fp8_current")), x @ weight.t())


def remembered_on_ranks():
    from megatron.core import parallel_state

    from nemo_moviegen.training.cpu import stand_in_for_cuda

    stand_in_for_cuda()
    parallel_state.initialize_model_parallel()
    scaling, rank = Scaling("fp8_delayed"), torch.distributed.get_rank()
    scaling.remember({name: torch.full((2, 2), float(1 + rank)) for name in FORMATS})
    return scaling.largest


def test_all_ranks_remember_the_largest_of_all():
    assert run_on_ranks(remembered_on_ranks) == [{name: [2.0] for name in FORMATS}] * 2
