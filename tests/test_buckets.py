"""Buckets: every clip lands in one or is refused in words, by the bounds of Table 2."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.buckets import BUCKET_SETS, BucketSet, DurationBucket, bucket_set
from nemo_moviegen.data.buckets import assign
from nemo_moviegen.data.clips import Clip
from nemo_moviegen.recipe import Layout
from nemo_moviegen.sizes import VIDEO_30B, VIDEO_TINY

LARGE = bucket_set("video_768")


def a_clip(seconds=10.0, *, size=(1920, 1080), fps=30.0, start=0.0, kind="video"):
    return Clip(
        clip_id="a",
        path="/a.mp4",
        kind=kind,
        start_seconds=start,
        end_seconds=start + (seconds if kind == "video" else 0),
        source_fps=fps,
        width_px=size[0],
        height_px=size[1],
        codec="h264",
        caption="",
    )


def landed(clip, buckets=LARGE):
    """(bucket, start, end, fps) of a clip that lands."""
    found = assign([clip], buckets)
    assert found.reason(0) == ""
    return found.buckets[found.bucket_N[0]], found.start_N[0], found.end_N[0], found.fps_N[0]


def refusal(clip, buckets=LARGE):
    found = assign([clip], buckets)
    assert found.bucket_N.tolist() == [-1]
    return found.reason(0)


AT_24 = 256 / 24


@pytest.mark.parametrize(
    ("seconds", "frames", "fps", "taken"),
    [
        (4, 128, 32, 4),
        (6, 128, 128 / 6, 6),
        (math.nextafter(8 - 1e-5, 0), 128, 128 / (8 - 1e-5), 8 - 1e-5),
        (8, 192, 24, 8),
        (AT_24 - 1e-5, 192, 192 / (AT_24 - 1e-5), AT_24 - 1e-5),
        (AT_24, 256, 24, AT_24),
        (12 - 1e-5, 256, 24, AT_24),
        (12, 256, 256 / 12, 12),
        (15, 256, 256 / 15, 15),
        (16, 256, 16, 16),
        (119.9, 256, 16, 16),
    ],
)
def test_durations_go_to_the_rows_of_table_2(seconds, frames, fps, taken):
    bucket, start, end, found_fps = landed(a_clip(seconds, start=3.0))
    assert bucket.num_frames == frames
    assert (found_fps, end - start) == pytest.approx((fps, taken), abs=1e-6)
    assert (start + end) / 2 == pytest.approx(3 + seconds / 2)  # the middle of the clip
    assert found_fps * (end - start) == pytest.approx(frames)  # which those frames fill


def test_a_span_that_is_a_rounding_error_short_counts_as_whole():
    # 0.1 * 3 + 8 is no 8.3: what cutting at multiples of a length gives
    start = 0.1 + 0.2
    clip = replace(a_clip(), start_seconds=start, end_seconds=math.nextafter(start + 8, 0))
    assert clip.end_seconds - clip.start_seconds < 8
    assert landed(clip)[0].num_frames == 192


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1920, 1080), (576, 1024)),
        ((1080, 1920), (1024, 576)),
        ((1440, 1080), (672, 896)),
        ((1080, 1440), (896, 672)),
        ((1000, 1000), (768, 768)),
        ((1919, 1081), (576, 1024)),
        ((1920, 803), (576, 1024)),  # film of 2.39:1 keeps 74%
        ((1153, 1000), (768, 768)),  # the middle of 1:1 and 4:3, by the logarithm, is sqrt(4/3) = 1.1547
        ((1156, 1000), (672, 896)),
        ((1000, 1153), (768, 768)),
        ((1000, 1156), (896, 672)),
    ],
)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_pictures_go_to_the_nearest_aspect_ratio(size, bucket, kind):
    found, *_ = landed(a_clip(size=size, kind=kind))
    assert (found.height_px, found.width_px) == bucket
    assert (found.num_frames == 1) == (kind == "image")


def test_an_image_has_no_duration_and_no_frame_rate_to_fail_on():
    bucket, start, end, fps = landed(a_clip(kind="image", fps=0.0, start=2.5))
    assert (bucket.num_frames, start, end, fps) == (1, 2.5, 2.5, LARGE.image_fps)


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (a_clip(3.9999), r"4.000 s is too short for video_768, whose clips start at 4 s: use buckets"),
        (a_clip(120), r"120.000 s is too long for video_768, whose clips end below 120 s: cut it"),
        (a_clip(size=(3000, 800)), r"crop of 3000x800 px .* 1024x576, .* keeps 47% .* less than 70%: crop"),
        (a_clip(size=(1280, 540)), r"1280x540 px has to grow 1.07 times to fill 1024x576, .* more than 1.05"),
        (a_clip(4, fps=23.0), r"23 frames a second are too few for the 32.00 .* up to 1.34 times"),
        (a_clip(fps=0.0), r"its frame rate is 0: probe the file again"),
        (a_clip(fps=math.nan), r"its frame rate is nan: probe the file again"),
        (a_clip(size=(0, 720)), r"its size is 0x720 px: probe the file again"),
        (a_clip(kind="image", size=(320, 240)), r"320x240 px has to grow 2.80 times to fill 896x672"),
    ],
)
def test_what_fits_no_bucket_is_refused_with_its_numbers(clip, reason):

    assert re.search(reason, refusal(clip))


def test_film_of_4_seconds_may_repeat_frames_as_table_2_asks():
    # 32 frames a second of 24, also of 24/1.001
    assert landed(a_clip(4, fps=24.0))[3] == 32
    assert landed(a_clip(4, fps=24 / 1.001))[3] == 32


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    clips=st.lists(
        st.builds(
            a_clip,
            st.one_of(st.floats(0.01, 200), st.sampled_from([0.5, 1, 4, 8, AT_24, 12, 16, 120])),
            size=st.tuples(st.integers(0, 4000), st.integers(0, 4000)),
            fps=st.one_of(st.just(0.0), st.floats(0.1, 120)),
            start=st.floats(0, 1000),
            kind=st.sampled_from(["video", "image"]),
        ),
        min_size=1,
        max_size=20,
    ),
    name=st.sampled_from(sorted(BUCKET_SETS)),
)
def test_every_clip_lands_in_exactly_one_bucket_or_has_a_reason(clips, name):
    found = assign(clips, bucket_set(name))
    for row, clip in enumerate(clips):
        number = found.bucket_N[row]
        assert (number == -1) == bool(found.reason(row))
        alone = assign([clip], bucket_set(name))  # whatever else is in the manifest
        assert (alone.bucket_N[0], alone.reason(0)) == (number, found.reason(row))
        if number == -1:
            continue
        bucket, seconds = found.buckets[number], found.end_N[row] - found.start_N[row]
        assert (bucket.num_frames == 1) == (clip.kind == "image") == (seconds == 0)
        assert clip.start_seconds - 1e-9 <= found.start_N[row] <= found.end_N[row] <= clip.end_seconds + 1e-9
        if clip.kind == "video":
            assert found.fps_N[row] * seconds == pytest.approx(bucket.num_frames)
            assert bucket.num_frames <= 1.34 * clip.source_fps * seconds
        scale = max(bucket.height_px / clip.height_px, bucket.width_px / clip.width_px)
        assert scale <= 1.05  # the source fills the bucket
        kept = bucket.height_px * bucket.width_px / (scale**2 * clip.height_px * clip.width_px)
        assert kept >= 0.7 - 1e-9


def test_the_rows_of_a_manifest_are_told_apart():
    found = assign([a_clip(5), a_clip(1), a_clip(9), a_clip(kind="image"), a_clip(20)], LARGE)
    assert [found.buckets[n].num_frames if n >= 0 else None for n in found.bucket_N] == [
        128,
        None,
        192,
        1,
        256,
    ]
    assert np.flatnonzero(found.bucket_N < 0).tolist() == [1]


@pytest.mark.parametrize("name", sorted(BUCKET_SETS))
def test_every_bucket_fits_the_autoencoder_and_the_model(name):
    size = VIDEO_TINY if name == "tiny" else VIDEO_30B
    buckets = bucket_set(name).buckets
    assert len({(b.num_frames, b.height_px, b.width_px) for b in buckets}) == len(buckets)
    context = 2 if name != "video_256" else 1  # Table 3
    model_ranks = Layout(tensor=1 if name == "tiny" else 4, context=context).model_ranks
    for bucket in buckets:
        assert bucket.height_px % 16 == bucket.width_px % 16 == 0
        assert bucket.num_frames == 1 or bucket.num_frames % 8 == 0
        shape = (-(-bucket.num_frames // 8), bucket.height_px // 8, bucket.width_px // 8)
        assert size.num_tokens(shape) % model_ranks == 0
    areas = {bucket.height_px * bucket.width_px for bucket in buckets}
    assert max(areas) / min(areas) < 1.13


def test_the_largest_bucket_is_the_papers_73728_tokens():
    shapes = [
        (b.num_frames // 8, b.height_px // 8, b.width_px // 8) for b in LARGE.buckets if b.num_frames > 1
    ]
    assert VIDEO_30B.num_tokens((32, 96, 96)) == 73_728
    assert (32, 96, 96) in shapes and (32, 72, 128) in shapes


def test_buckets_that_leave_a_gap_or_overlap_are_refused():
    short = DurationBucket(shortest_seconds=1, longest_seconds=2, num_frames=8, fps=0)
    with pytest.raises(ValueError, match="ends at 2 s and the next starts at 3 s"):
        BucketSet(
            name="x",
            durations=(short, replace(short, shortest_seconds=3, longest_seconds=4)),
            sizes=((8, 8),),
        )
    with pytest.raises(ValueError, match="one size for each aspect ratio"):
        BucketSet(name="x", durations=(short,), sizes=((64, 64), (32, 32)))
    with pytest.raises(ValueError, match="16 frames at 8 a second take 2 s, but clips start at 1 s"):
        replace(short, num_frames=16, fps=8)
    with pytest.raises(ValueError, match="seconds that rise"):
        replace(short, longest_seconds=1)
    with pytest.raises(ValueError, match="no buckets called 'video_512'; use video_256, video_768, tiny"):
        bucket_set("video_512")
