"""LPIPS (perceptual loss and metric) of the temporal autoencoder, with seeded random VGG16 weights."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import lpips

from nemo_moviegen.tae import perceptual
from nemo_moviegen.tae.perceptual import PerceptualLoss

CONVOLUTIONS = {  # index in torchvision's vgg16().features: outputs, inputs
    0: (64, 3),
    2: (64, 64),
    5: (128, 64),
    7: (128, 128),
    10: (256, 128),
    12: (256, 256),
    14: (256, 256),
    17: (512, 256),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
POOLINGS = (4, 9, 16, 23, 30)


def random_vgg():
    """A state dict as torchvision's; deviations that keep activations near one, biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for index, (outputs, inputs) in CONVOLUTIONS.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * math.sqrt(2 / (9 * inputs))
        weights[f"features.{index}.weight"] = weight
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    weights["classifier.6.bias"] = torch.zeros(1000)  # ignored: LPIPS stops before the classifier
    return weights


def hollow_vgg():
    """The right keys and shapes, but one number a tensor: a small file."""
    return {key: torch.zeros(1).expand(value.shape) for key, value in random_vgg().items()}


@pytest.fixture(scope="module")
def vgg():
    return random_vgg()


@pytest.fixture(scope="module")
def vgg_file(vgg, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg, path)
    return path


@pytest.fixture
def loss(vgg_file):
    return PerceptualLoss(vgg_file)


def random_video(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_torchmetrics_on_the_same_weights(vgg, vgg_file, monkeypatch):
    """Its own network and formula; only torchvision's constructor, which it calls, is stood in for.

    Seen to catch: features read before the ReLU, a level's pooling left out, mean and deviation of [0, 1]
    images, the square before the normalisation, the epsilon outside the root, a sum over pixels, heads of
    two levels exchanged.
    """

    def features(net, pretrained=False):
        assert net == "vgg16" and not pretrained
        layers = []
        for index in range(31):
            if index in CONVOLUTIONS:
                outputs, inputs = CONVOLUTIONS[index]
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            else:
                layers.append(nn.MaxPool2d(2, 2) if index in POOLINGS else nn.ReLU(inplace=True))
        net = nn.Sequential(*layers)
        net.load_state_dict(
            {k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features")}
        )
        return net

    monkeypatch.setattr(lpips, "_get_tv_model_features", features)
    reference = lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True).double()
    ours = PerceptualLoss(vgg_file, frames_at_once=2).double()
    a, b = random_video(3, 3, 32, 40).double(), random_video(3, 3, 32, 40, seed=1).double()
    with torch.no_grad():
        expected = reference(a, b).flatten()
        got = ours.per_frame(a, b)
    assert expected.min() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)

    a.requires_grad_()  # and its gradient, recomputed slice by slice
    (expected,) = torch.autograd.grad(reference(a[:, :, :16, :16], b[:, :, :16, :16]).mean(), a)
    (got,) = torch.autograd.grad(ours(a[None, ..., :16, :16], b[None, ..., :16, :16]), a)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-14)


def test_zero_for_identical_frames_and_more_for_more_noise(loss):
    video, noise = random_video(2, 2, 3, 32, 32), random_video(2, 2, 3, 32, 32, seed=1)
    with torch.no_grad():
        same, little, much = (loss(video + scale * noise, video).item() for scale in (0.0, 0.05, 0.5))
    assert same == 0.0
    assert 0 < little < much


def test_the_loss_of_clips_is_the_mean_over_frames_and_the_metric_is_per_frame(loss):
    """Seen to catch: frames and clips exchanged in the flattening of one of the two videos."""
    a, b = random_video(2, 3, 3, 16, 16), random_video(2, 3, 3, 16, 16, seed=1)
    with torch.no_grad():
        frames = torch.stack(
            [loss.per_frame(a[i, t : t + 1], b[i, t : t + 1]) for i in range(2) for t in range(3)]
        )
        assert loss.per_frame(a[0], b[0]).shape == (3,)
        torch.testing.assert_close(loss.per_frame(a[0], b[0]), frames[:3, 0], rtol=1e-6, atol=0)
        torch.testing.assert_close(loss(a, b), frames.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("frames_at_once", [1, 2, 16])
def test_slices_change_neither_value_nor_gradient(vgg_file, loss, frames_at_once):
    """Five frames: the last slice is short. Seen to catch: a mean of the slices' means."""
    sliced = PerceptualLoss(vgg_file, frames_at_once)
    video = random_video(1, 5, 3, 16, 16)
    got, expected = (random_video(1, 5, 3, 16, 16, seed=1).requires_grad_() for _ in range(2))
    whole, parts = loss(expected, video), sliced(got, video)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    whole.backward(), parts.backward()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-9)


