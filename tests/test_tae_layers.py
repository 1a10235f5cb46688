"""The autoencoder's two layers over time: the convolution with its own gradient, and the attention."""

import pytest
import torch
import torch.nn.functional as F
from autoencoders import EXACT, random_video

from nemo_moviegen.tae.layers import ATTENTION_REACH, ReplicatePaddedConv, TemporalAttention, TemporalConv


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9])
def test_temporal_convolution_equals_conv1d_with_replicate_padding(num_frames, kernel, stride):
    """Values and gradients. Seen to catch: the last frame's correction skipped."""
    torch.manual_seed(0)
    ours = TemporalConv(3, kernel, stride=stride).double()
    torch.nn.init.normal_(ours.conv.weight)
    torch.nn.init.normal_(ours.conv.bias)
    x = random_video(2, num_frames, 4, 2, 3).requires_grad_()
    y = ours(x)

    x_reference = x.detach().clone().requires_grad_()
    lines = x_reference.permute(0, 2, 3, 4, 1).flatten(0, 2)  # every pixel its own line of frames
    padded = F.pad(lines, (kernel // 2, kernel // 2), mode="replicate")
    weight, bias = (p.detach().clone().requires_grad_() for p in (ours.conv.weight, ours.conv.bias))
    reference = F.conv1d(padded, weight, bias, stride=stride)
    reference = reference.unflatten(0, (2, 4, 2)).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(y, reference, rtol=0, atol=EXACT)

    direction = random_video(*y.shape, seed=1)
    (y * direction).sum().backward()
    (reference * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=0, atol=EXACT)
    torch.testing.assert_close(ours.conv.weight.grad, weight.grad, rtol=0, atol=EXACT)
    torch.testing.assert_close(ours.conv.bias.grad, bias.grad, rtol=0, atol=EXACT)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_the_gradient_of_the_temporal_convolution_is_that_of_its_values(num_frames, kernel, stride):
    """By finite differences. Seen to catch: edge taps left out of the weight's gradient, of the input's."""
    x, weight, bias = (
        random_video(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(2, num_frames, 1, 2, 2), (3, 2, kernel), (3,)])
    )
    assert torch.autograd.gradcheck(lambda *args: ReplicatePaddedConv.apply(*args, stride), (x, weight, bias))


def test_the_convolution_of_frames_that_need_no_gradient_gives_its_weights_theirs():
    """The first layer sees pixels. Seen to catch: what an edge adds to a gradient that is not there."""
    gradients = []
    for needs_gradient in (False, True):
        x = random_video(1, 4, 2, 2, 3).requires_grad_(needs_gradient)
        weight = random_video(3, 3, 3, seed=1).requires_grad_()
        ReplicatePaddedConv.apply(x, weight, torch.zeros(3).double(), 1).square().sum().backward()
        gradients.append(weight.grad)
        assert (x.grad is not None) == needs_gradient
    assert torch.equal(*gradients)


def attention():
    torch.manual_seed(0)
    layer = TemporalAttention(8).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


def attended(layer, x_BTHWC, reach):
    """Frame by frame and pixel by pixel: the softmax over frames at most `reach` away, spelled out."""
    out, normed = x_BTHWC.clone(), layer.norm(x_BTHWC)
    clips, num_frames, height, width, channels = x_BTHWC.shape
    for b in range(clips):
        for h in range(height):
            for w in range(width):
                q, k, v = layer.qkv(normed[b, :, h, w]).chunk(3, dim=-1)
                for t in range(num_frames):
                    seen = slice(max(0, t - reach), t + reach + 1)
                    share = torch.softmax(k[seen] @ q[t] / channels**0.5, dim=0)
                    out[b, t, h, w] += layer.out(share @ v[seen])
    return out


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_temporal_attention_of_up_to_four_latents_sees_them_all(num_frames):
    """A tile of the paper. Seen to catch: a reach of two."""
    layer, x = attention(), random_video(2, num_frames, 2, 3, 8)
    torch.testing.assert_close(layer(x), attended(layer, x, num_frames), rtol=0, atol=EXACT)


@pytest.mark.parametrize("num_frames", [5, 6, 7, 8, 12])
def test_temporal_attention_sees_three_latents_to_each_side(num_frames):
    """Seen to catch: no mask up to six latents; a mask that looks back alone."""
    assert ATTENTION_REACH == 3
    layer, x = attention(), random_video(2, num_frames, 2, 3, 8)
    torch.testing.assert_close(layer(x), attended(layer, x, 3), rtol=0, atol=EXACT)


def test_a_changed_latent_is_seen_by_the_three_before_and_after_and_no_other():
    """Seen to catch: a mask of one latent more."""
    layer, x = attention(), random_video(1, 13, 1, 2, 8)
    changed = x.clone()
    changed[:, 6] += random_video(1, 2, 8, seed=1)[0]
    moved_T = (layer(x) - layer(changed)).abs().amax((0, 2, 3, 4)) > EXACT
    assert moved_T.nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8, 9]
