"""Losses of the temporal autoencoder that need no second network (Movie Gen s3.1.1)."""

import math

import pytest
import torch

from nemo_moviegen.tae import losses


def test_outlier_penalty_is_the_formula_of_the_paper():
    """Spelled out location by location; seen to catch: the deviation taken over channels."""
    latent = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent[:, :, :, 2, 3] *= 20
    total = 0.0
    for frame in latent.flatten(0, 1):
        mean = frame.mean((1, 2))
        limit = 3 * (frame - mean[:, None, None]).square().mean((1, 2)).sqrt().norm()
        for i in range(5):
            for j in range(6):
                total += max((frame[:, i, j] - mean).norm() - limit, 0) / 30
    assert total > 0
    assert losses.outlier_penalty(latent, 3.0) == pytest.approx(float(total / 6), abs=1e-12)


def test_outlier_penalty_of_one_spot_is_known_in_closed_form():
    # one of 64 values is d, the rest 0: mean d/64, variance d^2 (1/64)(63/64)
    latent = torch.zeros(1, 1, 1, 8, 8, dtype=torch.float64)
    latent[..., 3, 4] = 5.0
    deviation = 5 * math.sqrt(63) / 64
    assert losses.outlier_penalty(latent, 3.0) == pytest.approx((5 * 63 / 64 - 3 * deviation) / 64, abs=1e-12)


def test_outlier_penalty_of_constant_latents_is_zero_with_a_zero_gradient():
    latent = torch.ones(1, 2, 3, 4, 4, requires_grad=True)
    penalty = losses.outlier_penalty(latent)
    penalty.backward()
    assert penalty == 0
    assert (latent.grad == 0).all()


def test_outlier_penalty_grows_with_an_outlier():
    calm = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    penalties = []
    for factor in (1, 10, 20, 40):
        latent = calm.clone()
        latent[..., 0, 0] = factor
        penalties.append(float(losses.outlier_penalty(latent)))
    assert penalties[0] == 0
    assert penalties == sorted(set(penalties))


def test_kl_is_zero_for_a_unit_gaussian_and_known_for_others():
    zero = torch.zeros(1, 1, 2, 3, 3)
    assert losses.kl_loss(zero, zero) == 0
    # KL(N(2, 0.5^2) || N(0, 1)) = ln 2 + (0.25 + 4 - 1) / 2
    found = losses.kl_loss(zero + 2, zero + 2 * math.log(0.5))
    assert found == pytest.approx(math.log(2) + 1.625, rel=1e-6)


def test_reconstruction_losses_of_a_known_error():
    video = torch.zeros(1, 1, 3, 2, 2)
    assert losses.l1_loss(video + 0.2, video) == pytest.approx(0.2)
    assert losses.squared_error(video + 0.2, video) == pytest.approx(0.04)
