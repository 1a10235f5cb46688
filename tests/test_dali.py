"""Frames that leave the DALI pipeline, against the same from first principles; order, batches and memory."""

import itertools
import threading
import tracemalloc
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import BUCKET, MEAN_ERROR, a_video, assert_close, load, reference, spoil, whole

from nemo_moviegen.data.clips import BIG_BUCK_BUNNY
from nemo_moviegen.data.cutting import cut_clips, image_of, probe_video, write_video
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.frames import nearest_frames, read_clip
from nemo_moviegen.recipe import Bucket

DALI_DECODES = pytest.mark.parametrize("decoder", [None, "dali"])


def test_real_h264_clips_equal_the_reference():
    clips = cut_clips(BIG_BUCK_BUNNY, 1.0, images=True)
    samples, _ = load(clips, order=[0, 3, 4])
    assert sorted(samples) == [0, 3, 4]
    for row, video in samples.items():
        assert video.dtype == torch.float32 and video.min() >= -1 and video.max() <= 1
        assert_close(video, reference(clips[row], BUCKET))
    # the reference would notice a wrong frame: neighbouring clips are far apart
    assert (samples[0] - samples[4]).abs().mean() > 100 * MEAN_ERROR


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.mp4", "libx265", "yuv420p"),
        ("a.webm", "libsvtav1", "yuv420p"),
    ],
)
def test_every_codec_equals_the_reference(tmp_path, name, codec, pix_fmt):
    clip = whole(a_video(tmp_path / name, codec=codec, pix_fmt=pix_fmt))
    samples, loader = load([clip])
    assert loader.quarantined == 0
    assert_close(samples[0], reference(clip, BUCKET))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libvpx-vp9", "yuv420p"), ("a.webm", "libvpx", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p")],
)
def test_what_dali_decodes_is_near_ffmpegs_quick_colours(tmp_path, name, codec, pix_fmt):
    clip = whole(a_video(tmp_path / name, codec=codec, pix_fmt=pix_fmt))
    samples, loader = load([clip], decoder="dali")
    assert loader.quarantined == 0
    with av.open(clip.path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:8]
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    video = torch.nn.functional.interpolate(video, size=[48, 48], mode="bilinear", antialias=True)
    # on flat parts two levels of 255 apart, more where colour, stored at half resolution, crosses an edge
    assert_close(samples[0], video[..., 6:42, :] / 127.5 - 1, mean=0.02, largest=0.15)


def test_dali_without_a_gpu_refuses_a_codec_it_cannot_decode(tmp_path):
    clips = [whole(a_video(tmp_path / f"{c}.mp4", codec=c)) for c in ("libx264", "libvpx-vp9")]
    samples, loader = load(clips, decoder="dali", quarantine=tmp_path / "quarantine")
    assert sorted(samples) == [1] and loader.quarantined == 1
    assert "libx264.mp4" in (tmp_path / "quarantine").read_text()


def test_codecs_meet_in_one_batch(tmp_path):
    clips = [
        whole(a_video(tmp_path / f"{n}.mp4", seed=n, codec=("libvpx-vp9", "libx264")[n % 2]))
        for n in range(4)
    ]
    loader = ClipLoader(clips, BUCKET, batch_size=4, order=[2, 1, 0, 3])
    ((video, rows),) = list(loader)
    assert video.shape == (4, 8, 3, 36, 48) and rows == [2, 1, 0, 3]
    for place, row in enumerate(rows):
        assert_close(video[place], reference(clips[row], BUCKET))


def shown_frames(video):
    """Which source frame each frame is, of a video whose frame n is a flat gray of level 4 n."""
    return ((video[:, 0].mean((1, 2)) + 1) * 127.5 / 4).round().int().tolist()


def numbered(path, fps, codec="libx264"):
    levels = np.arange(2 * fps, dtype=np.uint8)[:, None, None, None] * 4
    return write_video(path, np.ascontiguousarray(np.broadcast_to(levels, (2 * fps, 32, 32, 3))), fps, codec)


@DALI_DECODES
@pytest.mark.parametrize("source_fps", [12, 16, 25, 30])
def test_frame_k_shows_the_time_k_over_fps(tmp_path, decoder, source_fps):
    path = numbered(tmp_path / "a.mp4", source_fps, "libvpx-vp9" if decoder else "libx264")
    clip = replace(whole(path), start_seconds=0.5, end_seconds=1.5)
    samples, _ = load([clip], Bucket(num_frames=16, height_px=16, width_px=16, fps=16), decoder=decoder)
    # half way between two frames the earlier is taken (round half down), but none before the clip's start
    expected = [max(np.ceil(0.5 * source_fps), np.ceil((0.5 + k / 16) * source_fps - 0.5)) for k in range(16)]
    assert shown_frames(samples[0]) == expected


