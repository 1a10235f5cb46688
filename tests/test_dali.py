"""The DALI pipeline against plain PyAV and torch, and what it does with files it cannot use."""

import itertools
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Interpolation
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, Clip
from nemo_moviegen.data.cutting import cut_clips, image_of, probe_video, write_video
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.frames import nearest_frames, read_clip
from nemo_moviegen.data.synthetic import draw_spec, render
from nemo_moviegen.recipe import Bucket

# scales both test sizes, 1280x720 and 96x96, to whole pixels: elsewhere DALI keeps the exact aspect ratio by
# leaving out a fraction of a pixel at the border, which the reference does not
BUCKET = Bucket(num_frames=8, height_px=36, width_px=48, fps=16)

# [-1, 1] has 255 steps of 0.0078. The same decoded frames go in on both sides, so only the table of DALI's
# resize filter is left (H.264): small in the mean, more at hard edges. Where DALI decodes, its
# YUV-to-RGB differs from FFmpeg's fast path too: two levels on flat parts, more where colour, stored at half
# resolution, is interpolated over an edge.
MEAN_RESIZE_ERROR, LARGEST_RESIZE_ERROR = 0.001, 0.1
MEAN_DECODE_ERROR, LARGEST_DECODE_ERROR = 0.02, 0.15


# FFmpeg's quick conversion to RGB is a level too dark in the mean, and leaves colour at half resolution
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def a_video(path, seed=0, num_frames=16, size_px=96, fps=16, **write):
    return write_video(path, render(draw_spec(seed, 0), num_frames, size_px, fps), fps, **write)


def whole(path, clip_id=None):
    """The file as one clip, whatever it holds."""
    return Clip(
        clip_id=clip_id or path.stem,
        path=str(path),
        kind="video",
        start_seconds=0.0,
        end_seconds=1.0,
        source_fps=16.0,
        width_px=96,
        height_px=96,
        codec="",
        caption="",
    )


def reference(clip, bucket):
    """[T, C, H, W] by numpy, in float64: decode all, take the nearest by time, then `fitted`."""
    with av.open(clip.path) as container:
        decoded = [(frame.time, frame) for frame in container.decode(video=0)]
        times = np.array([time for time, _ in decoded]) - decoded[0][0]
        count = 1 if clip.kind == "image" else bucket.num_frames
        nearest = [np.abs(times - (clip.start_seconds + k / bucket.fps)).argmin() for k in range(count)]
        return torch.from_numpy(np.stack([fitted(decoded[n][1], bucket) for n in nearest]))


def fitted(frame, bucket):
    """[C, H, W] in [-1, 1]: each plane of an 8-bit 4:2:0 frame scaled to cover the bucket, BT.601, cropped."""
    scale = max(bucket.height_px / frame.height, bucket.width_px / frame.width)
    height, width = round(frame.height * scale), round(frame.width * scale)
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    planes = []
    for number, plane in enumerate(frame.planes):
        plane_HW = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        across = triangle(plane.width, width, shift=0.25 if number and not full_range else 0)
        planes.append(triangle(plane.height, height) @ plane_HW.astype(float) @ across.T)
    y, blue, red = (planes[0] - black) / luma, (planes[1] - 128) / chroma, (planes[2] - 128) / chroma
    rgb = [y + 1.402 * red, y - (0.202008 * blue + 0.419198 * red) / 0.587, y + 1.772 * blue]
    top, left = (height - bucket.height_px) // 2, (width - bucket.width_px) // 2
    rgb_CHW = np.stack(rgb)[:, top : top + bucket.height_px, left : left + bucket.width_px]
    return rgb_CHW.clip(0, 1) * 2 - 1


def triangle(size, new_size, shift=0.0):
    """[new_size, size]: antialiased linear interpolation; samples lie `shift` before their pixel's middle."""
    scale = size / new_size
    middle = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5 + shift
    weights = (1 - np.abs(np.arange(-size, 2 * size) - middle) / max(scale, 1)).clip(0)
    inside = weights[:, size : 2 * size].copy()
    inside[:, 0] += weights[:, :size].sum(1)  # outside, the border goes on
    inside[:, -1] += weights[:, 2 * size :].sum(1)
    return inside / inside.sum(1, keepdims=True)


