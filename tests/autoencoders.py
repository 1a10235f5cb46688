"""Small autoencoders with weights that hide nothing, how far they look in time, and bytes alive at once."""

import functools
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_moviegen.sizes import AutoencoderSize
from nemo_moviegen.tae.layers import ATTENTION_REACH
from nemo_moviegen.tae.model import TemporalAutoencoder

EXACT = 1e-10  # float64 and a few dozen layers
KINDS = [("2D", 1)] + [(inflation, frames) for inflation in ("2.5D", "3D") for frames in (1, 2, 4, 8)]
"""Every (inflation, temporal compression) there is."""


def small(**changes):
    """A size of one block a level."""
    sizes = {"base_width": 4, "multipliers": (1, 2, 2, 3), "blocks_per_level": 1, "latent_channels": 4}
    return AutoencoderSize(**sizes | changes)


def autoencoder(size=None, *, fresh=False):
    """In float64; where not fresh, noise on every weight: the zeros and identities of the start hide bugs."""
    torch.manual_seed(0)
    model = TemporalAutoencoder(size or small()).double()
    if not fresh:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.2 * noise)
    return model


@functools.cache
def shared(inflation="2.5D", compression=8, kernel=3):
    """`autoencoder`, one for all tests that leave it as it is."""
    return autoencoder(
        small(inflation=inflation, temporal_compression=compression, temporal_kernel=kernel)
    ).requires_grad_(False)


def random_video(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def random_latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder_reach(size):
    """Frames before and after frame 8t that latent t sees: those of each convolution over time, at its rate.

    A block has two; the lowest level has two blocks, the attention and the last convolution more.
    """
    pad, duration, frames = size.temporal_kernel // 2, 1, size.temporal_kernel // 2
    for stride in (*size.temporal_strides, None):
        frames += 2 * size.blocks_per_level * pad * duration
        if stride is not None:
            frames += pad * duration  # before frames are halved
            duration *= stride
    return frames + (4 * pad + ATTENTION_REACH + pad) * duration


def decoder_reach(size):
    """Likewise, of frames of the decoder: frame f sees latents (f - reach) // 8 to (f + reach) // 8."""
    pad, duration = size.temporal_kernel // 2, size.temporal_compression
    frames = (pad + 4 * pad + ATTENTION_REACH) * duration
    for stride in (*size.temporal_strides[::-1], None):
        frames += 2 * (size.blocks_per_level + 1) * pad * duration
        if stride is not None:
            duration //= stride
        frames += pad * duration  # after frames are doubled; or the last one
    return frames


class MostAlive(TorchDispatchMode):
    """Bytes of tensors made inside that were alive at once, at most: `most`. `given` does not count."""

    def __init__(self, *given):
        super().__init__()
        self.most, self._now, self._known = 0, 0, {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        address = storage._cdata
        if address not in self._known:
            self._known.add(address)
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._gone, address, storage.nbytes())

    def _gone(self, address, num_bytes):
        self._known.discard(address)
        self._now -= num_bytes
