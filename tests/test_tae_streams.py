"""Clips in chunks of frames: the numbers of the whole clip, as soon as they are known, in steady memory."""

import itertools

import pytest
import torch
from autoencoders import (
    EXACT,
    KINDS,
    MostAlive,
    decoder_reach,
    encoder_reach,
    random_latent,
    random_video,
    shared,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_moviegen.tae.layers import SpaceTimeConv, TemporalConv

CASES = settings(derandomize=True, deadline=None, max_examples=40)
CHUNKS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def in_chunks(x_BTCHW, lengths):
    """Of the lengths, again and again."""
    lengths, start = itertools.cycle(lengths), 0
    while start < x_BTCHW.shape[1]:
        length = next(lengths)
        yield x_BTCHW[:, start : start + length]
        start += length


def joined(chunks):
    """Every chunk holds a frame or more."""
    chunks = list(chunks)
    assert all(chunk.shape[1] for chunk in chunks)
    return torch.cat(chunks, dim=1)


@CASES
@given(st.sampled_from(KINDS), st.sampled_from([3, 3, 1, 5]), st.integers(1, 41), CHUNKS, st.integers(1, 9))
@example(("2.5D", 8), 3, 41, [1], 1)
@example(("3D", 8), 3, 41, [1], 1)
@example(("2.5D", 8), 1, 9, [1], 1)
@example(("3D", 2), 1, 3, [3], 3)
def test_a_stream_of_frames_is_encoded_as_the_whole_clip(kind, kernel, num_frames, lengths, most):
    """Seen to catch: a chunk's first frame repeated before it; the frame that a stride skips between chunks
    seen again (a kernel of one); a shortcut of the newest frames and not of the oldest.
    """
    model, video = shared(*kind, kernel), random_video(2, num_frames, 3, 8, 16)
    whole = model.encode(video).mean_BTCHW
    found = joined(model.encode_stream(in_chunks(video, lengths), most))
    torch.testing.assert_close(found, whole, rtol=0, atol=EXACT)


@CASES
@given(
    st.sampled_from(KINDS),
    st.sampled_from([3, 3, 1, 5]),
    st.integers(1, 41),
    st.booleans(),
    CHUNKS,
    st.integers(1, 9),
)
@example(("2.5D", 8), 3, 41, True, [1], 1)
@example(("3D", 8), 3, 41, True, [1], 1)
def test_a_stream_of_latents_is_decoded_as_the_whole_clip(kind, kernel, num_frames, cut, lengths, most):
    """Seen to catch: temporal attention that gives a frame before the three behind it are there; frames past
    `num_frames` dropped from every chunk in place of the clip.
    """
    model = shared(*kind, kernel)
    latent = random_latent(2, -(-num_frames // kind[1]), 4, 1, 2)
    num_frames = num_frames if cut else None
    whole = model.decode(latent, num_frames)
    found = joined(model.decode_stream(in_chunks(latent, lengths), num_frames, most))
    torch.testing.assert_close(found, whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_through_one_convolution_marks_its_last_chunk_alone(whole, kernel, stride):
    """What comes next repeats the last frame there. Seen to catch: no last chunk (a stride after one tap)."""
    torch.manual_seed(0)
    if whole:
        size = shared("3D", 8, kernel).size
        layer = SpaceTimeConv(3, 3, size, temporal_stride=stride).double().requires_grad_(False)
    else:
        layer = TemporalConv(3, kernel, stride).double().requires_grad_(False)
        torch.nn.init.normal_(layer.conv.weight)
    for num_frames, length in itertools.product(range(1, 9), range(1, 5)):
        x_BTHWC = random_video(1, num_frames, 2, 2, 3)
        chunks = [*in_chunks(x_BTHWC, [length])]
        marks = [False] * (len(chunks) - 1) + [True]
        found, found_marks = zip(*layer.stream(zip(chunks, marks, strict=True), most=3), strict=True)
        assert found_marks[-1] and not any(found_marks[:-1])
        assert all(chunk.shape[1] <= 3 for chunk in found)
        torch.testing.assert_close(joined(found), layer(x_BTHWC), rtol=0, atol=EXACT)


class Fed:
    """Frames one at a time, and how many were asked for."""

    def __init__(self, x_BTCHW):
        self.x_BTCHW, self.asked = x_BTCHW, 0

    def __iter__(self):
        for frame in self.x_BTCHW.split(1, dim=1):
            self.asked += 1
            yield frame

    def asked_for_each(self, stream):
        """Frames asked for by the time each of the stream's came out."""
        return [self.asked for chunk in stream for _ in range(chunk.shape[1])]


@pytest.mark.parametrize(("inflation", "compression"), KINDS)
def test_a_latent_comes_out_with_the_last_frame_it_sees(inflation, compression):
    """One frame is read ahead, to know the last. Seen to catch: a layer that waits for the whole clip."""
    model, num_frames = shared(inflation, compression), 160
    reach = encoder_reach(model.size) if inflation != "2D" else 0
    fed = Fed(random_video(1, num_frames, 3, 8, 8))
    found = fed.asked_for_each(model.encode_stream(fed))
    assert len(found) == num_frames // compression
    sees = [compression * t + reach for t in range(len(found))]
    assert found == [min(last + 2, num_frames) for last in sees]
    assert found[0] < num_frames


@pytest.mark.parametrize(("inflation", "compression"), KINDS)
def test_a_frame_comes_out_with_the_last_latent_it_sees(inflation, compression):
    """Seen to catch: a reach of one latent more in temporal attention's stream than in its mask."""
    model, num_latents = shared(inflation, compression), 40
    reach = decoder_reach(model.size) if inflation != "2D" else 0
    fed = Fed(random_latent(1, num_latents, 4, 1, 1))
    found = fed.asked_for_each(model.decode_stream(fed))
    assert len(found) == num_latents * compression
    sees = [(frame + reach) // compression for frame in range(len(found))]
    assert found == [min(last + 2, num_latents) for last in sees]
    assert found[0] < num_latents


def most_alive(stream, *given):
    with MostAlive(*given) as alive:
        for _ in stream():
            pass
    return alive.most


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_memory_of_a_stream_does_not_grow_with_the_clip(inflation):
    """Bytes of all tensors alive at once. Seen to catch: frames attention no longer sees kept; a shortcut's
    frames kept after they were taken.
    """
    model = shared(inflation)

    def chunks(number, *shape):
        return (torch.ones(1, *shape, dtype=torch.float64) for _ in range(number))

    encoder, encoder_longer = (
        most_alive(lambda n=n: model.encode_stream(chunks(n, 4, 3, 8, 8))) for n in (30, 45)
    )
    decoder, decoder_longer = (
        most_alive(lambda n=n: model.decode_stream(chunks(n, 1, 4, 1, 1))) for n in (20, 30)
    )
    assert encoder_longer <= encoder
    assert decoder_longer <= decoder


def test_memory_of_a_stream_grows_with_the_frames_at_once_and_not_with_the_chunks():
    """Seen to catch: `most` not handed on to the layers; values of a whole chunk checked at once."""
    model, video = shared(), random_video(1, 160, 3, 8, 8)
    few, more = (most_alive(lambda m=m: model.encode_stream([video], m), video) for m in (1, 16))
    one_by_one = most_alive(lambda: model.encode_stream(video.split(1, dim=1), 1), video)
    assert few == one_by_one
    assert more > 2 * few


def test_a_stream_keeps_nothing_for_a_gradient():
    """Seen to catch: gradients of a decoded stream."""
    model = shared().requires_grad_(True)
    latent = joined(model.encode_stream([random_video(1, 9, 3, 8, 8)]))
    assert not latent.requires_grad
    assert not joined(model.decode_stream([latent])).requires_grad
    model.requires_grad_(False)


def test_a_stream_of_no_chunks_is_refused():
    """Seen to catch: no frames without a word."""
    for stream in (shared().encode_stream, shared().decode_stream):
        with pytest.raises(ValueError, match="a stream of no chunks has no clip: pass one frame or more"):
            next(stream(iter(())))


@pytest.mark.parametrize("num_frames", [0, 16, 25, 100])
def test_a_stream_that_holds_another_number_of_frames_is_refused_at_the_latest_at_its_end(num_frames):
    """Seen to catch: a longer clip cut without a word."""
    stream = shared().decode_stream(random_latent(1, 3, 4, 1, 1).split(1, dim=1), num_frames)
    with pytest.raises(ValueError, match=f"3 latent frames hold 17 to 24 frames, not {num_frames}: pass"):
        list(stream)


def test_frames_of_a_stream_that_are_no_video_are_named_by_their_number_in_the_clip():
    """Seen to catch: their number in the chunk."""
    video = random_video(1, 20, 3, 8, 8)
    video[0, 13, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values \(frames 13\)"):
        list(shared().encode_stream(video.split(4, dim=1)))
