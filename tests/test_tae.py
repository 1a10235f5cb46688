"""The temporal autoencoder: what becomes of frames, what a fresh one does, parts and gradients (s3.1.1)."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from autoencoders import EXACT, KINDS, autoencoder, random_latent, random_video, shared, small

from nemo_moviegen.sizes import AutoencoderSize
from nemo_moviegen.tae import losses
from nemo_moviegen.tae.layers import Attention, ResBlock, SpaceTimeConv, TemporalAttention, TemporalConv
from nemo_moviegen.tae.model import TemporalAutoencoder


@pytest.mark.parametrize("num_frames", range(1, 18))
def test_any_number_of_frames_goes_to_an_eighth_rounded_up_and_back(num_frames):
    model = shared()
    video = random_video(1, num_frames, 3, 16, 24)
    posterior = model.encode(video)
    rebuilt = model.decode(posterior.mean_BTCHW, num_frames=num_frames)
    assert (
        posterior.mean_BTCHW.shape == posterior.logvar_BTCHW.shape == (1, math.ceil(num_frames / 8), 4, 2, 3)
    )
    assert rebuilt.shape == video.shape


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize(("inflation", "compression"), KINDS)
def test_every_inflation_and_compression_keeps_any_number_of_frames(inflation, compression, channels):
    """Seen to catch: eight frames a latent, whatever the compression."""
    size = small(inflation=inflation, temporal_compression=compression, latent_channels=channels)
    model = autoencoder(size).requires_grad_(False)
    for num_frames in range(1, 2 * compression + 2):
        video = random_video(1, num_frames, 3, 8, 16)
        latent = model.encode(video).mean_BTCHW
        assert latent.shape == (1, math.ceil(num_frames / compression), channels, 1, 2)
        every = model.decode(latent)
        assert every.shape == (1, compression * latent.shape[1], 3, 8, 16)
        kept = model.decode(latent, num_frames=num_frames)
        torch.testing.assert_close(kept, every[:, :num_frames], rtol=0, atol=0)


def test_surplus_frames_are_those_at_the_end():
    model = shared()
    latent = random_latent(1, 2, 4, 2, 2)
    every = model.decode(latent)
    assert every.shape[1] == 16
    torch.testing.assert_close(model.decode(latent, num_frames=11), every[:, :11], rtol=0, atol=0)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
@pytest.mark.parametrize(
    ("compression", "frames"), [(8, (8, 4, 2)), (4, (16, 8, 4)), (2, (16, 16, 8)), (1, (16, 16, 16))]
)
def test_frames_are_halved_at_the_last_places_that_halve_pixels(inflation, compression, frames):
    """And doubled at the first of the decoder.

    Seen to catch: strides in reverse, in encoder or decoder; frames doubled at every level.
    """
    model, seen = autoencoder(small(inflation=inflation, temporal_compression=compression)), []
    places = [model.encoder.levels[i][-1] for i in range(3)] + [model.decoder.levels[i].up for i in range(3)]
    for place in places:
        place.register_forward_hook(lambda module, x, y: seen.append(y.shape[1:4]))
    latent = model.encode(random_video(1, 16, 3, 8, 16)).mean_BTCHW
    model.decode(latent)
    assert [h for _, h, _ in seen] == [4, 2, 1, 2, 4, 8]
    assert tuple(t for t, _, _ in seen[:3]) == frames
    assert tuple(t for t, _, _ in seen[3:]) == (*frames[1::-1], 16)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_an_image_is_a_clip_of_one_frame_and_its_eight_decoded_frames_are_equal(inflation):
    """Seen to catch: replicate padding left out of the decoder (zeros at both ends)."""
    model = shared(inflation)
    image = random_video(2, 1, 3, 16, 16)
    latent = model.encode(image).mean_BTCHW
    one = model.decode(latent, num_frames=1)
    through_time = model.decoder(latent.permute(0, 1, 3, 4, 2).contiguous(), upsample_time=True)
    eight = through_time.permute(0, 1, 4, 2, 3)
    assert eight.shape[1] == 8
    torch.testing.assert_close(eight, one.expand(-1, 8, -1, -1, -1), rtol=0, atol=EXACT)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_a_still_clip_encodes_like_its_frame_and_decodes_to_still_frames(inflation):
    model = shared(inflation)
    image = random_video(1, 1, 3, 16, 16)
    latent = model.encode(image).mean_BTCHW
    still = model.encode(image.expand(-1, 16, -1, -1, -1)).mean_BTCHW
    rebuilt = model.decode(still)
    torch.testing.assert_close(still, latent.expand(-1, 2, -1, -1, -1), rtol=0, atol=EXACT)
    torch.testing.assert_close(rebuilt, rebuilt[:, :1].expand_as(rebuilt), rtol=0, atol=EXACT)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_a_fresh_model_sees_each_frame_alone(inflation):
    """Temporal layers start as the identity: latent t is that of frame 8t, which the strides keep.

    Seen to catch: 3D kernels whose first tap in time, not the middle one, holds the image.
    """
    model = autoencoder(small(inflation=inflation), fresh=True).requires_grad_(False)
    video = random_video(1, 16, 3, 16, 16)
    latent = model.encode(video).mean_BTCHW
    for t in (0, 1):
        alone = model.encode(video[:, 8 * t : 8 * t + 1]).mean_BTCHW
        torch.testing.assert_close(latent[:, t : t + 1], alone, rtol=0, atol=EXACT)


def test_a_2d_model_sees_each_frame_alone_whatever_its_weights():
    """Seen to catch: temporal attention left in the 2D model."""
    model = shared("2D", 1)
    video = random_video(2, 5, 3, 16, 16)
    latent = model.encode(video).mean_BTCHW
    rebuilt = model.decode(latent)
    for t in range(5):
        alone = model.encode(video[:, t : t + 1]).mean_BTCHW
        torch.testing.assert_close(latent[:, t : t + 1], alone, rtol=0, atol=EXACT)
        torch.testing.assert_close(rebuilt[:, t : t + 1], model.decode(alone), rtol=0, atol=EXACT)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_a_latent_looks_both_ways_in_time(inflation):
    model = shared(inflation)
    video = random_video(1, 24, 3, 16, 16)
    changed = video.clone()
    changed[:, 8] = -changed[:, 8]  # the first frame of the second latent
    difference = (model.encode(video).mean_BTCHW - model.encode(changed).mean_BTCHW).abs().amax((0, 2, 3, 4))
    assert (difference > 1e-6).all()


def test_a_temporal_convolution_follows_every_spatial_one_and_a_temporal_attention_every_spatial_one():
    model = autoencoder(fresh=True)
    spatial = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    inflated = [name for name, m in model.named_modules() if isinstance(m, SpaceTimeConv)]
    assert sorted(spatial) == sorted(f"{name}.space" for name in inflated)
    assert all(isinstance(model.get_submodule(name).time, TemporalConv) for name in inflated)
    for side in (model.encoder, model.decoder):
        kinds = [type(layer) for layer in side.middle.layers()]
        assert kinds == [ResBlock, Attention, TemporalAttention, ResBlock]


def test_inflations_differ_in_their_convolutions_over_time_and_2d_has_nothing_over_time():
    """Seen to catch: temporal convolutions after those of 3D."""
    found = {}
    for inflation, compression in (("2D", 1), ("2.5D", 8), ("3D", 8)):
        model = autoencoder(small(inflation=inflation, temporal_compression=compression), fresh=True)
        found[inflation] = Counter(type(m).__name__ for m in model.modules())
    num_convs = found["2D"]["Conv2d"]
    for inflation, counts in (
        ("2D", (num_convs, 0, 0, 0)),
        ("2.5D", (num_convs, num_convs, 0, 2)),
        ("3D", (0, 0, num_convs, 2)),
    ):
        kinds = ("Conv2d", "Conv1d", "Conv3d", "TemporalAttention")
        assert tuple(found[inflation][kind] for kind in kinds) == counts, inflation


def _loss(model, video, num_frames=9):
    posterior = model.encode(video)
    noise = random_video(*posterior.mean_BTCHW.shape, seed=2)
    rebuilt = model.decode(posterior.sample(noise), num_frames=num_frames)
    return losses.squared_error(rebuilt, video)


@pytest.mark.parametrize(("inflation", "compression"), [("2D", 1), ("2.5D", 8), ("3D", 8)])
def test_every_parameter_gets_a_gradient(inflation, compression):
    model = autoencoder(small(inflation=inflation, temporal_compression=compression))
    _loss(model, random_video(2, 9, 3, 16, 16)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):  # a bias of the keys moves every score alike
            width = parameter.shape[0] // 3
            gradient = torch.cat([parameter.grad[:width], parameter.grad[2 * width :]])
        else:
            gradient = parameter.grad
        assert gradient.abs().amax() > 0, name


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_recomputation_gives_the_same_gradients_and_keeps_less(inflation):
    """Seen to catch: a recomputation that is never switched on; one without the decoder."""
    video, gradients, kept = random_video(2, 9, 3, 16, 16), [], []
    for on in (False, True):
        model, saved = autoencoder(small(inflation=inflation)), {}
        model.recompute(on)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x, saved=saved, weights=weights):
            address = x.untyped_storage().data_ptr()
            saved[address] = 0 if address in weights else x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            latent = model.encode(video).mean_BTCHW
            half = sum(saved.values())
            rebuilt = model.decode(latent, num_frames=9)
        kept.append((half, sum(saved.values()) - half))
        losses.squared_error(rebuilt, video).backward()
        gradients.append([p.grad for p in model.encoder.parameters()])
        gradients[-1] += [p.grad for p in model.decoder.parameters()]
    assert all(map(torch.equal, *gradients))
    (encoder, decoder), (encoder_again, decoder_again) = kept
    assert encoder_again < 0.5 * encoder and decoder_again < 0.5 * decoder


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_bfloat16_autocast_gives_nearly_the_same_reconstruction_and_gradients(inflation):
    video = random_video(1, 9, 3, 16, 16).float()
    gradients, latents = [], []
    for enabled in (False, True):
        model = autoencoder(small(inflation=inflation)).float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            latent = model.encode(video).mean_BTCHW
            rebuilt = model.decode(latent, num_frames=9)
        losses.squared_error(rebuilt.float(), video).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        latents.append(latent)
    assert [latent.dtype for latent in latents] == [torch.float32, torch.bfloat16]
    assert F.cosine_similarity(*gradients, dim=0) > 0.98  # bfloat16 keeps 8 bits


def _convolution(inputs, outputs):
    return 9 * inputs * outputs + outputs


def _image_parameters(latent_channels):
    """Of LDM's autoencoder with this size: kernels of 3x3, one of 1x1 before the decoder, and the outputs."""

    def block(i, o):
        shortcut = i * o + o if i != o else 0
        return 2 * i + _convolution(i, o) + 2 * o + _convolution(o, o) + shortcut

    def middle(width):
        return 2 * block(width, width) + attention(width)

    def attention(width):
        return 2 * width + 4 * (width * width + width)  # norm; queries, keys, values and output

    encoder, outputs = _convolution(3, 128), [128]
    for i, o in ((128, 128), (128, 256), (256, 512), (512, 512)):
        encoder += block(i, o) + block(o, o)
        outputs += 4 * [o]
    for width in (128, 256, 512):
        encoder += _convolution(width, width)
        outputs += [width]
    encoder += middle(512) + 2 * 512 + _convolution(512, 2 * latent_channels)
    outputs += 4 * [512] + [2 * latent_channels]
    decoder = latent_channels * latent_channels + latent_channels
    decoder += _convolution(latent_channels, 512) + middle(512)
    outputs += [512] + 4 * [512]
    for i, o in ((512, 512), (512, 512), (512, 256), (256, 128)):
        decoder += block(i, o) + 2 * block(o, o)
        outputs += 6 * [o]
    for width in (512, 512, 256):
        decoder += _convolution(width, width)
        outputs += [width]
    return encoder + decoder + 2 * 128 + _convolution(128, 3), [*outputs, 3], attention(512)


def _count(**changes):
    with torch.device("meta"):
        return sum(p.numel() for p in TemporalAutoencoder(AutoencoderSize(**changes)).parameters())


def test_the_image_model_has_the_parameters_of_ldms_autoencoder():
    """That of Stable Diffusion has 83,653,863, of them 72 in a 1x1 convolution after the encoder.

    Seen to catch: one more convolution of one tap.
    """
    assert _image_parameters(4)[0] == 83_653_863 - 72
    assert _count(inflation="2D", temporal_compression=1, latent_channels=4) == 83_653_863 - 72


def test_the_production_size_has_114_million_parameters():
    """LDM's, a convolution of three frames over the outputs of each of its, and two temporal attentions.

    3D has three times the 3x3 kernels instead. Temporal strides cost nothing.

    Seen to catch: a kernel of five frames.
    """
    image, outputs, attention = _image_parameters(16)
    over_time = sum(3 * o * o + o for o in outputs)
    assert image + over_time + 2 * attention == 114_062_321
    assert _count() == _count(temporal_compression=4) == 114_062_321
    assert _count(inflation="2D", temporal_compression=1) == image
