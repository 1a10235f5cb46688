"""Tiling of the autoencoder: short clips as without it, long ones tile by tile, seams where the paper puts
them and nowhere else, memory that stays."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from autoencoders import (
    EXACT,
    KINDS,
    MostAlive,
    autoencoder,
    decoder_reach,
    encoder_reach,
    random_latent,
    random_video,
    shared,
    small,
)

import recipes
from nemo_moviegen.tae.model import FRAMES_AT_ONCE
from nemo_moviegen.tae.tiling import Tiling, decode_frames, decode_tiled, encode_tiled, trained_frames

WHOLE = Tiling(frames=0)


def assert_equal(found, expected):
    """Up to rounding: a tile goes through as a stream, which adds up in another order than the whole."""
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def video(num_frames):
    return random_video(2, num_frames, 3, 16, 24, seed=num_frames)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
@pytest.mark.parametrize("num_frames", [1, 2, 8, 9, 31, 32])
def test_a_clip_of_one_tile_is_encoded_as_without_tiles(inflation, num_frames):
    model = shared(inflation)
    assert_equal(encode_tiled(model, video(num_frames)), model.encode(video(num_frames)).mean_BTCHW)


@pytest.mark.parametrize("num_frames", [33, 40, 64, 73, 96])
def test_a_long_clip_is_the_latents_of_its_tiles_one_after_the_other(num_frames):
    """Also one whose last tile is short: 33 frames are a tile and one frame.

    Seen to catch: tiles of the encoder that overlap.
    """
    model = shared()
    found = encode_tiled(model, video(num_frames))
    tiles = [model.encode(tile).mean_BTCHW for tile in video(num_frames).split(32, dim=1)]
    assert_equal(found, torch.cat(tiles, dim=1))
    assert found.shape == (2, -(-num_frames // 8), 4, 2, 3)
    whole = model.encode(video(num_frames)).mean_BTCHW
    assert not torch.allclose(found, whole, atol=1e-3), "the kernels do not look over a tile's edge"


@pytest.mark.parametrize("num_frames", [1, 5, 8, 9, 25, 32])
def test_latents_of_one_tile_are_decoded_as_without_tiles(num_frames):
    """Seen to catch: whole latents of frames, and not the clip's."""
    model, latent = shared(), random_latent(2, -(-num_frames // 8), 4, 2, 3)
    assert_equal(decode_tiled(model, latent, num_frames), model.decode(latent, num_frames))


@pytest.mark.parametrize("num_frames", [65, 67, 72])
def test_decoded_tiles_of_four_latents_share_two_and_are_blended_over_sixteen_frames(num_frames):
    """Nine latents, frame by frame. Seen to catch: the weights of the two tiles exchanged; the last tile's
    overlap weighted as if the tile were whole; tiles that share one latent.
    """
    model, latent = shared(), random_latent(2, 9, 4, 2, 3)
    tiles = [model.decode(latent[:, first : first + 4]) for first in (0, 2, 4)]
    tiles.append(model.decode(latent[:, 6:9], num_frames - 48))
    expected = torch.empty(2, num_frames, 3, 16, 24, dtype=torch.float64)
    expected[:, :16] = tiles[0][:, :16]
    for number in (1, 2, 3):
        for j in range(16):
            earlier, later = tiles[number - 1][:, 16 + j], tiles[number][:, j]
            expected[:, 16 * number + j] = (1 - j / 16) * earlier + j / 16 * later
    expected[:, 64:] = tiles[3][:, 16:]
    assert_equal(decode_tiled(model, latent, num_frames), expected)


@pytest.mark.parametrize(("inflation", "compression"), KINDS)
def test_tiling_over_no_frames_is_the_whole_clip(inflation, compression):
    """Seen to catch: windows of one latent in place of one window."""
    model, num_frames = shared(inflation, compression), 70
    clip = random_video(1, num_frames, 3, 8, 16)
    latent = model.encode(clip).mean_BTCHW
    assert_equal(encode_tiled(model, clip, WHOLE), latent)
    assert_equal(decode_tiled(model, latent, num_frames, WHOLE), model.decode(latent, num_frames))


@pytest.mark.parametrize(("inflation", "compression"), KINDS)
def test_every_compression_has_tiles_of_32_frames_that_share_16(inflation, compression):
    """Seen to catch: four latents a tile, however many frames they hold."""
    model, tile, shared_latents = shared(inflation, compression), 32 // compression, 16 // compression
    latent = random_latent(1, 2 * tile - shared_latents, 4, 1, 2)
    first, second = model.decode(latent[:, :tile]), model.decode(latent[:, tile - shared_latents :])
    rising = (torch.arange(16, dtype=torch.float64) / 16)[:, None, None, None]
    blended = (1 - rising) * first[:, 16:] + rising * second[:, :16]
    found = decode_tiled(model, latent)
    assert_equal(found, torch.cat([first[:, :16], blended, second[:, 16:]], dim=1))
    clip = random_video(1, 48, 3, 8, 16)
    halves = [model.encode(part).mean_BTCHW for part in clip.split(32, dim=1)]
    assert_equal(encode_tiled(model, clip), torch.cat(halves, dim=1))


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
@pytest.mark.parametrize("compression", [2, 8])
def test_the_reach_in_time_is_that_of_the_architecture(inflation, compression):
    """A frame's gradient is zero beyond, and not at its ends: the measure of the next test's seams.

    Seen to catch: a mask of one latent more.
    """
    model = shared(inflation, compression)
    reach, num_latents = decoder_reach(model.size), 100 if compression == 2 else 50
    latent = random_latent(1, num_latents, 4, 1, 1).requires_grad_()
    frame = num_latents // 2 * compression + 1
    (gradient,) = torch.autograd.grad(model.decode(latent)[:, frame].sum(), latent)
    sees = gradient.abs().amax((0, 2, 3, 4)).nonzero().flatten()
    assert (sees[0], sees[-1]) == ((frame - reach) // compression, (frame + reach) // compression)
    assert len(sees) == sees[-1] - sees[0] + 1

    reach = encoder_reach(model.size)
    clip = random_video(1, 300, 3, 8, 8).requires_grad_()
    t = 150 // compression
    (gradient,) = torch.autograd.grad(model.encode(clip).mean_BTCHW[:, t].sum(), clip)
    sees = gradient.abs().amax((0, 2, 3, 4)).nonzero().flatten()
    assert (sees[0], sees[-1]) == (compression * t - reach, compression * t + reach)


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
@pytest.mark.parametrize("compression", [2, 8])
def test_frames_farther_from_every_seam_than_the_decoder_reaches_are_those_of_the_whole_clip(
    inflation, compression
):
    """And some nearer are not. Tiles so long that there are such frames in the middle of each.

    Seen to catch: temporal attention without its mask, which sees the clip's length and the tile's.
    """
    model = shared(inflation, compression)
    reach = decoder_reach(model.size)
    tile, overlap = -(-(2 * reach + 48) // 8) * 8, 16
    starts, num_frames = (0, tile - overlap, 2 * (tile - overlap)), 3 * tile - 2 * overlap - 8
    seams = torch.tensor([*starts[1:], *(start + tile for start in starts[:2])])
    latent = random_latent(1, num_frames // compression, 4, 1, 1)
    tiled = decode_tiled(model, latent, num_frames, Tiling(frames=tile, overlap_frames=overlap))
    difference_T = (tiled - model.decode(latent)).abs().amax((0, 2, 3, 4))
    far_T = ((torch.arange(num_frames)[:, None] - seams).abs() > reach).all(dim=1)
    assert all(far_T[start : start + tile].any() for start in starts)
    assert difference_T[far_T].amax() < EXACT
    assert difference_T[~far_T].amax() > 1e-3


class Constant(torch.nn.Linear):
    """A stand-in for the decoder: every frame of every tile one value."""

    size = small()

    def __init__(self, value):
        super().__init__(1, 1)
        self.double()
        self.value = value

    frames_kept = type(shared()).frames_kept

    def decode(self, latent_BTCHW, num_frames=None):
        B, T, _, H, W = latent_BTCHW.shape
        return torch.full((B, num_frames or 8 * T, 3, 8 * H, 8 * W), self.value, dtype=torch.float64)

    def decode_stream(self, latents, num_frames=None):
        yield self.decode(torch.cat(list(latents), dim=1), num_frames)


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(size_px=48, overlap_px=24),
        Tiling(frames=24, overlap_frames=8, size_px=64, overlap_px=24),
        Tiling(frames=0, size_px=8, overlap_px=0),
        Tiling(overlap_frames=0, size_px=24, overlap_px=8),
    ],
)
def test_weights_of_tiles_in_time_and_space_sum_to_one(tiling):
    """What all tiles agree on is the same in the whole. Seen to catch: weights of single precision."""
    found = decode_tiled(Constant(0.7), random_latent(1, 9, 4, 11, 13), 67, tiling)
    assert found.shape == (1, 67, 3, 88, 104)
    torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=0, atol=1e-14)


def test_a_frame_within_one_spatial_tile_is_as_without():
    """Seen to catch: tiles of half the size asked for."""
    model, latent = shared(), random_latent(2, 5, 4, 2, 3)
    tiling = Tiling(size_px=24, overlap_px=8)
    assert torch.equal(encode_tiled(model, video(33), tiling), encode_tiled(model, video(33)))
    assert torch.equal(decode_tiled(model, latent, 33, tiling), decode_tiled(model, latent, 33))


def test_spatial_tiles_are_blended_linearly_over_what_they_share():
    """Two rows by three columns, pixel by pixel. Seen to catch: rows and columns exchanged; an overlap of
    latents in place of pixels.
    """
    model, latent = shared(), random_latent(1, 2, 4, 5, 7)
    tiling = Tiling(size_px=24, overlap_px=8)
    rows, columns = [(0, 3), (2, 5)], [(0, 3), (2, 5), (4, 7)]

    def share(spans, number, place):
        (start, end), rising, falling = spans[number], 1.0, 1.0
        if number and place < spans[number - 1][1] * 8:
            rising = (place - start * 8) / 8
        if number + 1 < len(spans) and place >= spans[number + 1][0] * 8:
            falling = 1 - (place - spans[number + 1][0] * 8) / 8
        return rising * falling if start * 8 <= place < end * 8 else 0.0

    expected = torch.zeros(1, 16, 3, 40, 56, dtype=torch.float64)
    for r, (top, bottom) in enumerate(rows):
        for c, (left, right) in enumerate(columns):
            tile = model.decode(latent[..., top:bottom, left:right])
            for y in range(8 * top, 8 * bottom):
                for x in range(8 * left, 8 * right):
                    weight = share(rows, r, y) * share(columns, c, x)
                    expected[..., y, x] += weight * tile[..., y - 8 * top, x - 8 * left]
    assert_equal(decode_tiled(model, latent, tiling=tiling), expected)


def test_spatial_tiles_of_the_encoder_are_blended_over_latents():
    """Seen to catch: weights of pixels."""
    model, clip = shared(), random_video(1, 9, 3, 16, 56)
    tiles = [model.encode(clip[..., left : left + 32]).mean_BTCHW for left in (0, 16, 32)]
    tiles[2] = model.encode(clip[..., 32:]).mean_BTCHW
    expected = torch.cat([tiles[0][..., :2], *(torch.empty(1, 2, 4, 2, 2).double() for _ in "ab")], dim=4)
    for number in (1, 2):
        for j in range(2):
            earlier, later = tiles[number - 1][..., 2 + j], tiles[number][..., j]
            expected[..., 2 * number + j] = (1 - j / 2) * earlier + j / 2 * later
    expected = torch.cat([expected, tiles[2][..., 2:]], dim=4)
    assert_equal(encode_tiled(model, clip, Tiling(size_px=32, overlap_px=16)), expected)


@pytest.mark.parametrize("tiling", [Tiling(), WHOLE, Tiling(frames=8, overlap_frames=0)])
def test_an_image_is_as_without_tiles(tiling):
    """Seen to catch: all eight frames of an image."""
    model, image = shared(), video(1)
    latent = model.encode(image).mean_BTCHW
    assert_equal(encode_tiled(model, image, tiling), latent)
    found = decode_tiled(model, latent, 1, tiling)
    assert found.shape == (2, 1, 3, 16, 24)
    assert torch.equal(found, model.decode(latent, 1))


def test_frames_are_handed_out_before_the_next_tile_is_decoded():
    """Seen to catch: all tiles decoded before the first frame."""
    model, asked = autoencoder().requires_grad_(False), []
    stream = model.decode_stream

    def watched(latents, num_frames):
        asked.append(num_frames)
        return stream(latents, num_frames)

    model.decode_stream = watched
    latent = random_latent(1, 10, 4, 1, 1)
    place, tiles_begun = 0, []
    for frames in decode_frames(model, latent, 73):
        tiles_begun += [len(asked)] * frames.shape[1]
        place += frames.shape[1]
    assert place == 73 and asked == [32, 32, 32, 25]
    assert tiles_begun == [1] * 16 + [2] * 16 + [3] * 16 + [4] * 25


def test_memory_of_the_encoder_does_not_grow_with_the_clip():
    """A stand-in that holds ten times its chunk, in memory that tracemalloc sees.

    Seen to catch: the chunks of a tile joined before they are encoded.
    """

    class Watched(torch.nn.Linear):
        size = small()

        def encode_stream(self, videos):
            for chunk_BTCHW in videos:
                held = np.tile(chunk_BTCHW.numpy(), (10, 1, 1, 1, 1))
                yield torch.from_numpy(held[:1, :1, :, ::8, ::8].copy())

    peaks = []
    for num_tiles in (1, 8):
        clip = torch.rand(1, num_tiles * 32, 3, 32, 32)
        tracemalloc.start()
        encode_tiled(Watched(1, 1), clip)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    chunk_bytes = FRAMES_AT_ONCE * 3 * 32 * 32 * 4
    # Twice: what the stand-in holds of a chunk lives until it has that of the next.
    assert 20 * chunk_bytes < peaks[0] < 22 * chunk_bytes and peaks[1] < 1.1 * peaks[0]


def bytes_alive(run, given):
    """Run over the chunks of a generator, or what gives none."""
    with MostAlive(given) as alive:
        for _ in run():
            pass
    return alive.most


@pytest.mark.parametrize(("tiling", "lengths"), [(Tiling(), (8, 20)), (WHOLE, (20, 30))])
def test_memory_of_encoder_and_decoder_does_not_grow_with_the_clip(tiling, lengths):
    """Bytes of all tensors alive at once, but for those asked for: latents, all; frames, a few at a time.

    Seen to catch: a decoded tile held whole; overlapping frames kept after they were handed out.
    """
    model = shared()
    encoder, decoder = [], []
    for num_latents in lengths:
        clip, latent = random_video(1, 8 * num_latents, 3, 8, 8), random_latent(1, num_latents, 4, 1, 1)
        encoder.append(bytes_alive(lambda clip=clip: encode_tiled(model, clip, tiling), clip))
        encoder[-1] -= 2 * latent.nbytes  # mean and variance, of which the mean is asked for
        decoder.append(bytes_alive(lambda latent=latent: decode_frames(model, latent, tiling=tiling), latent))
    assert encoder[1] <= encoder[0]
    assert decoder[1] <= decoder[0]


def test_memory_of_the_encoder_does_not_grow_with_the_tile():
    """Seen to catch: the chunks of a tile joined before they are encoded."""
    model, clip = shared(), random_video(1, 320, 3, 8, 8)
    short, long = (
        bytes_alive(lambda f=f: encode_tiled(model, clip, Tiling(frames=f, overlap_frames=0)), clip)
        for f in (160, 320)
    )
    assert long == pytest.approx(short, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"frames": 30}, "tiling.frames is 30; use a multiple of 8, for example 32"),
        ({"frames": -8}, "tiling.frames is -8; use a multiple of 8, for example 0"),
        ({"overlap_frames": 4}, "tiling.overlap_frames is 4; use a multiple of 8"),
        ({"size_px": 260}, "tiling.size_px is 260; use a multiple of 8, for example 256"),
        ({"overlap_px": 63}, "tiling.overlap_px is 63; use a multiple of 8, for example 64"),
        (
            {"overlap_frames": 24},
            "overlap_frames 24 is over half of tiling.frames 32: three .* use 16 at most",
        ),
        ({"frames": 24}, "overlap_frames 16 is over half of tiling.frames 24: three .* use 8 at most"),
        ({"size_px": 64}, "overlap_px 64 is over half of tiling.size_px 64: three .* use 32 at most"),
    ],
)
def test_tiles_that_are_no_latents_or_meet_in_threes_are_refused(sizes, says):
    """Seen to catch: parts of a latent; overlaps of up to a whole tile."""
    with pytest.raises(ValueError, match=says):
        Tiling(**sizes)


