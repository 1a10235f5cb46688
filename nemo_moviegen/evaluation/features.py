"""Networks whose features FID and FVD compare; nothing is downloaded.

    random             a small fixed network, always there: tells runs apart, compares with no published one
    FILE               TorchScript, or what torch.export.save wrote (.pt2): uint8 [N, 3, H, W] -> [N, D],
                       for FVD uint8 [N, 3, T, H, W] -> [N, D]
    package.module:fn  the same as a Python function or module

The published FIDs are of Inception-v3 as ported from TensorFlow, the FVDs of I3D, which several projects
export as TorchScript; such a file resizes its input itself. Ones with the switches `return_features`,
`rescale` or `resize` have them on: features in place of classes, of bytes of any size.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM = "random"
_FRAMES_AT_ONCE = 32
_SWITCHES = ("return_features", "rescale", "resize")


@dataclass(frozen=True)
class Features:
    """A network and what to call it wherever one of its numbers stands."""

    name: str
    network: Callable
    is_comparable: bool = True
    """Whether FIDs of it may be compared with those others publish for the network of this name."""

    def __call__(self, frames_NCHW: Tensor) -> Tensor:
        """Features [N, D], float64, of frames in [-1, 1] or clips [N, C, T, H, W], seen as bytes.

        ValueError where the network returns anything but [N, D].
        """
        bytes_NCHW = to_bytes(frames_NCHW)
        with torch.no_grad():
            parts = [self.network(part_NCHW) for part_NCHW in bytes_NCHW.split(_FRAMES_AT_ONCE)]
        for part in parts:
            if not isinstance(part, Tensor) or part.ndim != 2:
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(
                    f"features {self.name}: {got} came back for {tuple(bytes_NCHW.shape)}; "
                    "the network has to map uint8 [N, 3, H, W] (of clips [N, 3, T, H, W]) to [N, D]"
                )
        return torch.cat(parts).double()


def to_bytes(frames: Tensor) -> Tensor:
    """uint8 of frames in [-1, 1], what networks and files see; values outside are clipped."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def find_features(name, device="cpu", *, clips=False) -> Features:
    """The features of that name (see above), of frames or of clips; ValueError says what is wrong with it."""
    if name == RANDOM:
        return Features(RANDOM, _RandomNetwork(device, clips), is_comparable=False)
    if Path(name).is_file():
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:8]
        return Features(f"{Path(name).name} {digest}", _from_file(name, device))
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(
            f"features {name!r}: no such file; use random, a TorchScript or .pt2 file, or "
            "package.module:function"
        )
    return Features(name, _from_module(name, module, function))


def _from_file(path, device):
    try:
        if str(path).endswith(".pt2"):
            return torch.export.load(path).module().to(device)
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # each reader has its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"features {path}: neither TorchScript nor a .pt2 of torch.export ({reason})"
        ) from None
    known = {argument.name for argument in network.forward.schema.arguments}
    switches = {name: True for name in _SWITCHES if name in known}
    return (lambda frames_NCHW: network(frames_NCHW, **switches)) if switches else network


def _from_module(name, module, function):
    try:
        network = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name}: {error}; is its folder on PYTHONPATH?") from None
    if not callable(network):
        raise ValueError(f"features {name}: {function} is a {type(network).__name__}, not a function")
    return network


class _RandomNetwork:
    """Three strided convolutions with fixed random weights, of clips over time too; features: their means.

    Blur, shifts of colour and lost texture change them, so runs can be ranked; what a person would mind they
    do not know.
    """

    def __init__(self, device, clips=False):
        self.convolve = F.conv3d if clips else F.conv2d
        self.dims = (2, 3, 4) if clips else (2, 3)
        generator = torch.Generator().manual_seed(1234)
        shapes, kernel = ((16, 3), (32, 16), (64, 32)), (3,) * len(self.dims)
        # He's scale: activations keep their size from layer to layer
        weights = [torch.randn(*shape, *kernel, generator=generator) for shape in shapes]
        self.weights = [(weight * (2 / weight[0].numel()) ** 0.5).to(device) for weight in weights]

    def __call__(self, frames_NCHW):
        x_NCHW, means = frames_NCHW.float() / 127.5 - 1, []
        for weight_OIHW in self.weights:
            x_NCHW = F.leaky_relu(self.convolve(x_NCHW, weight_OIHW, stride=2, padding=1), 0.2)
            means.append(x_NCHW.mean(dim=self.dims))
        return torch.cat(means, dim=1)
