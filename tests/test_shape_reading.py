"""Reading Moving Shapes: right on real renders, coded or not; silent of what they do not show."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nemo_moviegen.data.cutting import write_video
from nemo_moviegen.data.synthetic import BACKGROUNDS, COLORS, ShapeSpec, coverage, draw_spec, render
from nemo_moviegen.evaluation.shape_reading import motion_words, nearest, read_shapes
from nemo_moviegen.video_files import read_frames

WORDS = ("color", "shape", "direction", "speed", "background")
LEAST_RIGHT = 0.99
RED = ShapeSpec(color="red", shape="circle", direction="right", speed="slowly")


def share_right(videos, specs, fps):
    """Of each attribute, and of `count` and `is_consistent`, over pairs of video and spec."""
    right = Counter()
    for video_THWC, spec in zip(videos, specs, strict=True):
        reading = read_shapes(video_THWC, fps)
        right.update(word for word in WORDS if getattr(reading, word) == getattr(spec, word))
        right["count"] += reading.count == 1
        right["is_consistent"] += reading.is_consistent
    return {word: right[word] / len(specs) for word in (*WORDS, "count", "is_consistent")}


def every_spec():
    """Each combination of words once, those held out too."""
    return [draw_spec(5, n) for n in range(192)] + [draw_spec(5, n, "heldout") for n in range(48)]


def test_every_combination_is_read_from_its_render():
    specs = every_spec()
    assert len({(s.color, s.shape, s.direction, s.speed, s.background) for s in specs}) == 5 * 3 * 4 * 2 * 2
    shares = share_right([render(spec) for spec in specs], specs, 16)
    assert min(shares.values()) >= LEAST_RIGHT, shares


def test_real_renders_are_read_from_their_files(tmp_path):
    specs = every_spec()[::2]
    videos = [read_frames(write_video(tmp_path / f"{n}.mp4", render(s), 16)) for n, s in enumerate(specs)]
    shares = share_right(videos, specs, 16)
    assert min(shares.values()) >= LEAST_RIGHT, shares


def test_noise_of_a_model_does_not_mislead():
    specs, rng = every_spec()[::2], np.random.default_rng(0)
    videos = [(render(s) + rng.normal(0, 15, (16, 64, 64, 3))).clip(0, 255).astype(np.uint8) for s in specs]
    shares = share_right(videos, specs, 16)
    assert min(shares.values()) >= LEAST_RIGHT, shares


@pytest.mark.parametrize(("num_frames", "size_px", "fps"), [(16, 64, 24), (8, 64, 8), (16, 32, 16)])
def test_speed_is_of_seconds_and_of_the_frame_whatever_rate_and_size(num_frames, size_px, fps):
    specs = every_spec()[::4]
    shares = share_right([render(s, num_frames, size_px, fps) for s in specs], specs, fps)
    assert min(shares.values()) >= LEAST_RIGHT, shares


def test_at_another_rate_than_it_was_made_for_a_clip_has_another_speed():
    quick = render(ShapeSpec(color="red", shape="circle", direction="right", speed="quickly", start_x=0.2))
    assert read_shapes(quick, 16).velocity_x == pytest.approx(0.66, abs=0.01)
    assert read_shapes(quick, 8).velocity_x == pytest.approx(0.33, abs=0.01)
    assert read_shapes(quick, 8).speed == "slowly"


def test_one_frame_has_no_motion():
    reading = read_shapes(render(RED, num_frames=1), 16)
    assert (reading.color, reading.shape, reading.background) == ("red", "circle", "black")
    assert (reading.direction, reading.speed) == ("", "") and reading.is_consistent


def test_an_empty_frame_and_noise_show_nothing():
    empty = read_shapes(np.full((16, 64, 64, 3), 10, np.uint8), 16)
    assert (empty.color, empty.shape, empty.direction, empty.count) == ("", "", "", 0)
    assert empty.background == "black" and not empty.is_consistent
    noise = read_shapes(np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8), 16)
    assert (noise.shape, noise.background) == ("", "") and not noise.is_consistent


def test_rest_diagonals_and_leaps_are_no_direction():
    assert motion_words(0.33, 0.0) == ("right", "slowly")
    assert motion_words(0.05, -0.66) == ("up", "quickly")
    assert motion_words(0.05, 0.0) == ("", "")
    assert motion_words(0.33, 0.3) == ("", "slowly")
    assert motion_words(-3.0, 0.0) == ("", "")
    assert motion_words(np.nan, np.nan) == ("", "")


def test_a_colour_between_the_known_is_none_of_them():
    assert nearest(COLORS["blue"], COLORS, 110) == "blue"
    assert nearest((128, 128, 128), COLORS, 110) == ""
    assert nearest((90, 90, 90), BACKGROUNDS, 45) == ""


def test_two_shapes_are_counted():
    apart = np.zeros((4, 64, 64, 3), np.float32) + 10
    for x, rgb in ((0.25, COLORS["red"]), (0.75, COLORS["green"])):
        apart += coverage("circle", (64, 64), 0.1, x, 0.5)[..., None] * (np.array(rgb) - 10)
    assert read_shapes(apart.astype(np.uint8), 16).count == 2


@pytest.mark.parametrize("spoil", ["blink", "change colour", "grow", "jump"])
def test_what_changes_on_the_way_is_not_consistent(spoil):
    spec = replace(RED, start_x=0.3)
    video = render(spec)
    assert read_shapes(video, 16).is_consistent
    if spoil == "blink":
        video[7] = 10
    elif spoil == "change colour":
        video[8:] = video[8:, ..., [2, 1, 0]]
    elif spoil == "grow":
        video[12:] = render(replace(spec, area=0.2))[12:]
    else:
        video[8:] = np.roll(video[8:], 10, axis=1)
    assert not read_shapes(video, 16).is_consistent