@pytest.mark.parametrize(("num_frames", "tile"), [(1, 8), (16, 16), (17, 24), (32, 32), (256, 32)])
def test_tiles_are_as_long_as_the_clips_trained_on_and_never_longer_than_the_paper_s(num_frames, tile):
    """Seen to catch: 32 whatever the recipe says."""
    recipe = recipes.get("tae.tiny")
    bucket = replace(recipe.data.bucket, num_frames=num_frames)
    assert trained_frames(replace(recipe, data=replace(recipe.data, bucket=bucket))) == tile


def test_a_length_the_latents_do_not_hold_is_refused_before_any_tile():
    """Seen to catch: a length taken as given."""
    frames = decode_frames(Constant(0.0), random_latent(1, 9, 4, 1, 1), 64)
    with pytest.raises(ValueError, match="9 latent frames hold 65 to 72 frames, not 64"):
        next(frames)


@pytest.mark.parametrize("tiling", [Tiling(), WHOLE, Tiling(size_px=16, overlap_px=8)])
def test_what_the_encoder_refuses_is_refused_in_tiles_too(tiling):
    """Frames by their number in the clip. Seen to catch: their number in a tile or chunk; four columns of
    pixels that spatial tiles left out without a word.
    """
    clip = video(70)
    clip[1, 45, 0, 3, 3] = torch.nan
    for wrong, says in (
        (clip, r"NaN or infinite values \(frames 45\)"),
        (clip[..., :20], "video is 20x16 px; width and height must be multiples of 8"),
        (clip[:, :0], "one frame or more"),
        (clip.transpose(1, 2), "looks like"),
        (clip[0], "height, width"),
    ):
        with pytest.raises(ValueError, match=says):
            encode_tiled(shared(), wrong, tiling)