def load(clips, bucket=BUCKET, order=None, batch_size=4, **keywords):
    """Every sample by row, and the loader."""
    order = range(len(clips)) if order is None else order
    loader = ClipLoader(clips, bucket, batch_size=batch_size, order=order, **keywords)
    samples = {}
    for video, rows in loader:
        samples |= {row: video[place] for place, row in enumerate(rows)}
    return samples, loader


def assert_close(video, clip, mean, largest, bucket=BUCKET):
    error = (video - reference(clip, bucket)).abs()
    assert error.mean() < mean and error.max() < largest


def test_real_h264_clips_equal_the_reference():
    clips = cut_clips(BIG_BUCK_BUNNY, 1.0, images=True)
    samples, _ = load(clips, order=[0, 3, 4])
    assert sorted(samples) == [0, 3, 4]
    for row, video in samples.items():
        assert video.dtype == torch.float32 and video.min() >= -1 and video.max() <= 1
        assert_close(video, clips[row], MEAN_RESIZE_ERROR, LARGEST_RESIZE_ERROR)
    # the reference would notice a wrong frame: neighbouring clips are far apart
    assert (samples[0] - samples[4]).abs().mean() > 10 * MEAN_RESIZE_ERROR


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libvpx-vp9", "yuv420p"), ("a.webm", "libvpx", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p")],
)
def test_codecs_that_dali_decodes_equal_the_reference(tmp_path, name, codec, pix_fmt):
    clip = whole(a_video(tmp_path / name, codec=codec, pix_fmt=pix_fmt))
    samples, loader = load([clip])
    assert loader.quarantined == 0
    assert_close(samples[0], clip, MEAN_DECODE_ERROR, LARGEST_DECODE_ERROR)


def test_both_kinds_of_decoder_meet_in_one_batch(tmp_path):
    clips = [
        whole(a_video(tmp_path / f"{n}.mp4", seed=n, codec=("libvpx-vp9", "libx264")[n % 2]))
        for n in range(4)
    ]
    loader = ClipLoader(clips, BUCKET, batch_size=4, order=[2, 1, 0, 3])
    ((video, rows),) = list(loader)
    assert video.shape == (4, 8, 3, 36, 48) and rows == [2, 1, 0, 3]
    for place, row in enumerate(rows):
        assert_close(video[place], clips[row], MEAN_DECODE_ERROR, LARGEST_DECODE_ERROR)


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
@pytest.mark.parametrize("source_fps", [12, 16, 25, 30])
def test_frame_k_shows_the_time_k_over_fps(tmp_path, codec, source_fps):
    # frame n is a flat gray of level 4 n: the pixel says which source frame was taken
    frames = np.repeat(np.arange(2 * source_fps, dtype=np.uint8)[:, None, None, None], 32, 1) * 4
    path = write_video(
        tmp_path / "a.mp4",
        np.ascontiguousarray(np.broadcast_to(frames, (2 * source_fps, 32, 32, 3))),
        source_fps,
        codec,
    )
    clip = replace(whole(path), start_seconds=0.5, end_seconds=1.5)
    samples, _ = load([clip], Bucket(num_frames=16, height_px=16, width_px=16, fps=16))
    level = (samples[0][:, 0].mean((1, 2)) + 1) * 127.5
    shown = (level / 4).round().int().tolist()
    # half way between two frames the earlier is taken (round half down), but none before the clip's start
    expected = [max(np.ceil(0.5 * source_fps), np.ceil((0.5 + k / 16) * source_fps - 0.5)) for k in range(16)]
    assert shown == expected


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
    noise = np.random.default_rng(0).integers(
        0, 255, (256, 48, 48, 1), np.uint8
    )  # gray: colour is stored coarsely
    path = write_video(tmp_path / "a.mp4", np.repeat(noise, 3, -1), 16)
    clip = replace(whole(path), start_seconds=14.0, end_seconds=15.0)
    encoded = read_clip(clip, 0, BUCKET, 16, keeps_packets=True)
    assert encoded.packets.nbytes < path.stat().st_size / 1.5  # VP9 has a key frame every 128 here
    samples, _ = load([clip])
    assert_close(samples[0], clip, MEAN_DECODE_ERROR, LARGEST_DECODE_ERROR)


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
    assert_close(image, clips[1], MEAN_DECODE_ERROR, LARGEST_DECODE_ERROR)


