"""From noise to a latent and to frames: guidance, keyed noise, steps, padding."""

import numpy as np
import pytest
import torch

from nemo_moviegen import flow
from nemo_moviegen.generation.generate import pad_contexts, sample_batches
from nemo_moviegen.sampling import Sampler, decode, sample_latents
from nemo_moviegen.sizes import AutoencoderSize, ContextSize
from nemo_moviegen.tae.model import TemporalAutoencoder

SIZES = (ContextSize(name="ul2", width=4, max_tokens=5), ContextSize(name="byt5", width=3, max_tokens=2))
LATENT_TCHW = (2, 16, 4, 6)


def features(value, num_tokens=3):
    return {"ul2": np.full((num_tokens, 4), value, np.float32), "byt5": np.zeros((0, 3), np.float32)}


class TowardsItsPrompt(torch.nn.Module):
    """The exact velocity of a data set whose only clip is flat: the mean of the prompt's first encoder."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def velocity(self, x_BTCHW, t_B, contexts, masks):
        self.batches.append(len(x_BTCHW))
        real = (contexts[0] * masks[0][..., None]).sum((1, 2)) / (4 * masks[0].sum(1))
        data = real.view(-1, 1, 1, 1, 1)
        t_B = t_B.float()
        noise = (x_BTCHW - t_B.view(-1, 1, 1, 1, 1) * data) / (1 - t_B * (1 - flow.SIGMA_MIN)).view(
            -1, 1, 1, 1, 1
        )
        return flow.velocity_target(noise, data.expand_as(noise))


def sample(model, values, *, seed=0, batch_size=4, guidance_scale=1.0, num_steps=10, **more):
    """Latents [B, T, C, H, W] of prompts that each ask for one value."""
    sampler = Sampler(
        seed=seed, batch_size=batch_size, guidance_scale=guidance_scale, num_steps=num_steps, **more
    )
    batches = sample_batches(
        model,
        dict(enumerate(features(value) for value in values)),
        features(0.0, num_tokens=1),
        SIZES,
        LATENT_TCHW,
        sampler=sampler,
    )
    return torch.cat([latent_BTCHW for _, latent_BTCHW in batches])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "rk4"}, "method is 'rk4'; use euler or midpoint"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; use linear-quadratic or linear"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; use a number from 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "leaves the negative prompt 'fog' out"),
        ({"num_steps": 0}, "0 steps cannot emulate"),
        ({"num_steps": 0, "schedule": "linear"}, "a schedule of 0 steps"),
        ({"num_steps": 300}, "300 steps cannot emulate 250"),
    ],
)
def test_a_sampler_that_can_not_be_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**changed)


def test_a_sampler_has_the_times_and_the_words_of_its_schedule():
    paper = Sampler()
    assert torch.equal(paper.times(), flow.linear_quadratic_schedule(50, 250))
    assert paper.told() == "linear-quadratic, 50 Euler steps emulating 250"
    linear = Sampler(schedule="linear", num_steps=64, method="midpoint")
    assert torch.equal(linear.times(), flow.linear_schedule(64))
    assert linear.told() == "linear, 64 midpoint steps"


def test_midpoint_calls_the_model_twice_a_step_and_is_of_second_order():
    """dx/dt = x: the exact factor is e. Halving the step divides Euler's error by 2, midpoint's by 4."""

    class Grows(TowardsItsPrompt):
        def velocity(self, x_BTCHW, t_B, contexts, masks):
            self.batches.append(len(x_BTCHW))
            return x_BTCHW

    errors = {}
    for method in ("euler", "midpoint"):
        for num_steps in (10, 20):
            model = Grows()
            noise = flow.draw_noise(LATENT_TCHW, 0, [0], [0])
            made = sample(model, [1.0], method=method, schedule="linear", num_steps=num_steps)
            errors[method, num_steps] = float((made / noise - np.e).abs().max())
            assert len(model.batches) == num_steps * (2 if method == "midpoint" else 1)
    assert errors["euler", 10] / errors["euler", 20] == pytest.approx(2, rel=0.1)
    assert errors["midpoint", 10] / errors["midpoint", 20] == pytest.approx(4, rel=0.1)


def test_every_sample_arrives_at_its_own_prompt():
    latents = sample(TowardsItsPrompt(), [0.5, -2.0, 3.0], batch_size=2)
    assert latents.shape == (3, *LATENT_TCHW)
    for latent, value in zip(latents, [0.5, -2.0, 3.0], strict=True):
        torch.testing.assert_close(latent, torch.full_like(latent, value), atol=1e-3, rtol=0)


def test_prompted_and_empty_halves_share_one_batch():
    model = TowardsItsPrompt()
    sample(model, [1.0, 2.0, 3.0], batch_size=2, num_steps=4)
    assert model.batches == [4] * 4 + [2] * 4


def test_guidance_goes_beyond_the_prompt_away_from_the_empty_one():
    def velocity(x_BTCHW, t_B, contexts, masks):
        return contexts[0][:, 0, 0].view(-1, 1, 1, 1, 1).expand_as(x_BTCHW)

    noise = torch.zeros(2, *LATENT_TCHW)
    latents = sample_latents(
        velocity,
        noise,
        pad_contexts([features(2.0)] * 2, SIZES),
        pad_contexts([features(0.5)] * 2, SIZES),
        schedule=flow.linear_schedule(3),
        guidance_scale=4.0,
    )
    torch.testing.assert_close(latents, torch.full_like(latents, 0.5 + 4.0 * 1.5))


def test_a_sample_depends_on_seed_and_number_but_not_on_the_batch():
    class Still(TowardsItsPrompt):
        def velocity(self, x_BTCHW, t_B, contexts, masks):
            return torch.zeros_like(x_BTCHW)

    alone, together = (sample(Still(), [1.0] * 3, batch_size=size) for size in (1, 3))
    assert torch.equal(alone, together)
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone, sample(Still(), [1.0] * 3, seed=1))


def test_padding_is_masked_and_an_encoder_may_see_no_token():
    contexts, masks = pad_contexts([features(1.0, 2), features(2.0, 5)], SIZES)
    assert [tuple(c.shape) for c in contexts] == [(2, 5, 4), (2, 2, 3)]
    assert masks[0].tolist() == [[True, True, False, False, False], [True] * 5]
    assert not masks[1].any()
    assert contexts[0][0, 2:].abs().max() == 0


def test_features_of_other_encoders_are_refused():
    with pytest.raises(ValueError, match=r"ul2 have shape \[3, 7\]"):
        pad_contexts([{**features(1.0), "ul2": np.zeros((3, 7))}], SIZES)


def test_decoding_undoes_the_normalisation_of_each_channel():
    autoencoder = TemporalAutoencoder(AutoencoderSize(base_width=4, multipliers=(1, 1, 1, 1))).eval()
    mean, std = torch.arange(16.0), torch.arange(16.0) + 1
    latent = torch.randn(LATENT_TCHW, generator=torch.Generator().manual_seed(0))
    chunks = list(decode(autoencoder, latent, mean, std, num_frames=11))
    raw = latent * std[:, None, None] + mean[:, None, None]
    with torch.no_grad():
        expected = autoencoder.decode(raw[None], num_frames=11)[0].clamp(-1, 1)
    assert len(chunks) > 1 and expected.abs().max() == 1
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=0, atol=1e-4)
