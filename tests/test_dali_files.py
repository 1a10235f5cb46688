"""Files that are damaged, or unusual: what cannot be shown is named and left out, the rest is shown right."""

import json
import logging
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, ColorTrc
from shown import BUCKET, a_video, assert_close, load, reference, spoil, whole

from nemo_moviegen.data.cutting import image_of, write_video
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.synthetic import draw_spec, render
from nemo_moviegen.recipe import Bucket

DALI_DECODES = pytest.mark.parametrize("decoder", [None, "dali"])


def flat(path, levels, pix_fmt="yuv420p", codec="libx264", prepare=lambda stream: None, times=None):
    """Gray frames of these 8-bit levels, of the coded range of `pix_fmt`, at 16 a second or at `times`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height = stream.width = 64
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "1"} if codec == "libx264" else {"crf": "0", "b": "0", "lossless": "1"}
        prepare(stream)
        for number, level in enumerate(levels):
            frame = av.VideoFrame(64, 64, pix_fmt)
            wide = "10" in pix_fmt
            for place, plane in enumerate(frame.planes):
                value = (level if place == 0 else 128) * (4 if wide else 1)
                count = plane.buffer_size // (2 if wide else 1)
                plane.update(np.full(count, round(value), np.uint16 if wide else np.uint8).tobytes())
            frame.color_range = stream.codec_context.color_range
            frame.pts = round(1000 * (times[number] if times else number / 16))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def gray(video):
    """The 8-bit level of each frame of a gray video, and how far its channels and pixels are apart."""
    levels = (video + 1) * 127.5
    return levels.mean((1, 2, 3)).tolist(), float(levels.max(1).values.sub(levels.min(1).values).max())


def test_frames_of_a_variable_rate_are_chosen_by_their_time(tmp_path):
    times = [0, 0.05, 0.1, 0.15, 0.5, 0.55, 0.9, 1.0, 1.01, 1.02]
    path = flat(tmp_path / "a.mp4", [16 + 20 * n for n in range(10)], times=times)
    clip = whole(path)
    samples, _ = load([clip], Bucket(num_frames=10, height_px=32, width_px=32, fps=10))
    levels, _ = gray(samples[0])
    shown = [round((level * 219 / 255) / 20) for level in levels]
    # at 0, 0.1, ... 0.9 s; 0.3 s is nearer to 0.15 than to 0.5, and 0.7 to 0.55 than to 0.9
    assert shown == [0, 2, 3, 3, 4, 4, 5, 5, 6, 6]


MATRICES = {  # display matrix (a b; c d) in 1/65536: what is shown of the picture, by numpy
    "a quarter": ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1, (-2, -1))),
    "half": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2, (-2, -1))),
    "three quarters": ((0, 1, -1, 0), lambda picture: np.rot90(picture, 3, (-2, -1))),
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[..., ::-1]),
    "upside down": ((1, 0, 0, -1), lambda picture: picture[..., ::-1, :]),
    "transposed": ((0, 1, 1, 0), lambda picture: picture.swapaxes(-2, -1)),
    "quarter, mirrored": ((0, -1, -1, 0), lambda picture: np.rot90(picture, 1, (-2, -1))[..., ::-1]),
}


@pytest.mark.parametrize("turn", MATRICES)
@DALI_DECODES
def test_a_turned_video_is_shown_upright(tmp_path, turn, decoder):
    (a, b, c, d), upright = MATRICES[turn]
    frames = render(draw_spec(3, 0), 16, 96, 16)[:, :72]
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        stream.set_display_matrix([n * 65536 for n in (a, b, 0, c, d, 0)] + [0, 0, 1 << 30])
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    samples, _ = load([whole(path)], decoder=decoder)
    size = (BUCKET.width_px, BUCKET.height_px) if a == 0 else (BUCKET.height_px, BUCKET.width_px)
    still = replace(BUCKET, height_px=size[0], width_px=size[1])
    expected = torch.from_numpy(upright(reference(whole(path), still).numpy()).copy())
    assert samples[0].shape == expected.shape
    assert (samples[0] - expected).abs().mean() < (0.02 if decoder else 0.0001)


def test_a_video_turned_by_an_odd_angle_is_left_out(tmp_path):
    def prepare(stream):
        stream.set_display_matrix([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30])

    path = flat(tmp_path / "tilted.mp4", [100] * 16, prepare=prepare)
    samples, _ = load([whole(path)], quarantine=tmp_path / "quarantine")
    assert not samples and "tilted.mp4" in (tmp_path / "quarantine").read_text()


@DALI_DECODES
def test_oblong_pixels_become_square(tmp_path, decoder):
    frames = np.zeros((16, 64, 64, 3), np.uint8)
    frames[:, :, 16:48] = 255  # the middle half, 64 of 128 once its pixels are square: all of a square crop
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.sample_aspect_ratio = Fraction(2, 1)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    square = Bucket(num_frames=8, height_px=32, width_px=32, fps=16)
    assert load([whole(path)], square, decoder=decoder)[0][0][..., 2:-2].min() > 0.9


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"), [(53, 97, "yuv420p"), (97, 53, "yuv444p"), (33, 35, "yuv422p")]
)
def test_odd_sizes_are_covered_to_the_last_column(tmp_path, height, width, pix_fmt):
    frames = render(draw_spec(5, 0), 16, 97, 16)[:, :height, :width]
    clip = whole(write_video(tmp_path / "a.mkv", np.ascontiguousarray(frames), 16, "ffv1", pix_fmt))
    samples, _ = load([clip])
    assert_close(samples[0], reference(clip, BUCKET))


def test_one_frame_is_an_image_but_no_clip(tmp_path):
    clip = whole(flat(tmp_path / "one.mp4", [126]))
    samples, _ = load([clip, image_of(clip, 0.0, "")], quarantine=tmp_path / "quarantine")
    assert sorted(samples) == [1] and samples[1].shape == (1, 3, 36, 48)
    assert "one.mp4: too short" in (tmp_path / "quarantine").read_text()


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p10le"])
def test_ten_bits_keep_their_levels(tmp_path, pix_fmt):
    levels = [16 + n / 4 for n in range(8)] + [235] * 8  # steps of a level of 10 bits
    clip = whole(flat(tmp_path / "a.mp4", levels, pix_fmt))
    samples, _ = load([clip], replace(BUCKET, num_frames=16))
    shown, apart = gray(samples[0])
    assert apart < 0.1
    assert np.allclose(shown, [(level - 16) / 219 * 255 for level in levels], atol=0.1)


@pytest.mark.parametrize(("range_", "white"), [(ColorRange.JPEG, 235), (ColorRange.MPEG, 255)])
def test_full_and_limited_range_are_told_apart(tmp_path, range_, white):
    def prepare(stream):
        stream.codec_context.color_range = range_

    clip = whole(flat(tmp_path / "a.mp4", [235] * 16, "yuv444p", prepare=prepare))
    assert np.allclose(gray(load([clip])[0][0])[0], white, atol=0.1)


def test_the_colour_matrix_is_the_files_own(tmp_path):
    shown = {}
    for matrix in (Colorspace.ITU601, Colorspace.ITU709):

        def prepare(stream, matrix=matrix):
            stream.codec_context.colorspace = matrix

        path = tmp_path / f"{int(matrix)}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
            stream.options = {"crf": "1"}
            prepare(stream)
            for _ in range(16):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 60, 30), np.uint8), "rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=matrix)))
            container.mux(stream.encode())
        shown[matrix] = (load([whole(path)])[0][0].mean((0, 2, 3)) + 1) * 127.5
    # both were red before they were coded, each with its own matrix
    for colour in shown.values():
        assert np.allclose(colour, (200, 60, 30), atol=1.5)


@pytest.mark.parametrize(("curve", "is_shown"), [(ColorTrc.SMPTE2084, False), (ColorTrc.ARIB_STD_B67, True)])
def test_pq_is_refused_by_name_and_hlg_shown_as_an_ordinary_screen_does(tmp_path, curve, is_shown):
    def prepare(stream):
        stream.codec_context.color_trc = int(curve)
        stream.codec_context.colorspace = int(Colorspace.BT2020)

    bad = whole(flat(tmp_path / "hdr.mp4", [126] * 16, "yuv420p10le", prepare=prepare))
    good = whole(a_video(tmp_path / "good.mp4"))
    samples, _ = load([bad, good], quarantine=tmp_path / "quarantine")
    assert sorted(samples) == ([0, 1] if is_shown else [1])
    if is_shown:
        assert np.allclose(gray(samples[0])[0], (126 - 16) / 219 * 255, atol=0.1)
    else:
        assert "hdr.mp4: HDR with the PQ curve" in (tmp_path / "quarantine").read_text()


def test_a_wrong_ending_does_not_matter_where_the_content_is_a_video(tmp_path):
    clip = whole(a_video(tmp_path / "a.webm"))
    renamed = Path(clip.path).rename(tmp_path / "a.jpg")
    samples, _ = load([replace(clip, path=str(renamed))])
    assert_close(samples[0], reference(replace(clip, path=str(renamed)), BUCKET))


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
