"""Tiles in time shared out over ranks: every rank gets the whole clip, bit for bit that of one rank."""

import pytest
import torch
import torch.distributed as dist
from autoencoders import random_latent, random_video, shared
from ranks import run_on_ranks

from nemo_moviegen.tae.tiling import Tiling, decode_frames, decode_tiled, encode_tiled

CASES = {  # tiles of the encoder, of the decoder
    "an image": (1, Tiling()),  # 1, 1
    "one tile": (30, Tiling()),  # 1, 1
    "a short last tile": (73, Tiling()),  # 3, 4
    "one frame in the last tile": (129, Tiling()),  # 5, 8
    "in time and space": (73, Tiling(size_px=16, overlap_px=8)),
    "one stream": (73, Tiling(frames=0)),
}


def tiled(group):
    """Latents of a clip and frames of latents, for every case."""
    made = {}
    for name, (num_frames, tiling) in CASES.items():
        video = random_video(2, num_frames, 3, 16, 24)
        latent = random_latent(2, -(-num_frames // 8), 4, 2, 3)
        encoded = encode_tiled(shared(), video, tiling, group)
        decoded = decode_tiled(shared(), latent, num_frames, tiling, group)
        assert encoded.shape == latent.shape and decoded.shape == video.shape
        made[name] = encoded, decoded
    return made


@pytest.fixture(scope="module")
def on_one_rank():
    return tiled(None)


def differs_from(expected):
    """The cases this rank has otherwise."""
    made = tiled(dist.group.WORLD)
    assert made.keys() == expected.keys()
    return [name for name in made if not all(map(torch.equal, made[name], expected[name]))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_tiles_on_several_ranks_are_those_of_one_on_every_rank(world_size, on_one_rank):
    """Clips of two, tiles that ranks do not divide, a short last one. Seen to catch: a round gathered in
    reverse; a short last tile sent with the zeros after it; every rank the first tile.
    """
    assert run_on_ranks(differs_from, on_one_rank, world_size=world_size) == [[]] * world_size


def shares():
    """Numbers of frames this rank encoded and decoded, of 129, and rounds before the first frames came."""
    model, encoded, decoded = shared(), [], []
    encode, decode = model.encode_stream, model.decode_stream

    def watched(videos):
        return encode(encoded.append(part.shape[1]) or part for part in videos)

    model.encode_stream = watched
    model.decode_stream = lambda latents, frames: decoded.append(frames) or decode(latents, frames)
    encode_tiled(model, random_video(1, 129, 3, 8, 8), group=dist.group.WORLD)
    frames = decode_frames(model, random_latent(1, 17, 4, 1, 1), 129, group=dist.group.WORLD)
    next(frames)
    first_round = list(decoded)
    list(frames)
    return sum(encoded), first_round, decoded


def test_every_rank_makes_its_share_a_round_at_a_time():
    """Seen to catch: every rank that makes all tiles; all rounds before the first frame."""
    first, second = run_on_ranks(shares)
    assert [rank[0] for rank in (first, second)] == [32 + 32 + 1, 32 + 32]
    assert [rank[1] for rank in (first, second)] == [[32], [32]]
    assert [rank[2] for rank in (first, second)] == [[32, 32, 32, 32], [32, 32, 32, 17]]


def refusals():
    """What this rank says of a clip whose bad frame is in the tile of another."""
    clip = random_video(1, 64, 3, 8, 8)
    clip[0, 50] = torch.nan
    messages = []
    for call in (
        lambda: encode_tiled(shared(), clip, group=dist.group.WORLD),
        lambda: decode_tiled(shared(), random_latent(1, 8, 4, 1, 1), 65, group=dist.group.WORLD),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_clip_that_one_rank_can_not_encode_is_refused_by_all():
    """Seen to catch: a check by the rank whose tile it is, while the others wait for that tile."""
    first, second = run_on_ranks(refusals, timeout_seconds=60)
    assert first == second
    assert "frames 50" in first[0] and "hold 57 to 64 frames, not 65" in first[1]
