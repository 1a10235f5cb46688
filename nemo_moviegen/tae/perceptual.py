"""LPIPS of reconstructed frames: perceptual loss of the autoencoder and metric of its evaluation.

The paper does not say which perceptual loss it adds; LPIPS with VGG16 (Zhang et al. 2018, eq. 1) is that
of the LDM autoencoder it starts from. Frames pass VGG16, features are normalised over channels, their
squared differences weighted by learned heads and averaged over pixels, the five levels added.

The heads are those in torchmetrics' wheel. VGG16's weights (528 MB) are a file the user names; nothing is
downloaded. The convolutions are written out here because torchmetrics takes them from torchvision, and
torchvision's PyPI wheel does not import beside a CPU build of torch.

Names: B clips, T frames, N some of the frames, C channels, H W height and width.
"""

import pickle
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions by their index in torchvision's `vgg16().features`; LPIPS reads each level's last ReLU."""

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of each level."""

SMALLEST_PX = 16
"""Each of the four poolings between the levels halves a frame; below this the last level is empty."""

WAY_OUT = (
    "set loss.vgg_weights=FILE to torchvision's vgg16-397923af.pth, or to a .safetensors of the same keys; "
    "loss.perceptual=0 trains without"
)


class PerceptualLoss(nn.Module):
    """LPIPS with VGG16, frozen.

    Holds buffers and no parameters, and leaves them out of its state dict: a checkpoint neither grows by
    VGG16 nor minds whether the perceptual loss was on.
    """

    def __init__(self, vgg_weights: str | Path, frames_at_once: int = 16):
        """ValueError, with what to change, where `vgg_weights` does not hold VGG16.

        With more than `frames_at_once` frames each slice is computed again in the backward pass, so that
        memory is that of one slice.
        """
        super().__init__()
        self.frames_at_once = frames_at_once
        for key, value in read_vgg(vgg_weights).items():
            self.register_buffer(key.replace(".", "_"), value, persistent=False)
        for level, head_1C11 in enumerate(read_heads()):
            self.register_buffer(f"head_{level}", head_1C11, persistent=False)
        # ImageNet's mean 0.485 0.456 0.406 and deviation 0.229 0.224 0.225 in [0, 1], rescaled to [-1, 1].
        mean, deviation = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("deviation", deviation[:, None, None], persistent=False)

    def forward(self, reconstruction_BTCHW: Tensor, video_BTCHW: Tensor) -> Tensor:
        """Mean LPIPS of all frames, a scalar >= 0, of inputs in [-1, 1]; no gradient for the video."""
        return self.per_frame(reconstruction_BTCHW.flatten(0, 1), video_BTCHW.flatten(0, 1)).mean()

    def per_frame(self, reconstruction_TCHW: Tensor, video_TCHW: Tensor) -> Tensor:
        """LPIPS [T] of each frame; ValueError for frames that differ in shape or are below 16 px."""
        check_frames(reconstruction_TCHW, video_TCHW)
        slices = list(
            zip(
                reconstruction_TCHW.split(self.frames_at_once),
                video_TCHW.detach().split(self.frames_at_once),
                strict=True,
            )
        )
        if len(slices) > 1 and torch.is_grad_enabled() and reconstruction_TCHW.requires_grad:
            parts = [checkpoint(self.distance, *pair, use_reentrant=False) for pair in slices]
        else:
            parts = [self.distance(*pair) for pair in slices]
        return torch.cat(parts)

    def distance(self, reconstruction_NCHW: Tensor, video_NCHW: Tensor) -> Tensor:
        """LPIPS [N] of frames that fit in memory together."""
        distance_N = 0
        levels = zip(self.features(reconstruction_NCHW), self.features(video_NCHW), strict=True)
        for level, (a_NCHW, b_NCHW) in enumerate(levels):
            difference_NCHW = (unit(a_NCHW) - unit(b_NCHW)).square()
            head_1C11 = self.get_buffer(f"head_{level}")
            distance_N = distance_N + F.conv2d(difference_NCHW, head_1C11).mean(dim=(1, 2, 3))
        return distance_N

    def features(self, frames_NCHW: Tensor):
        """Yields VGG16's activations of each level, [N, C, H, W], [N, C, H/2, W/2] and so on."""
        x_NCHW = (frames_NCHW.to(self.mean.dtype) - self.mean) / self.deviation
        for level, indices in enumerate(LEVELS):
            if level:
                x_NCHW = F.max_pool2d(x_NCHW, 2)
            for index in indices:
                weight = self.get_buffer(f"features_{index}_weight")
                bias = self.get_buffer(f"features_{index}_bias")
                x_NCHW = F.relu(F.conv2d(x_NCHW, weight, bias, padding=1), inplace=True)
            yield x_NCHW