def spoil(kind, path):
    """Make the good VP9 file at `path` bad."""
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "corrupt":
        # the packets lie before the table of contents, which stays readable
        start = data.index(b"mdat") + 40
        path.write_bytes(data[:start] + b"\xff" * 600 + data[start + 600 :])
    elif kind == "too short":
        a_video(path, num_frames=5)
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=48000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux([*stream.encode(frame), *stream.encode()])
    else:
        contents = {"empty": b"", "truncated": data[: len(data) // 2], "not a video": b"hello " * 500}
        path.write_bytes(contents[kind])


BAD = ("missing", "empty", "truncated", "not a video", "sound only", "too short", "corrupt")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_quarantined_counted_and_replaced(tmp_path, caplog, kind):
    clips = [whole(a_video(tmp_path / f"clip{n}.mp4", seed=n)) for n in range(6)]
    spoil(kind, tmp_path / "clip1.mp4")
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    loader = ClipLoader(clips, BUCKET, batch_size=2, order=[0, 1, 2, 3, 1, 4, 5], quarantine=quarantine)
    # every batch is whole, the good clips keep their order, and the bad one is tried once only
    with caplog.at_level(logging.WARNING, logger="nemo_moviegen.data.clips"):
        assert [rows for _, rows in loader] == [[0, 2], [3, 4], [5]]
    assert loader.quarantined == 1
    (line,) = quarantine.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["clip_id"], entry["path"]) == ("clip1", str(tmp_path / "clip1.mp4"))
    assert "clip1.mp4" in entry["reason"] and "clip1.mp4" in caplog.text


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


def test_a_truncated_webm_and_a_truncated_h264_are_found(tmp_path):
    clips = [
        whole(a_video(tmp_path / "a.webm", size_px=160)),
        whole(a_video(tmp_path / "b.mkv", size_px=160, codec="libx264")),
        whole(a_video(tmp_path / "c.mp4")),
    ]
    for clip in clips[:2]:
        with open(clip.path, "rb+") as file:
            file.truncate(int(Path(clip.path).stat().st_size * 0.3))
    samples, loader = load(clips, replace(BUCKET, num_frames=16))
    assert sorted(samples) == [2] and loader.quarantined == 2


def test_a_damaged_h264_clip_is_found_or_shows_its_true_frames(tmp_path):
    path = a_video(tmp_path / "a.mp4", codec="libx264")
    (whole_frames,) = load([whole(path)])[0].values()
    data = path.read_bytes()
    found = 0
    # x264's packets start with some 700 bytes of text about its settings
    for number, start in enumerate(range(data.index(b"mdat") + 700, data.index(b"moov") - 60, 100)):
        damaged = tmp_path / f"damaged{number}.mp4"
        damaged.write_bytes(data[:start] + b"\x5a" * 60 + data[start + 60 :])
        samples, loader = load([whole(damaged)])
        found += loader.quarantined
        assert all(torch.equal(video, whole_frames) for video in samples.values())
    assert found >= 5


def test_training_on_nothing_but_bad_files_ends_with_an_error(tmp_path):
    clips = [whole(tmp_path / f"{n}.mp4") for n in range(3)]
    with pytest.raises(ValueError, match="no readable video is left: all 3 tried are bad"):
        next(iter(ClipLoader(clips, BUCKET, batch_size=2, order=itertools.cycle(range(3)))))
    assert load(clips)[0] == {}


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
    # three batches taken, two waiting, one in the worker's hands, one being read: fourteen rows, and this call
    assert next(pulled) <= 14
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "clip-reader"))]


def test_the_same_rows_give_the_same_numbers_every_time(tmp_path):
    clips = [whole(a_video(tmp_path / f"{n}.mp4", seed=n)) for n in range(3)]
    once, again = load(clips, num_threads=2)[0], load(clips, batch_size=1)[0]
    assert all(torch.equal(once[row], again[row]) for row in range(3))


def test_the_header_of_a_written_video_is_what_the_loader_relies_on(tmp_path):
    assert probe_video(a_video(tmp_path / "a.mp4")).codec == "vp9"
