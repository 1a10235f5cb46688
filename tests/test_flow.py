"""Flow matching: the path, its velocity, time, noise, schedules, solvers, guidance (s3.1.2, s3.4)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen import flow

CASES = settings(derandomize=True, deadline=None, max_examples=50)
ROUNDING = 1e-12  # float64 sums of a few terms about one
SHAPE = (3, 4, 2, 6)

# Spec 5, first and second half of the 50 steps that stand for N = 250.
LINEAR_250 = [k * 0.004 for k in range(26)]
QUADRATIC_250 = [
    0.10528,
    0.11312,
    0.12352,
    0.13648,
    0.152,
    0.17008,
    0.19072,
    0.21392,
    0.23968,
    0.268,
    0.29888,
    0.33232,
] + [
    0.36832,
    0.40688,
    0.448,
    0.49168,
    0.53792,
    0.58672,
    0.63808,
    0.692,
    0.74848,
    0.80752,
    0.86912,
    0.93328,
    1.0,
]


def pair(seed=0, batch=2):
    noise = flow.draw_noise(SHAPE, seed, range(batch), [0] * batch, torch.float64)
    return noise, flow.draw_noise(SHAPE, seed + 1, range(batch), [0] * batch, torch.float64)


def test_time_zero_is_noise_and_time_one_is_data_with_sigma_min_of_noise():
    noise, data = pair()
    assert torch.equal(flow.interpolate(noise, data, torch.zeros(2, dtype=torch.float64)), noise)
    at_one = flow.interpolate(noise, data, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(at_one - data, 1e-5 * noise, rtol=0, atol=1e-14)


@CASES
@given(t=st.floats(0.01, 0.99), seed=st.integers(0, 10**6))
def test_velocity_is_the_time_derivative_of_the_path(t, seed):
    noise, data = pair(seed)
    times = torch.full((2,), t, dtype=torch.float64)
    step = 2.0**-10
    difference = flow.interpolate(noise, data, times + step) - flow.interpolate(noise, data, times - step)
    torch.testing.assert_close(difference / (2 * step), flow.velocity_target(noise, data), rtol=0, atol=1e-11)


def test_each_sample_of_a_batch_has_its_own_time():
    noise, data = pair()
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    both = flow.interpolate(noise, data, t)
    for row in range(2):
        alone = flow.interpolate(noise[row : row + 1], data[row : row + 1], t[row : row + 1])
        assert torch.equal(both[row : row + 1], alone)


def test_wrong_shapes_are_refused():
    noise, data = pair()
    with pytest.raises(ValueError, match="draw the noise with the latent"):
        flow.velocity_target(noise[:1], data)
    with pytest.raises(ValueError, match="one time a sample"):
        flow.interpolate(noise, data, torch.zeros(3))
    with pytest.raises(ValueError, match="one epoch for each sample"):
        flow.draw_noise(SHAPE, 0, [1, 2], [0])


def test_time_is_logit_normal():
    t = flow.draw_time(0, range(4000), [0] * 4000, torch.float64)
    assert t.min() > 0 and t.max() < 1
    logits = (t / (1 - t)).log()
    # standard errors of 4,000 draws: mean 0.016, deviation 0.011
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.05
    share_in_one_sigma = (logits.abs() < 1).double().mean()
    assert abs(share_in_one_sigma - math.erf(math.sqrt(0.5))) < 0.03


def test_noise_is_standard_normal():
    noise = flow.draw_noise((4, 16, 16, 16), 3, range(8), [0] * 8)
    assert (
        abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    )  # 131,072 draws: 3.6 standard errors or more
    assert noise.dtype == torch.float32 and noise.shape == (8, 4, 16, 16, 16)


@CASES
@given(
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=5, unique=True),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**31),
)
def test_noise_and_time_of_a_sample_do_not_depend_on_its_batch(ids, epoch, seed):
    epochs = [epoch] * len(ids)
    noise = flow.draw_noise(SHAPE, seed, torch.tensor(ids), torch.tensor(epochs))
    times = flow.draw_time(seed, ids, epochs)
    for row in reversed(range(len(ids))):
        assert torch.equal(noise[row], flow.draw_noise(SHAPE, seed, [ids[row]], [epoch])[0])
        assert torch.equal(times[row], flow.draw_time(seed, [ids[row]], [epoch])[0])
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("changed", [{"seed": 8}, {"sample_id": 6}, {"epoch": 2}, {"purpose": "time"}])
def test_random_numbers_change_with_each_part_of_the_key(changed):
    key = {"seed": 7, "sample_id": 5, "epoch": 1, "purpose": "noise"}
    first = flow.sample_generator(**key).random(4)
    assert (first == flow.sample_generator(**key).random(4)).all()
    assert (first != flow.sample_generator(**key | changed).random(4)).all()


def test_the_time_of_a_sample_says_nothing_about_its_noise():
    t = flow.draw_time(0, range(2000), [0] * 2000, torch.float64)
    noise = flow.draw_noise((1, 1, 1, 2), 0, range(2000), [0] * 2000, torch.float64).flatten(1)
    for first in noise.T:
        correlation = torch.corrcoef(torch.stack([t.logit(), first]))[0, 1]
        assert abs(correlation) < 0.1  # 2,000 draws: 4.5 standard errors


def test_keys_do_not_run_into_each_other():
    first, second = flow.sample_generator(1, 11, 1, "noise"), flow.sample_generator(11, 1, 1, "noise")
    assert first.random() != second.random()


def test_noise_is_the_same_number_in_every_dtype_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    wide = flow.draw_noise(SHAPE, 0, [4], [2], torch.float64)
    assert torch.equal(torch.rand(3), expected)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(flow.draw_noise(SHAPE, 0, [4], [2], dtype), wide.to(dtype))


def test_linear_quadratic_schedule_has_the_values_of_250_emulated_steps():
    schedule = flow.linear_quadratic_schedule()
    expected = torch.tensor(LINEAR_250 + QUADRATIC_250, dtype=torch.float64)
    assert schedule.dtype == torch.float64 and schedule.shape == (51,)
    torch.testing.assert_close(schedule, expected, rtol=0, atol=1e-12)


@CASES
@given(num_steps=st.integers(1, 120), extra=st.integers(0, 900))
def test_linear_quadratic_schedule_rises_from_noise_to_data(num_steps, extra):
    emulated = num_steps + extra
    schedule = flow.linear_quadratic_schedule(num_steps, emulated)
    steps = schedule.diff()
    assert schedule.shape == (num_steps + 1,)
    assert schedule[0] == 0 and schedule[-1] == 1 and (steps > 0).all()
    half = num_steps // 2
    torch.testing.assert_close(
        schedule[: half + 1], flow.linear_schedule(emulated)[: half + 1], rtol=0, atol=ROUNDING
    )
    # C1: a parabola through the second half has the linear slope where it starts
    if num_steps - half >= 2:
        slope_at_start = (4 * schedule[half + 1] - schedule[half + 2] - 3 * schedule[half]) / 2
        torch.testing.assert_close(slope_at_start.item(), 1 / emulated, rtol=0, atol=1e-10)


def test_a_schedule_that_takes_more_steps_than_it_emulates_is_refused():
    with pytest.raises(ValueError, match="cannot emulate"):
        flow.linear_quadratic_schedule(50, 40)
    with pytest.raises(ValueError, match="1 step or more"):
        flow.linear_schedule(0)


@CASES
@given(num_steps=st.integers(2, 60), seed=st.integers(0, 10**6))
def test_euler_is_exact_on_the_true_path_whatever_the_schedule(num_steps, seed):
    noise, data = pair(seed)
    velocity = flow.velocity_target(noise, data)
    arrived = flow.sample(lambda x, t: velocity, noise, flow.linear_quadratic_schedule(num_steps, 250))
    torch.testing.assert_close(arrived, data + 1e-5 * noise, rtol=0, atol=ROUNDING)


def test_midpoint_is_exact_for_a_velocity_linear_in_time_and_euler_is_not():
    noise = torch.zeros(1, 2, 1, 1, 1, dtype=torch.float64)
    schedule = flow.linear_schedule(4)

    def velocity(x, t):  # x(1) = 1
        return (2 * t).view(-1, 1, 1, 1, 1).expand_as(x)

    torch.testing.assert_close(
        flow.sample(velocity, noise, schedule, step=flow.midpoint_step), noise + 1, rtol=0, atol=ROUNDING
    )
    # by hand: 0.25 * (0 + 0.5 + 1 + 1.5)
    torch.testing.assert_close(flow.sample(velocity, noise, schedule), noise + 0.75, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("step, order", [(flow.euler_step, 1), (flow.midpoint_step, 2)])
def test_solvers_converge_with_their_order(step, order):
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = [
        abs(flow.sample(lambda x, t: x, start, flow.linear_schedule(n), step=step).item() - math.e)
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_sampling_tells_the_model_the_time_of_every_step():
    seen = []

    def velocity(x, t_B):
        seen.append((t_B.dtype, t_B.shape, t_B[0].item()))
        return torch.zeros_like(x)

    noise = torch.zeros(3, *SHAPE, dtype=torch.bfloat16)
    result = flow.sample(velocity, noise, torch.tensor([0.0, 0.25, 1.0]), progress=lambda steps: steps)
    assert seen == [(torch.float32, (3,), 0.0), (torch.float32, (3,), 0.25)]
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("schedule", [[1.0, 0.0], [0.0, 0.5], [0.0, 0.6, 0.6, 1.0], [0.0]])
def test_a_schedule_that_does_not_rise_from_noise_to_data_is_refused(schedule):
    with pytest.raises(ValueError, match="does not rise from 0"):
        flow.sample(lambda x, t: x, torch.zeros(1, *SHAPE), torch.tensor(schedule))


def test_guidance_one_is_conditional_zero_unconditional_and_more_goes_beyond():
    conditional, unconditional = pair()
    assert torch.equal(flow.guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(
        flow.guide(conditional, unconditional, 0.0), unconditional, rtol=0, atol=ROUNDING
    )
    expected = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(flow.guide(conditional, unconditional, 7.5), expected, rtol=0, atol=ROUNDING)
