"""Long clips through the autoencoder in tiles of time (Movie Gen s3.1.1, "temporal tiling").

    frames    |<-- 32 -->|<-- 32 -->|<- 9 ->|
    latents   |    4     |    4     |   2   |     encoder: no overlap

Each tile is encoded on its own, so what the encoder holds does not grow with the clip.
"""

import torch

from nemo_moviegen.tae.model import COMPRESSION

TILE_FRAMES = 32
"""Raw frames of a tile: 4 latent frames (s3.1.1)."""


def encode_tiled(autoencoder, video_BTCHW):
    """Mean of the posterior, [B, ceil(T/8), C, H/8, W/8] of the autoencoder's dtype, on its device.

    Of RGB video in [-1, 1] of any length, on any device: each tile is moved when its turn comes. A clip of
    one tile gives what `autoencoder.encode` gives, to the bit. ValueError for a video `encode` does not take.
    """
    device = next(autoencoder.parameters()).device
    tiles = video_BTCHW.split(TILE_FRAMES, dim=1)
    first_BTCHW = autoencoder.encode(tiles[0].to(device)).mean_BTCHW
    if len(tiles) == 1:
        return first_BTCHW
    shape = list(first_BTCHW.shape)
    shape[1] = -(-video_BTCHW.shape[1] // COMPRESSION)
    latent_BTCHW = torch.empty(shape, dtype=first_BTCHW.dtype, device=device)
    places = latent_BTCHW.split(TILE_FRAMES // COMPRESSION, dim=1)
    places[0].copy_(first_BTCHW)
    for place_BTCHW, tile_BTCHW in zip(places[1:], tiles[1:], strict=True):
        place_BTCHW.copy_(autoencoder.encode(tile_BTCHW.to(device)).mean_BTCHW)
    return latent_BTCHW
