"""The temporal autoencoder and its losses (Movie Gen s3.1.1)."""

import math

import pytest
import torch
import torch.nn.functional as F

from nemo_moviegen.recipe import AutoencoderSize
from nemo_moviegen.tae import losses
from nemo_moviegen.tae.model import SpaceTimeConv, TemporalAutoencoder, TemporalConv

SMALL = AutoencoderSize(base_width=4, multipliers=(1, 2, 2, 3), blocks_per_level=1, latent_channels=4)
EXACT = 1e-10  # float64 and a few dozen layers


def random_video(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def autoencoder(*, fresh):
    """In float64; where not fresh, noise on every weight: the zeros and identities of the start hide bugs."""
    torch.manual_seed(0)
    model = TemporalAutoencoder(SMALL).double()
    if not fresh:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.2 * noise)
    return model


@pytest.mark.parametrize("num_frames", range(1, 18))
def test_any_number_of_frames_goes_to_an_eighth_rounded_up_and_back(num_frames):
    model = autoencoder(fresh=False)
    video = random_video(1, num_frames, 3, 16, 24)
    with torch.no_grad():
        posterior = model.encode(video)
        rebuilt = model.decode(posterior.mean_BTCHW, num_frames=num_frames)
    assert (
        posterior.mean_BTCHW.shape == posterior.logvar_BTCHW.shape == (1, math.ceil(num_frames / 8), 4, 2, 3)
    )
    assert rebuilt.shape == video.shape


def test_surplus_frames_are_those_at_the_end():
    model = autoencoder(fresh=False)
    latent = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        every = model.decode(latent)
        assert every.shape[1] == 16
        torch.testing.assert_close(model.decode(latent, num_frames=11), every[:, :11], rtol=0, atol=0)


def test_an_image_is_a_clip_of_one_frame_and_its_eight_decoded_frames_are_equal():
    """Seen to catch: replicate padding left out of the decoder (zeros at both ends)."""
    model = autoencoder(fresh=False)
    image = random_video(2, 1, 3, 16, 16)
    with torch.no_grad():
        latent = model.encode(image).mean_BTCHW
        one = model.decode(latent, num_frames=1)
        through_time = model.decoder(latent.permute(0, 1, 3, 4, 2).contiguous(), upsample_time=True)
    eight = through_time.permute(0, 1, 4, 2, 3)
    assert eight.shape[1] == 8
    torch.testing.assert_close(eight, one.expand(-1, 8, -1, -1, -1), rtol=0, atol=EXACT)


def test_a_still_clip_encodes_like_its_frame_and_decodes_to_still_frames():
    model = autoencoder(fresh=False)
    image = random_video(1, 1, 3, 16, 16)
    with torch.no_grad():
        latent = model.encode(image).mean_BTCHW
        still = model.encode(image.expand(-1, 16, -1, -1, -1)).mean_BTCHW
        rebuilt = model.decode(still)
    torch.testing.assert_close(still, latent.expand(-1, 2, -1, -1, -1), rtol=0, atol=EXACT)
    torch.testing.assert_close(rebuilt, rebuilt[:, :1].expand_as(rebuilt), rtol=0, atol=EXACT)


def test_a_fresh_model_sees_each_frame_alone():
    """Temporal layers start as the identity: latent t is that of frame 8t, which the strides keep."""
    model = autoencoder(fresh=True)
    video = random_video(1, 16, 3, 16, 16)
    with torch.no_grad():
        latent = model.encode(video).mean_BTCHW
        for t in (0, 1):
            alone = model.encode(video[:, 8 * t : 8 * t + 1]).mean_BTCHW
            torch.testing.assert_close(latent[:, t : t + 1], alone, rtol=0, atol=EXACT)


def test_a_latent_looks_both_ways_in_time():
    model = autoencoder(fresh=False)
    video = random_video(1, 24, 3, 16, 16)
    changed = video.clone()
    changed[:, 8] = -changed[:, 8]  # the first frame of the second latent
    with torch.no_grad():
        difference = (
            (model.encode(video).mean_BTCHW - model.encode(changed).mean_BTCHW).abs().amax((0, 2, 3, 4))
        )
    assert (difference > 1e-6).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9])