def test_each_clip_has_its_own_frame_rate(tmp_path):
    clips = [replace(whole(numbered(tmp_path / "a.mp4", 24)), clip_id=str(n)) for n in range(3)]
    bucket = Bucket(num_frames=6, height_px=16, width_px=16, fps=16)
    samples, _ = load(clips, bucket, fps=np.array([24.0, 12.0, 8.0]))
    assert [shown_frames(samples[row]) for row in range(3)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 4, 6, 8, 10],
        [0, 3, 6, 9, 12, 15],
    ]
    with pytest.raises(ValueError, match="2 frame rates for 3 clips"):
        ClipLoader(clips, bucket, batch_size=1, order=[0], fps=[24, 12])
    with pytest.raises(ValueError, match="the frame rate of clip 1 is 0"):
        load(clips, bucket, fps=[24, 0, 12])


def test_frames_after_the_clips_end_are_not_shown(tmp_path):
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    frames[10:] = 255  # a cut at 1.0 s
    path = write_video(tmp_path / "a.mp4", frames, 10)
    clip = replace(whole(path), start_seconds=0.0, end_seconds=1.0)
    # at 24 fps the frame at 0.96 s is nearest to the one at 1.0 s, which belongs to the next clip
    samples, _ = load([clip], Bucket(num_frames=24, height_px=16, width_px=16, fps=24))
    assert samples[0].max() < -0.9


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    wanted=st.lists(st.integers(-5, 120), min_size=1, max_size=9),
)
def test_the_nearest_frame_is_the_nearest(gaps, wanted):
    times = np.cumsum(gaps).astype(float)
    expected = [int(np.abs(times - time).argmin()) for time in wanted]  # argmin takes the earlier of two
    assert nearest_frames(times, np.array(wanted, float)).tolist() == expected


def test_a_clip_in_a_long_film_reads_its_own_packets_only(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (256, 48, 48, 1), np.uint8)
    path = write_video(tmp_path / "a.mp4", np.repeat(noise, 3, -1), 16)
    clip = replace(whole(path), start_seconds=14.0, end_seconds=15.0)
    encoded = read_clip(clip, 0, BUCKET, 16, keeps_packets=True)
    assert encoded.packets.nbytes < path.stat().st_size / 1.5  # VP9 has a key frame every 128 here
    samples, _ = load([clip])
    assert_close(samples[0], reference(clip, BUCKET))


def test_the_crop_is_the_middle_of_a_frame_scaled_to_cover(tmp_path):
    frames = np.zeros((16, 64, 128, 3), np.uint8)
    frames[:, :, :32] = (255, 0, 0)  # a wide frame: its left and right quarters fall away
    frames[:, :, 96:] = (0, 0, 255)
    frames[:, :, 32:96] = (255, 255, 255)
    clip = whole(write_video(tmp_path / "a.mp4", frames, 16, "libx264", "yuv444p"))
    samples, _ = load([clip], Bucket(num_frames=8, height_px=32, width_px=32, fps=16))
    assert samples[0][..., 2:-2].min() > 0.9


def test_images_and_clips_of_one_order_never_share_a_batch(tmp_path):
    clips = []
    for n in range(6):
        clip = whole(a_video(tmp_path / f"{n}.mp4", seed=n))
        clips += [clip, image_of(clip, 0.5, "")]
    batches = list(ClipLoader(clips, BUCKET, batch_size=4, order=range(12)))
    assert [video.shape[1] for video, _ in batches] == [8, 1, 8, 1]
    assert [rows for _, rows in batches] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10], [9, 11]]
    image = batches[1][0][0]
    assert_close(image, reference(clips[1], BUCKET))


