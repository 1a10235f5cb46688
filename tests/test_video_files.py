"""Videos as files: what is written is what a player reads back."""

import weakref

import av
import numpy as np
import pytest
import torch
from PIL import Image

from nemo_moviegen.video_files import (
    contact_sheet,
    pick_frames,
    read_frames,
    stream_mp4,
    to_uint8,
    write_mp4,
    write_png,
)


def flat_video(colors, size=(32, 48)):
    """One flat frame a colour: [T, 3, H, W] in [-1, 1]."""
    colors_TC = torch.tensor(colors, dtype=torch.float32) / 127.5 - 1
    return colors_TC[:, :, None, None].expand(-1, -1, *size)


COLORS = [(200, 30, 40), (20, 160, 60), (40, 60, 220), (240, 240, 240), (10, 10, 10)]


def test_an_mp4_comes_back_with_its_frames_colours_rate_and_size(tmp_path):
    path = write_mp4(flat_video(COLORS), tmp_path / "deep" / "clip.mp4", fps=12)
    frames = read_frames(path)
    assert frames.shape == (5, 32, 48, 3)
    for frame, color in zip(frames, COLORS, strict=True):
        np.testing.assert_allclose(frame.reshape(-1, 3).mean(0), color, atol=4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12


def test_odd_sizes_are_padded_with_their_last_row_and_column(tmp_path):
    video = flat_video(COLORS[:2], size=(17, 23)).clone()
    video[:, :, -1, :] = -1.0
    frames = read_frames(write_mp4(video, tmp_path / "odd.mp4", fps=16))
    assert frames.shape == (2, 18, 24, 3)
    assert frames[:, -1].mean() < 60
    assert abs(frames[0, 8, 8].astype(int) - COLORS[0]).max() < 12


def test_read_frames_takes_the_asked_interval(tmp_path):
    path = write_mp4(flat_video(COLORS), tmp_path / "clip.mp4", fps=10)
    frames = read_frames(path, start_seconds=0.1, end_seconds=0.3)
    assert len(frames) == 2
    np.testing.assert_allclose(frames[0].reshape(-1, 3).mean(0), COLORS[1], atol=4)


def test_a_png_holds_the_exact_pixels(tmp_path):
    frame = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = write_png(frame, tmp_path / "image.png")
    assert (read_frames(path)[0] == to_uint8(frame[None])[0]).all()


def test_values_outside_the_range_are_clipped_and_the_ends_are_exact():
    video = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.zeros(3, 16, 16), "not \\[frames, 3"),
        (torch.zeros(4, 1, 16, 16), "not \\[frames, 3"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
    ],
)
def test_a_video_that_is_none_is_refused_and_nothing_is_written(tmp_path, video, words):
    with pytest.raises(ValueError, match=words):
        write_mp4(video, tmp_path / "bad.mp4", fps=16)
    assert not (tmp_path / "bad.mp4").exists()


def test_a_video_in_chunks_is_the_file_of_the_whole_and_no_chunk_waits_for_the_next(tmp_path):
    """Seen to catch: all chunks taken before the first is encoded."""
    video = torch.linspace(-1, 1, 40 * 3 * 16 * 16).view(40, 3, 16, 16)
    alive = []

    def chunks():
        for chunk in video.split(4):
            chunk = chunk.clone()
            alive.append(weakref.ref(chunk))
            yield chunk
            assert sum(ref() is not None for ref in alive) <= 2

    whole = write_mp4(video, tmp_path / "whole.mp4", fps=8)
    parts = stream_mp4(chunks(), tmp_path / "parts.mp4", fps=8)
    assert (read_frames(parts) == read_frames(whole)).all()
    with pytest.raises(ValueError, match="no frame came"):
        stream_mp4([], tmp_path / "none.mp4", fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.mp4", "whole.mp4"]


def test_a_video_that_breaks_off_leaves_no_file(tmp_path):
    """Seen to catch: half a file under its name."""

    def chunks():
        yield torch.zeros(2, 3, 16, 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_mp4(chunks(), tmp_path / "clip.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_a_frame_rate_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps is 0"):
        write_mp4(flat_video(COLORS), tmp_path / "bad.mp4", fps=0)


@pytest.mark.parametrize("content", [None, b"", b"not a video at all" * 50])
def test_a_file_that_is_no_video_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        read_frames(path)


def test_picked_frames_are_even_and_keep_both_ends():
    assert pick_frames(16, 4) == [0, 5, 10, 15]
    assert pick_frames(3, 8) == [0, 1, 2]
    assert pick_frames(9, 1) == [0]


def test_a_contact_sheet_shows_every_video_under_its_caption(tmp_path):
    videos = [flat_video([color] * length) for color, length in zip(COLORS[:3], (1, 4, 20), strict=True)]
    long_caption = "a red circle moves to the right while the day goes by " * 5
    path = contact_sheet(videos, ["one", "two", long_caption], tmp_path / "sheet.png", cell_px=60)
    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    cell = 60 * 40  # 48 x 32 enlarged to 60 px wide
    for color, length in zip(COLORS[:3], (1, 4, 8), strict=True):
        assert (pixels == color).all(axis=1).sum() == cell * length
    assert Image.open(path).width <= 600


def test_a_contact_sheet_needs_one_caption_a_video(tmp_path):
    with pytest.raises(ValueError, match="1 videos and 2 captions"):
        contact_sheet([flat_video(COLORS)], ["a", "b"], tmp_path / "sheet.png")
