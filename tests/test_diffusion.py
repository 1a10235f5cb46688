"""v-prediction with zero terminal SNR: its schedule, what it learns, DDIM, its place in a recipe."""

from dataclasses import replace

import pytest
import tiny
import torch

from nemo_moviegen import diffusion, flow
from nemo_moviegen.objectives import VIDEO_OBJECTIVES
from nemo_moviegen.sampling import METHODS, Sampler, method_of, step_of
from nemo_moviegen.training.step import noisy_pair
from nemo_moviegen.training_objective import OBJECTIVES
from recipes import tiny as recipes_tiny

SHAPE = (2, 3, 4, 6, 8)


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rescaled_betas():
    """Share of the data after each of 1000 steps, by the algorithm of Lin et al. (2305.08891)."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    kept = (1 - roots.square()).cumprod(0).sqrt()
    first, last = kept[0].clone(), kept[-1].clone()
    return (kept - last) * first / (first - last)


def test_the_schedule_is_the_rescaled_one_of_latent_diffusion():
    t = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert (diffusion.signal(t) - rescaled_betas()).abs().max() < 1e-3
    assert diffusion.signal(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0], "nothing left, nothing lost"
    assert (diffusion.signal(torch.linspace(0, 1, 500)).diff() > 0).all()


def test_noise_and_data_come_back_from_what_the_model_sees_and_learns():
    noise, data, t = draw(0), draw(1), torch.tensor([0.1, 0.8], dtype=torch.float64)
    x, v = diffusion.noisy_pair(noise, data, t)
    of_data = diffusion.signal(t).view(-1, 1, 1, 1, 1)
    of_noise = (1 - of_data.square()).sqrt()
    assert (of_data * x - of_noise * v - data).abs().max() < 1e-12
    assert (of_noise * x + of_data * v - noise).abs().max() < 1e-12
    at_start, v_start = diffusion.noisy_pair(noise, data, torch.zeros(2))
    assert torch.equal(at_start, noise) and torch.equal(v_start, -data)


@pytest.mark.parametrize("schedule", [flow.linear_schedule(7), flow.linear_quadratic_schedule(8, 30)])
def test_ddim_follows_the_path_of_a_known_clip_to_its_end(schedule):
    noise, data = draw(0), draw(1)

    def velocity(x, t_B):
        expected, v = diffusion.noisy_pair(noise, data, t_B)
        assert (x - expected).abs().max() < 1e-12, "on the path at every step"
        return v

    end = flow.sample(velocity, noise, schedule, step=diffusion.ddim_step)
    assert (end - data).abs().max() < 1e-12


def test_ddim_makes_the_spread_of_the_data_from_noise():
    """Of data that is normal with deviation 0.3 the best v is known; many steps give its deviation."""
    deviation = 0.3

    def best(x, t_B):
        of_data = diffusion.signal(t_B).view(-1, 1, 1, 1, 1)
        of_noise = (1 - of_data.square()).sqrt()
        spread = of_data.square() * deviation**2 + of_noise.square()
        data, noise = of_data * deviation**2 / spread * x, of_noise / spread * x
        return of_data * noise - of_noise * data

    noise = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = [
        deviation - float(flow.sample(best, noise, flow.linear_schedule(steps), step=diffusion.ddim_step))
        for steps in (500, 2000)
    ]
    assert abs(errors[1]) < 0.002
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2), "of first order"


def test_times_are_even_and_belong_to_the_sample():
    times = diffusion.draw_time(3, range(4000), [0] * 4000, torch.float64)
    assert times.min() >= 0 and times.max() < 1
    assert times.histc(8, 0, 1).sub(500).abs().max() < 100
    assert torch.equal(diffusion.draw_time(3, [17, 5], [0, 0], torch.float64), times[[17, 5]])
    assert diffusion.draw_time(3, [17], [1]) != diffusion.draw_time(3, [17], [0])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="draw the noise with the latent's"):
        diffusion.noisy_pair(draw(0), draw(1)[:, :1], torch.zeros(2))
    with pytest.raises(ValueError, match="one time a sample"):
        diffusion.noisy_pair(draw(0), draw(1), torch.zeros(3))


def test_a_recipe_names_its_objective():
    assert tuple(OBJECTIVES) == VIDEO_OBJECTIVES
    assert replace(recipes_tiny.t2i(), objective="v_prediction").objective == "v_prediction"
    with pytest.raises(ValueError, match="objective is 'x'; use flow_matching or v_prediction"):
        replace(recipes_tiny.t2i(), objective="x")


def test_the_pair_of_a_training_step_is_that_of_the_objective():
    batch = tiny.batch(3)
    x, target, t = noisy_pair(batch, 7, OBJECTIVES["v_prediction"])
    keys = batch.sample_ids, batch.epochs
    noise = flow.draw_noise(batch.latent_BTCHW.shape[1:], 7, *keys, torch.float64)
    assert torch.equal(t, diffusion.draw_time(7, *keys, torch.float64))
    of_data = diffusion.signal(t).view(-1, 1, 1, 1, 1)
    of_noise = (1 - of_data.square()).sqrt()
    assert torch.equal(x, of_data * batch.latent_BTCHW + of_noise * noise)
    assert torch.equal(target, of_data * noise - of_noise * batch.latent_BTCHW)


def test_samples_are_taken_as_the_model_was_trained():
    assert METHODS == ("euler", "midpoint", "ddim")
    assert method_of("flow_matching") == "euler" and method_of("v_prediction") == "ddim"
    assert step_of("flow_matching", "midpoint") is flow.midpoint_step
    assert Sampler(method="ddim", schedule="linear").told() == "linear, 50 DDIM steps"
    with pytest.raises(ValueError, match="was trained by v_prediction: use ddim"):
        method_of("v_prediction", "euler")
    with pytest.raises(ValueError, match="use euler or midpoint"):
        method_of("flow_matching", "ddim")