def test_a_substitute_keeps_every_other_sample_in_its_batch(tmp_path):
    clips = [whole(a_video(tmp_path / f"clip{n}.mp4", seed=n)) for n in range(4)]
    clips.append(image_of(clips[0], 0.5, ""))
    spoil("empty", tmp_path / "clip1.mp4")
    spoil("corrupt", tmp_path / "clip2.mp4")
    order = [0, 1, 2, 3, 4, 4, 1, 0, 3, 2]
    batches = list(ClipLoader(clips, BUCKET, batch_size=2, order=order, substitute=True))
    assert [rows for _, rows in batches] == [[0, 3], [3, 3], [4, 4], [3, 0], [3, 3]]
    assert torch.equal(batches[0][0][1], batches[4][0][0])
    # a loader that starts later, as after a resume, goes on with the same batches
    resumed = list(ClipLoader(clips, BUCKET, batch_size=2, order=order[6:], substitute=True))
    assert [rows for _, rows in resumed] == [[3, 0], [3, 3]]
    spoil("empty", tmp_path / "clip0.mp4")
    spoil("empty", tmp_path / "clip3.mp4")
    with pytest.raises(ValueError, match="no readable video is left: all 4 tried are bad"):
        list(ClipLoader(clips, BUCKET, batch_size=2, order=order, substitute=True))


def test_training_on_nothing_but_bad_files_ends_with_an_error(tmp_path):
    clips = [whole(tmp_path / f"{n}.mp4") for n in range(3)]
    with pytest.raises(ValueError, match="no readable video is left: all 3 tried are bad"):
        next(iter(ClipLoader(clips, BUCKET, batch_size=2, order=itertools.cycle(range(3)))))
    assert load(clips)[0] == {}


@pytest.mark.parametrize("later", [1, 3])
def test_a_loader_started_at_batch_k_delivers_what_the_uninterrupted_one_does(tmp_path, later):
    clips = [whole(a_video(tmp_path / f"clip{n}.mp4", seed=n)) for n in range(6)]
    spoil("corrupt", tmp_path / "clip1.mp4")  # before every k; found by the first loader only while it reads
    order = [0, 1, 2, 3, 4, 5, 5, 1, 3, 0]
    keywords = {"batch_size": 2, "substitute": True, "num_threads": 2}
    once = list(ClipLoader(clips, BUCKET, order=order, **keywords))
    again = list(ClipLoader(clips, BUCKET, order=order[2 * later :], **keywords))
    assert [rows for _, rows in again] == [rows for _, rows in once[later:]]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(again, once[later:], strict=True))


def test_what_waits_for_a_slow_reader_stays_within_the_stated_bytes(tmp_path):
    clips = [whole(a_video(tmp_path / f"{n}.mp4", seed=n)) for n in range(2)]
    bucket = Bucket(num_frames=8, height_px=192, width_px=192, fps=16)
    loader = ClipLoader(clips, bucket, batch_size=3, order=itertools.cycle([0, 1]), num_threads=2)
    batches = iter(loader)
    next(batches)
    tracemalloc.start()  # numpy tells it of its memory; DALI's own batch, in the bound too, it does not see
    try:
        for _ in range(4):
            video, _ = next(batches)
            threading.Event().wait(0.3)
        waiting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        batches.close()
    assert 2 * video.nbytes < waiting < loader.most_bytes


def test_a_mistake_in_the_order_reaches_the_caller(tmp_path):
    clips = [whole(a_video(tmp_path / "a.mp4"))]
    with pytest.raises(IndexError):
        list(ClipLoader(clips, BUCKET, batch_size=1, order=[0, 7]))


def test_an_endless_order_is_read_a_few_batches_ahead_and_stops_with_its_reader(tmp_path):
    clips = [whole(a_video(tmp_path / "a.mp4"))]
    pulled = itertools.count()

    def endless():
        while True:
            next(pulled)
            yield 0

    batches = iter(ClipLoader(clips, BUCKET, batch_size=2, order=endless()))
    for _ in range(3):
        next(batches)
    threading.Event().wait(0.3)
    # three batches taken, two wait, one is in the thread's hands, one being read: 14 rows, and this call
    assert next(pulled) <= 14
    batches.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "clip-reader"))
    ]


def test_the_same_rows_give_the_same_numbers_every_time(tmp_path):
    clips = [whole(a_video(tmp_path / f"{n}.mp4", seed=n)) for n in range(3)]
    once, again = load(clips, num_threads=2)[0], load(clips, batch_size=1)[0]
    assert all(torch.equal(once[row], again[row]) for row in range(3))


def test_the_header_of_a_written_video_is_what_the_loader_relies_on(tmp_path):
    assert probe_video(a_video(tmp_path / "a.mp4")).codec == "vp9"
