"""Long and large clips through the autoencoder in tiles (Movie Gen s3.1.1, "temporal tiling").

    frames    |<-- 32 -->|<-- 32 -->|<- 9 ->|
    latents   |    4     |    4     |   2   |     encoder: no overlap

    latents   |<-- 4 -->|                         decoder: an overlap of 2 latents, 16 frames,
                   |<-- 4 -->|                    blended linearly in pixels
                        |<-- 4 -->|

Inside a tile frames go through as a stream, so what is held grows neither with the clip nor with the tile;
what is decoded is handed out as soon as no later tile can change it. `Tiling(frames=0)` has no tiles in time:
one stream over the whole clip, which decodes each latent once and has no seams. Large frames are cut into
tiles too, where `size_px` says so: norms and attention then see a tile and not the frame.

With a process group, tiles in time are shared out over its ranks, and every rank gets the whole clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_moviegen.tae.checks import COMPRESSION, check_shape, check_values
from nemo_moviegen.tae.model import FRAMES_AT_ONCE
from nemo_moviegen.windows import blend_weights, windows

TILE_FRAMES = 32
"""Raw frames of a tile (s3.1.1)."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles and of what they share with the next; frames and pixels, not latents."""

    frames: int = TILE_FRAMES
    """Raw frames of a tile; 0 = one stream over the whole clip."""
    overlap_frames: int = 16
    """Of the decoder's tiles (s3.1.1); the encoder's have none."""
    size_px: int = 0
    """Height and width of a tile at most; 0 = whole frames."""
    overlap_px: int = 64
    """Of tiles within a frame, of encoder and decoder."""

    def __post_init__(self):
        for name in ("frames", "overlap_frames", "size_px", "overlap_px"):
            value = getattr(self, name)
            if value < 0 or value % COMPRESSION:
                raise ValueError(
                    f"tiling.{name} is {value}; use a multiple of {COMPRESSION}, for example "
                    f"{max(0, round(value / COMPRESSION)) * COMPRESSION}"
                )
        for size, overlap in (("frames", "overlap_frames"), ("size_px", "overlap_px")):
            whole, shared = getattr(self, size), getattr(self, overlap)
            if whole and 2 * shared > whole:
                raise ValueError(
                    f"tiling.{overlap} {shared} is over half of tiling.{size} {whole}: three tiles would "
                    f"meet; use {whole // 2 // COMPRESSION * COMPRESSION} at most"
                )