def test_temporal_convolution_equals_conv1d_with_replicate_padding(num_frames, kernel, stride):
    """Values and gradients. Seen to catch: the last frame's correction skipped."""
    torch.manual_seed(0)
    ours = TemporalConv(3, kernel, stride=stride).double()
    torch.nn.init.normal_(ours.conv.weight)
    x = random_video(2, num_frames, 4, 2, 3).requires_grad_()
    y = ours(x)

    x_reference = x.detach().clone().requires_grad_()
    lines = x_reference.permute(0, 2, 3, 4, 1).flatten(0, 2)  # every pixel its own line of frames
    padded = F.pad(lines, (kernel // 2, kernel // 2), mode="replicate")
    weight = ours.conv.weight.detach().clone().requires_grad_()
    reference = F.conv1d(padded, weight, ours.conv.bias.detach(), stride=stride)
    reference = reference.unflatten(0, (2, 4, 2)).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(y, reference, rtol=0, atol=EXACT)

    direction = random_video(*y.shape, seed=1)
    (y * direction).sum().backward()
    (reference * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=0, atol=EXACT)
    torch.testing.assert_close(ours.conv.weight.grad, weight.grad, rtol=0, atol=EXACT)


def test_a_temporal_convolution_follows_every_spatial_one_and_a_temporal_attention_every_spatial_one():
    model = autoencoder(fresh=True)
    spatial = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    inflated = [name for name, m in model.named_modules() if isinstance(m, SpaceTimeConv)]
    assert sorted(spatial) == sorted(f"{name}.space" for name in inflated)
    for side in (model.encoder, model.decoder):
        assert [m.over_time for m in side.middle if hasattr(m, "over_time")] == [False, True]


def test_every_parameter_gets_a_gradient():
    model = autoencoder(fresh=False)
    video = random_video(2, 9, 3, 16, 16)
    posterior = model.encode(video)
    noise = random_video(*posterior.mean_BTCHW.shape, seed=2)
    rebuilt = model.decode(posterior.sample(noise), num_frames=9)
    losses.squared_error(rebuilt, video).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):  # a bias of the keys moves every score alike
            width = parameter.shape[0] // 3
            gradient = torch.cat([parameter.grad[:width], parameter.grad[2 * width :]])
        else:
            gradient = parameter.grad
        assert gradient.abs().amax() > 0, name


def test_bfloat16_autocast_gives_nearly_the_same_reconstruction_and_gradients():
    video = random_video(1, 9, 3, 16, 16).float()
    gradients = []
    for enabled in (False, True):
        model = autoencoder(fresh=False).float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            latent = model.encode(video).mean_BTCHW
            rebuilt = model.decode(latent, num_frames=9)
        losses.squared_error(rebuilt.float(), video).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    ("video", "says"),
    [
        (torch.zeros(1, 4, 3, 20, 16), "multiples of 8"),
        (torch.zeros(1, 4, 3, 16, 12), "multiples of 8"),
        (torch.zeros(1, 4, 4, 16, 16), "height, width"),
        (torch.zeros(4, 3, 16, 16), "height, width"),
        (torch.zeros(1, 0, 3, 16, 16), "one frame or more"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), "floats"),
        (torch.full((1, 4, 3, 16, 16), 255.0), r"\[-1, 1\]"),
        (torch.full((1, 4, 3, 16, 16), math.nan), "NaN"),
        (torch.full((1, 4, 3, 16, 16), -math.inf), "infinite"),
    ],
)
def test_input_that_is_no_video_is_refused_with_what_to_change(video, says):
    with pytest.raises(ValueError, match=says):
        TemporalAutoencoder(SMALL).encode(video)


@pytest.mark.parametrize("num_frames", [0, 8, 17])
def test_a_length_the_latent_does_not_hold_is_refused(num_frames):
    with pytest.raises(ValueError, match="9 to 16 frames"):
        TemporalAutoencoder(SMALL).decode(torch.zeros(1, 2, 4, 2, 2), num_frames=num_frames)


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