def unit(x_NCHW: Tensor) -> Tensor:
    """Vectors over channels at length one, zero where all are zero; the epsilon is torchmetrics'."""
    return x_NCHW / (x_NCHW.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def check_frames(reconstruction_TCHW: Tensor, video_TCHW: Tensor) -> None:
    """ValueError unless both are RGB frames of one shape with sides of 16 px or more."""
    got, expected = tuple(reconstruction_TCHW.shape), tuple(video_TCHW.shape)
    if got != expected or len(got) != 4 or got[1] != 3 or not got[0]:
        raise ValueError(
            f"reconstruction and video have shapes {got} and {expected}; LPIPS needs equal shapes "
            "[frames, 3, height, width]: crop or resize one to the other"
        )
    if min(got[2:]) < SMALLEST_PX:
        raise ValueError(
            f"frames are {got[3]}x{got[2]} px; LPIPS needs {SMALLEST_PX} px or more: choose a larger bucket "
            "(data.bucket.width_px, data.bucket.height_px), or set loss.perceptual=0"
        )


def read_vgg(path: str | Path) -> dict[str, Tensor]:
    """Weights and biases of VGG16's 13 convolutions, float32, by torchvision's keys; ValueError otherwise."""
    if not str(path):
        raise ValueError(f"the perceptual loss has no VGG16 weights (loss.vgg_weights is empty): {WAY_OUT}")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"VGG16 weights {path} are not a file: {WAY_OUT}")
    shapes = vgg_shapes()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                weights = {key: file.get_tensor(key) for key in file.keys() if key in shapes}  # noqa: SIM118
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"VGG16 weights {path} are not a PyTorch state dict ({reason}): {WAY_OUT}"
        ) from error
    if not isinstance(weights, dict):
        raise ValueError(f"VGG16 weights {path} hold a {type(weights).__name__}, not a state dict: {WAY_OUT}")
    missing = [key for key in shapes if not isinstance(weights.get(key), Tensor)]
    if missing:
        raise ValueError(
            f"VGG16 weights {path} lack {len(missing)} of {len(shapes)} tensors, first {missing[0]}: "
            f"{WAY_OUT}"
        )
    for key, shape in shapes.items():
        got = tuple(weights[key].shape)
        if got != shape:
            raise ValueError(f"VGG16 weights {path} have {key} of shape {got}, not {shape}: {WAY_OUT}")
    return {key: weights[key].float() for key in shapes}


def vgg_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of VGG16's convolutions by torchvision's keys."""
    shapes, inputs = {}, 3
    for indices, outputs in zip(LEVELS, WIDTHS, strict=True):
        for index in indices:
            shapes[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{index}.bias"] = (outputs,)
            inputs = outputs
    return shapes


def read_heads() -> list[Tensor]:
    """LPIPS' learned weight >= 0 of each channel, [1, C, 1, 1] for each level."""
    file = resources.files("torchmetrics").joinpath("functional/image/lpips_models/vgg.pth")
    with resources.as_file(file) as path:
        heads = torch.load(path, map_location="cpu", weights_only=True)  # saved on a GPU
    return [heads[f"lin{level}.model.1.weight"] for level in range(len(LEVELS))]