def trained_frames(recipe) -> int:
    """Frames of a tile for the autoencoder of a recipe: the paper's 32, or its clips' where they are shorter.

    In tiles longer than it was trained on an autoencoder rebuilds worse (recipes/tae.py has figures).
    """
    bucket = getattr(recipe.data, "bucket", None)
    if bucket is None:
        return TILE_FRAMES
    return min(TILE_FRAMES, -(-bucket.num_frames // COMPRESSION) * COMPRESSION)


@torch.no_grad()
def encode_tiled(autoencoder, video_BTCHW, tiling=Tiling(), group=None) -> Tensor:
    """Mean of the posterior, [B, ceil(T/8), C, H/8, W/8] of the autoencoder's dtype, on its device.

    Of RGB video in [-1, 1] of any length, on any device: frames are moved a few at a time. A clip of one tile
    gives what `autoencoder.encode` gives, up to rounding. ValueError for a video `encode` does not take.
    """
    check_shape(video_BTCHW)
    for first in range(0, video_BTCHW.shape[1], FRAMES_AT_ONCE):  # all ranks: none waits for another's tile
        check_values(video_BTCHW[:, first : first + FRAMES_AT_ONCE], first)
    spans = windows(video_BTCHW.shape[1], tiling.frames, 0)
    made = {
        number: torch.cat(list(_encoded(autoencoder, video_BTCHW[:, slice(*spans[number])], tiling)), dim=1)
        for number in _own(len(spans), group)
    }
    if group is None:
        return torch.cat([made[number] for number in range(len(spans))], dim=1)
    compression = autoencoder.size.temporal_compression
    lengths = [-(-(end - start) // compression) for start, end in spans]
    shape = [len(video_BTCHW), 0, autoencoder.size.latent_channels]
    shape += [length // COMPRESSION for length in video_BTCHW.shape[3:]]
    parameter = next(autoencoder.parameters())
    gathered = []
    for first in range(0, len(spans), group.size()):
        gathered += _gather(made, first, lengths, shape, parameter, group)
    return torch.cat(gathered, dim=1)


def decode_tiled(autoencoder, latent_BTCHW, num_frames=None, tiling=Tiling(), group=None) -> Tensor:
    """Video [B, num_frames, 3, 8H, 8W], not clamped; all frames where `num_frames` is None.

    ValueError where the latents hold another number of frames.
    """
    return torch.cat(list(decode_frames(autoencoder, latent_BTCHW, num_frames, tiling, group)), dim=1)


@torch.no_grad()
def decode_frames(
    autoencoder,
    latent_BTCHW,
    num_frames=None,
    tiling=Tiling(),
    group=None,
) -> Iterator[Tensor]:
    """The frames of `decode_tiled` in order, [B, t, 3, 8H, 8W] at a time, each as soon as it is final."""
    compression = autoencoder.size.temporal_compression
    num_frames = autoencoder.frames_kept(latent_BTCHW.shape[1], num_frames)
    if num_frames <= compression:  # one latent: a still image, or a clip too short for a second
        yield from _decoded(autoencoder, latent_BTCHW, num_frames, tiling)
        return
    spans = windows(
        latent_BTCHW.shape[1], -(-tiling.frames // compression), tiling.overlap_frames // compression
    )
    in_frames = [(start * compression, min(end * compression, num_frames)) for start, end in spans]
    weights = blend_weights(in_frames)
    overlapping = None
    for number, tile in enumerate(_tiles(autoencoder, latent_BTCHW, spans, in_frames, tiling, group)):
        start, end = in_frames[number]
        final = in_frames[number + 1][0] - start if number + 1 < len(spans) else end - start
        overlapping = yield from _blended(tile, weights[number], overlapping, final)


def _tiles(autoencoder, latent_BTCHW, spans, in_frames, tiling, group):
    """For each tile its frames, an iterator: decoded here as they are asked for, or on all ranks a round."""

    def decode(number):
        (start, end), (first, last) = spans[number], in_frames[number]
        return _decoded(autoencoder, latent_BTCHW[:, start:end], last - first, tiling)

    if group is None:
        yield from map(decode, range(len(spans)))
        return
    lengths = [last - first for first, last in in_frames]
    shape = [len(latent_BTCHW), 0, 3, *(length * COMPRESSION for length in latent_BTCHW.shape[3:])]
    parameter, own = next(autoencoder.parameters()), set(_own(len(spans), group))
    for first in range(0, len(spans), group.size()):
        here = own & set(range(first, first + group.size()))
        made = {number: torch.cat(list(decode(number)), dim=1) for number in here}
        for tile_BTCHW in _gather(made, first, lengths, shape, parameter, group):
            yield iter([tile_BTCHW])


def _blended(tile, weights, overlapping, final):
    """Yield the frames of a tile before `final`, with what overlaps from before; return the weighted rest."""
    place, rest = 0, []
    for frames_BTCHW in tile:
        end = place + frames_BTCHW.shape[1]
        weight_T111 = frames_BTCHW.new_tensor(weights[place:end])[:, None, None, None]
        frames_BTCHW = frames_BTCHW * weight_T111
        if overlapping is not None and place < overlapping.shape[1]:
            shared_BTCHW = overlapping[:, place:end]
            frames_BTCHW[:, : shared_BTCHW.shape[1]] += shared_BTCHW
        ready = min(max(final - place, 0), end - place)
        if ready:
            yield frames_BTCHW[:, :ready]
        if ready < end - place:
            rest.append(frames_BTCHW[:, ready:])
        place = end
    return torch.cat(rest, dim=1) if rest else None


def _encoded(autoencoder, video_BTCHW, tiling):
    """Latents of a tile in time, a few at a time."""
    device = next(autoencoder.parameters()).device

    def encode(video_BTCHW):
        return autoencoder.encode_stream(part.to(device) for part in video_BTCHW.split(FRAMES_AT_ONCE, dim=1))

    size = [length // COMPRESSION for length in video_BTCHW.shape[3:]]
    return _over_space(encode, video_BTCHW, size, COMPRESSION, 1, tiling)


def _decoded(autoencoder, latent_BTCHW, num_frames, tiling):
    """Frames of a tile in time, a few at a time."""

    def decode(latent_BTCHW):
        if latent_BTCHW.shape[1] == 1:
            return iter([autoencoder.decode(latent_BTCHW, num_frames)])
        return autoencoder.decode_stream(latent_BTCHW.split(1, dim=1), num_frames)

    return _over_space(decode, latent_BTCHW, list(latent_BTCHW.shape[3:]), 1, COMPRESSION, tiling)


def _over_space(run, x_BTCHW, latent_HW, pixels_in, pixels_out, tiling):
    """`run` of every tile of the frames side by side, what they give blended into whole frames.

    `latent_HW` is the size in latents, each of which is `pixels_in` of x and `pixels_out` of what comes out.
    """
    size, overlap = tiling.size_px // COMPRESSION, tiling.overlap_px // COMPRESSION
    rows, columns = (windows(length, size, overlap) for length in latent_HW)
    if len(rows) == len(columns) == 1:
        yield from run(x_BTCHW)
        return

    def cut(spans, scale):
        return [slice(start * scale, end * scale) for start, end in spans]

    row_weights, column_weights = (
        [
            torch.tensor(w, dtype=torch.float64)
            for w in blend_weights([(a * pixels_out, b * pixels_out) for a, b in spans])
        ]
        for spans in (rows, columns)
    )
    tiles = [run(x_BTCHW[..., r, c]) for r in cut(rows, pixels_in) for c in cut(columns, pixels_in)]
    places = [(r, c) for r in cut(rows, pixels_out) for c in cut(columns, pixels_out)]
    weights = [r[:, None] * c for r in row_weights for c in column_weights]
    for parts in zip(*tiles, strict=True):  # in step: all tiles have the same frames
        whole = parts[0].new_zeros(*parts[0].shape[:3], *(length * pixels_out for length in latent_HW))
        for part, (r, c), weight_HW in zip(parts, places, weights, strict=True):
            whole[..., r, c] += part * weight_HW.to(part)
        yield whole


def _own(num_tiles, group):
    """Numbers of the tiles this rank makes."""
    return range(num_tiles) if group is None else range(group.rank(), num_tiles, group.size())


def _gather(made, first, lengths, shape, like, group):
    """Tiles first, first + 1, ... of one round from the ranks that made them, in order, on every rank."""
    ranks = range(min(group.size(), len(lengths) - first))
    longest = [shape[0], max(lengths[first + rank] for rank in ranks), *shape[2:]]
    sent = like.new_zeros(longest)
    mine = first + group.rank()
    if mine in made:
        sent[:, : lengths[mine]] = made[mine]
    received = [like.new_zeros(longest) for _ in range(group.size())]
    dist.all_gather(received, sent, group=group)
    return [received[rank][:, : lengths[first + rank]] for rank in ranks]