def test_slices_hold_the_activations_of_one_slice_at_a_time(vgg_file):
    """Counts tensors kept for the backward pass. Seen to catch: slices without recomputation."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    sliced = PerceptualLoss(vgg_file, frames_at_once=1)
    video, other = random_video(1, 3, 3, 16, 16), random_video(1, 3, 3, 16, 16, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sliced(other, video)
    assert sum(kept) < 64 * 16 * 16  # less than the first convolution's output of one frame


def test_gradient_reaches_the_reconstruction_only(loss):
    """Seen to catch: a video that is not detached."""
    reconstruction = random_video(1, 2, 3, 16, 16).requires_grad_()
    video = random_video(1, 2, 3, 16, 16, seed=1).requires_grad_()
    loss(reconstruction, video).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert video.grad is None


def test_nothing_is_trained_nothing_is_saved_and_train_mode_changes_nothing(loss):
    """Seen to catch: heads with torchmetrics' dropout, buffers in the state dict."""
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert loss.mean.dtype == loss.features_0_weight.dtype == torch.float32
    a, b = random_video(1, 1, 3, 16, 16), random_video(1, 1, 3, 16, 16, seed=1)
    torch.testing.assert_close(loss.train()(a, b), loss.eval()(a, b), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_video_of_any_precision_is_compared_in_that_of_the_loss(loss, dtype):
    """Seen to catch: float64 frames passed to float32 convolutions."""
    a, b = (random_video(1, 1, 3, 16, 16, seed=seed).to(dtype) for seed in (0, 1))
    torch.testing.assert_close(loss(a, b), loss(a.float(), b.float()), rtol=1e-6, atol=0)


def test_safetensors_hold_the_same_weights(vgg, vgg_file, tmp_path):
    path = tmp_path / "vgg16.safetensors"
    save_file(vgg, path)
    from_pth, from_safetensors = perceptual.read_vgg(vgg_file), perceptual.read_vgg(str(path))
    assert list(from_pth) == list(from_safetensors)
    assert len(from_pth) == 2 * len(CONVOLUTIONS)
    assert all(torch.equal(from_pth[key], from_safetensors[key]) for key in from_pth)


def test_heads_are_the_published_ones():
    """Non-negative, as LPIPS clamps them in training; one weight a channel."""
    heads = perceptual.read_heads()
    assert [tuple(head.shape) for head in heads] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    assert all(head.min() >= 0 and head.max() > 0 for head in heads)


def refused(path, *parts):
    """The error says what it got, in one line, and what to change."""
    with pytest.raises(ValueError) as error:
        PerceptualLoss(path)
    message = str(error.value)
    assert "\n" not in message
    for part in (*parts, "loss.vgg_weights=FILE", "loss.perceptual=0 trains without"):
        assert part in message


def test_no_weights_is_an_error_that_says_what_to_set(tmp_path):
    refused("", "loss.vgg_weights is empty")
    refused(tmp_path / "none.pth", "none.pth", "not a file")
    refused(tmp_path, "not a file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>\n<html>not found</html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        b"PK\x03\x04 a zip file that was cut off",
        b"\x80\x02cos\nsystem\nq\x00.",
    ],
    ids=["empty", "web page", "git lfs pointer", "cut off", "other pickle"],
)
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path, suffix, content):
    """Seen to catch: errors of torch.load and safetensors passed on as they are."""
    path = tmp_path / f"vgg16{suffix}"
    path.write_bytes(content)
    refused(path, path.name, "not a PyTorch state dict")


def test_a_whole_model_or_list_is_not_a_state_dict(tmp_path):
    """Seen to catch: weights_only=False, which would run what the file says."""
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "not a PyTorch state dict")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "hold a list")


def test_missing_tensors_and_wrong_shapes_are_named(tmp_path):
    """Of another network: torchvision's vgg19 has no features.17, vgg16_bn other shapes."""
    path = tmp_path / "vgg16.pth"
    weights = hollow_vgg()
    del weights["features.17.weight"], weights["features.28.bias"]
    torch.save(weights, path)
    refused(path, "lack 2 of 26 tensors", "features.17.weight")

    torch.save({"state_dict": hollow_vgg()}, path)
    refused(path, "lack 26 of 26 tensors", "features.0.weight")

    weights = hollow_vgg()
    weights["features.5.weight"] = torch.zeros(1).expand(64, 64, 3, 3)
    torch.save(weights, path)
    refused(path, "features.5.weight", "(64, 64, 3, 3), not (128, 64, 3, 3)")


def test_frames_that_lpips_cannot_compare_are_errors(loss):
    frames = random_video(2, 3, 16, 24)
    with pytest.raises(ValueError, match=r"24x8 px; LPIPS needs 16 px or more: .*loss.perceptual=0"):
        loss.per_frame(frames[:, :, :8], frames[:, :, :8])
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 24\) and \(1, 3, 16, 24\); .*crop or resize"):
        loss.per_frame(frames, frames[:1])
    with pytest.raises(ValueError, match="LPIPS needs equal shapes"):
        loss.per_frame(frames[:, :1], frames[:, :1])
