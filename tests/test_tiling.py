"""Temporal tiling of the encoder: short clips as without it, long ones tile by tile, memory that stays."""

import tracemalloc

import numpy as np
import pytest
import torch

from nemo_moviegen.recipe import AutoencoderSize
from nemo_moviegen.tae.model import Posterior, TemporalAutoencoder
from nemo_moviegen.tae.tiling import TILE_FRAMES, encode_tiled


@pytest.fixture(scope="module")
def autoencoder():
    """Random temporal kernels: the fresh ones would treat each frame alone, where no tile shows."""
    torch.manual_seed(1)
    model = TemporalAutoencoder(AutoencoderSize(base_width=8, multipliers=(1, 1, 1, 1), blocks_per_level=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "time" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def video(num_frames):
    return torch.rand(2, num_frames, 3, 16, 24, generator=torch.Generator().manual_seed(num_frames)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 2, 8, 9, 31, 32])
def test_a_clip_of_one_tile_is_encoded_as_without_tiles_bit_for_bit(autoencoder, num_frames):
    whole = autoencoder.encode(video(num_frames)).mean_BTCHW
    assert torch.equal(encode_tiled(autoencoder, video(num_frames)), whole)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [33, 40, 64, 73, 96])
def test_a_long_clip_is_the_latents_of_its_tiles_one_after_the_other(autoencoder, num_frames):
    """Also one whose last tile is short: 33 frames are a tile and one frame."""
    found = encode_tiled(autoencoder, video(num_frames))
    tiles = [autoencoder.encode(tile).mean_BTCHW for tile in video(num_frames).split(32, dim=1)]
    assert torch.equal(found, torch.cat(tiles, dim=1))
    assert found.shape == (2, -(-num_frames // 8), 16, 2, 3)
    whole = autoencoder.encode(video(num_frames)).mean_BTCHW
    assert not torch.allclose(found, whole, atol=1e-3), "the kernels do not look over a tile's edge"


def test_memory_of_the_encoder_does_not_grow_with_the_clip():
    """A stand-in that holds ten times its tile, in memory that tracemalloc sees."""

    class Watched(torch.nn.Linear):
        def encode(self, tile_BTCHW):
            held = np.tile(tile_BTCHW.numpy(), (10, 1, 1, 1, 1))
            mean = torch.from_numpy(held[:1, ::8, :, ::8, ::8].copy())
            return Posterior(mean, mean)

    peaks = []
    for num_tiles in (1, 8):
        clip = torch.rand(1, num_tiles * TILE_FRAMES, 3, 32, 32)
        tracemalloc.start()
        encode_tiled(Watched(1, 1), clip)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    tile_bytes = TILE_FRAMES * 3 * 32 * 32 * 4
    assert peaks[0] > 10 * tile_bytes and peaks[1] < 1.1 * peaks[0]
