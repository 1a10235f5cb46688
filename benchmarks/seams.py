"""What tiles do to a film: python benchmarks/seams.py RUN [--write FILE].

RUN is a run of `tae.small`, overfitted to the film that comes along. Measured on it, with temporal borders
after every 32 frames (encoder) and 16 (decoder) of the paper's tiles:

whole      the clip at once against one stream and the paper's tiles: largest difference of a pixel, PSNR
far        tiles much longer than the decoder looks, on the film there and back: largest difference of frames
           that no seam can reach, and of those it can
flicker    mean |frame t+1 - frame t| of the reconstruction, and of its error, at borders against the 99th
           percentile elsewhere
edges      mean |column x+1 - column x| of the error at borders of spatial tiles against the 99th percentile
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.data.clips import BIG_BUCK_BUNNY
from nemo_moviegen.data.cutting import cut_clips
from nemo_moviegen.data.fit import WHITE
from nemo_moviegen.data.frames import read_clip
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.recipe import read_recipe
from nemo_moviegen.tae.tiling import Tiling, decode_tiled, encode_tiled
from nemo_moviegen.training.autoencoder_weights import load_autoencoder

FRAMES = 128
STREAM = Tiling(frames=0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--write")
    options = parser.parse_args()
    autoencoder = load_autoencoder(options.run)
    video = film(read_recipe(Path(options.run) / "recipe.yaml").data.bucket)
    found = {"whole": whole(autoencoder, video), "far": far(autoencoder, video)}
    latent = encode_tiled(autoencoder, video)
    rebuilt = decode_tiled(autoencoder, latent, FRAMES)
    found["flicker"] = flicker(rebuilt, video)
    found["edges"] = edges(autoencoder, video)
    print(json.dumps(found, indent=1))
    if options.write:
        Path(options.write).write_text(json.dumps(found, indent=1) + "\n")


def film(bucket):
    """The first frames of the film, [1, T, 3, H, W] in [-1, 1]."""
    wanted = Bucket(**vars(bucket) | {"num_frames": FRAMES})
    (clip,) = cut_clips(BIG_BUCK_BUNNY, FRAMES / bucket.fps)
    pictures_TCHW = read_clip(clip, 0, wanted, bucket.fps).pictures_TCHW
    return torch.from_numpy(pictures_TCHW.astype(np.float32) / np.float32(WHITE / 2) - 1)[None]


@torch.no_grad()
def whole(autoencoder, video):
    """At 128 px, where the whole clip fits into memory at once."""
    crop = video[..., 64:192, 64:192]
    latent = autoencoder.encode(crop).mean_BTCHW
    at_once = autoencoder.decode(latent, FRAMES)
    found = {
        "encoder, stream": largest(encode_tiled(autoencoder, crop, STREAM), latent),
        "decoder, stream": largest(decode_tiled(autoencoder, latent, FRAMES, STREAM), at_once),
        "decoder, paper's tiles": largest(decode_tiled(autoencoder, latent, FRAMES), at_once),
    }
    for name, tiling in (("stream", STREAM), ("paper's tiles", Tiling())):
        rebuilt = decode_tiled(autoencoder, encode_tiled(autoencoder, video, tiling), FRAMES, tiling)
        found[f"PSNR of mean squared error, {name}"] = psnr(rebuilt, video)
    return found


@torch.no_grad()
def far(autoencoder, video, frames=480, overlap=16):
    """Two tiles of 480 frames; the decoder looks `reach` frames to both sides."""
    reach = decoder_reach(autoencoder.size)
    latent = encode_tiled(autoencoder, video[..., 64:192, 64:192], STREAM)
    there_and_back = torch.cat([latent, latent.flip(1)] * 4, dim=1)[:, : 800 // 8]
    one = decode_tiled(autoencoder, there_and_back, tiling=STREAM)
    two = decode_tiled(autoencoder, there_and_back, tiling=Tiling(frames=frames, overlap_frames=overlap))
    difference_T = (one - two).abs().amax(dim=(0, 2, 3, 4))
    place_T = torch.arange(len(difference_T))
    seen_T = (place_T >= frames - overlap - reach) & (place_T < frames + reach)
    return {
        "reach_frames": reach,
        "frames out of reach": int((~seen_T).sum()),
        "largest difference out of reach": float(difference_T[~seen_T].max()),
        "largest difference within reach": float(difference_T[seen_T].max()),
    }


def decoder_reach(size) -> int:
    """Frames to one side that a decoded frame depends on, counted from the latents' rate down to pixels'."""
    reach, per_latent = 3 + 1 + 4 + 2 * (size.blocks_per_level + 1), 1  # attention, conv_in, middle, blocks
    frames = reach * size.temporal_compression
    for stride in size.temporal_strides[::-1]:
        per_latent *= stride
        convs = 1 + 2 * (size.blocks_per_level + 1)  # of the upsampling, and of the blocks
        frames += convs * size.temporal_compression / per_latent
    return int(frames + 1) + size.temporal_compression  # conv_out; a latent's own frames


def flicker(rebuilt, video):
    """At the decoder's borders, after every 16 frames, of which every second is the encoder's too."""
    found = {}
    for name, clip in (("reconstruction", rebuilt), ("error", rebuilt - video)):
        step_T = (clip[:, 1:] - clip[:, :-1]).abs().mean(dim=(0, 2, 3, 4))
        border_T = torch.arange(1, len(step_T) + 1) % 16 == 0
        found[name] = against(step_T, border_T)
    return found


@torch.no_grad()
def edges(autoencoder, video):
    """Spatial tiles of 128 px, 32 shared, on the first 32 frames; borders are where a tile's share begins."""
    tiling = Tiling(size_px=128, overlap_px=32)
    clip = video[:, :32]
    rebuilt = decode_tiled(autoencoder, encode_tiled(autoencoder, clip, tiling), 32, tiling)
    untiled = decode_tiled(autoencoder, encode_tiled(autoencoder, clip), 32)
    error = rebuilt - clip
    step_W = (error[..., 1:] - error[..., :-1]).abs().mean(dim=(0, 1, 2, 3))
    starts = [column for first in range(96, 256, 96) for column in (first, first + 32)]
    border_W = torch.zeros(len(step_W), dtype=bool)
    border_W[[column - 1 for column in starts if column < 256]] = True
    return against(step_W, border_W) | {
        "PSNR, tiles": psnr(rebuilt, clip),
        "PSNR, whole frames": psnr(untiled, clip),
    }


def against(values, at_border):
    """The largest of the borders, and the 99th percentile of the rest."""
    rest = values[~at_border]
    return {
        "largest at borders": float(values[at_border].max()),
        "99th percentile elsewhere": float(rest.quantile(0.99)),
        "median at borders": float(values[at_border].median()),
        "median elsewhere": float(rest.median()),
    }


def largest(a, b):
    return float((a - b).abs().max())


def psnr(rebuilt, video):
    return float(10 * torch.log10(4 / (rebuilt.clamp(-1, 1) - video).square().mean()))


if __name__ == "__main__":
    main()
