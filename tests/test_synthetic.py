"""Moving Shapes: captions, pixels and files agree."""

import json

import av
import numpy as np
import pytest

from nemo_moviegen.data.clips import read_manifest, write_manifest
from nemo_moviegen.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    ShapeSpec,
    caption,
    draw_spec,
    heldout_pairs,
    image_caption,
    render,
    write_moving_shapes,
)

# VP9 at quality 10 with halved colour resolution: edges smear, flat parts stay within a few levels
MEAN_CODEC_ERROR_LEVELS = 4.0


def covered(video_THWC, spec):
    """Where the frame is not background, [T, H, W]."""
    distance = np.abs(video_THWC.astype(int) - BACKGROUNDS[spec.background]).sum(-1)
    return distance > 0.5 * np.abs(np.subtract(COLORS[spec.color], BACKGROUNDS[spec.background])).sum()


def test_a_clip_is_a_function_of_seed_and_index():
    assert draw_spec(3, 17) == draw_spec(3, 17)
    assert np.array_equal(render(draw_spec(3, 17)), render(draw_spec(3, 17)))
    assert len({str(draw_spec(seed, index)) for seed in range(3) for index in range(50)}) == 150


def test_every_attribute_is_one_word_of_the_caption():
    spec = ShapeSpec(color="red", shape="circle", direction="right", speed="slowly")
    assert caption(spec) == "a red circle moves right slowly on a black background"
    assert image_caption(spec) == "a red circle on a black background"
    words = [*COLORS, *SHAPES, *DIRECTIONS, *SPEEDS, *BACKGROUNDS]
    assert len(set(words)) == len(words) and not any(" " in word for word in words)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_held_out_pairs_occur_in_their_split_only(split):
    specs = [draw_spec(0, index, split) for index in range(300)]
    pairs = {(spec.color, spec.direction) for spec in specs}
    everything = {(color, direction) for color in COLORS for direction in DIRECTIONS}
    held_out = set(heldout_pairs())
    assert len(held_out) == 4
    assert pairs == (held_out if split == "heldout" else everything - held_out)
    # each word is learnt: no colour and no direction is missing from training
    if split == "train":
        assert {c for c, _ in pairs} == set(COLORS) and {d for _, d in pairs} == set(DIRECTIONS)


def test_a_training_set_is_balanced_over_its_combinations():
    combinations = [(5 * 4 - 4) * len(SHAPES) * len(SPEEDS) * len(BACKGROUNDS)][0]
    specs = [draw_spec(1, index) for index in range(2 * combinations)]
    seen = [(s.color, s.shape, s.direction, s.speed, s.background) for s in specs]
    assert {seen.count(combination) for combination in set(seen)} == {2}


@pytest.mark.parametrize("index", range(12))
def test_the_shape_has_its_size_and_moves_as_the_caption_says(index):
    spec = draw_spec(5, index)
    video = render(spec, num_frames=16, size_px=64, fps=16)
    assert video.shape == (16, 64, 64, 3) and video.dtype == np.uint8
    mask = covered(video, spec)
    # ten percent of the frame at the middle of the clip, where the shape is wholly inside
    assert 0.1 <= mask[7].mean() <= 0.14
    assert mask.mean((1, 2)).min() > 0.06
    inside = [t for t in range(16) if abs(mask[t].sum() - mask[7].sum()) <= 12]  # not cut by the frame's edge
    first, last = inside[0], inside[-1]
    assert last - first >= 8
    rows, columns = np.mgrid[:64, :64]
    centers = [(columns[m].mean(), rows[m].mean()) for m in (mask[first], mask[last])]
    step = np.subtract(centers[1], centers[0]) / (last - first)
    # rows count downwards
    way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[spec.direction]
    px_a_frame = {"slowly": 1.32, "quickly": 2.64}[spec.speed]
    assert step == pytest.approx(np.multiply(way, px_a_frame), abs=0.1)


def test_the_edges_are_soft():
    spec = ShapeSpec(color="white", shape="circle", direction="left", speed="slowly")
    levels = np.unique(render(spec, num_frames=1)[..., 0])
    assert len(levels) >= 8


def test_size_and_rate_scale_the_same_scene():
    spec = draw_spec(0, 4)
    small, large = render(spec, 16, 64, 16), render(spec, 32, 128, 32)
    averaged = large[::2].reshape(16, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 1.0


def test_a_shape_that_leaves_a_long_clip_comes_back():
    spec = ShapeSpec(color="green", shape="square", direction="right", speed="quickly", start_x=0.2)
    share = covered(render(spec, num_frames=96), spec).mean((1, 2))
    assert share.min() < 0.02 and share[48:].max() > 0.1


def test_an_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="color 'pink' is not known; use one of red, green"):
        ShapeSpec(color="pink", shape="circle", direction="left", speed="slowly")


def test_files_are_vp9_and_show_what_was_rendered(tmp_path):
    rows = write_moving_shapes(tmp_path, 3, seed=9, progress=False)
    assert [row.kind for row in rows] == ["video", "image"] * 3
    for index, row in enumerate(rows[::2]):
        spec = draw_spec(9, index)
        assert row.caption == caption(spec) and str(spec.color) in row.attributes
        with av.open(row.path) as container:
            assert container.streams.video[0].codec_context.name == "vp9"
            video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert video.shape == (16, 64, 64, 3)
        assert np.abs(video.astype(int) - render(spec)).mean() < MEAN_CODEC_ERROR_LEVELS
    for row in rows[1::2]:
        assert " moves " not in row.caption and 0 <= row.start_seconds < 1
    assert read_manifest(write_manifest(tmp_path / "manifest.parquet", rows)) == rows


def test_splits_and_seeds_write_different_files(tmp_path):
    rows = [
        row
        for seed, split in ((0, "train"), (1, "train"), (0, "heldout"))
        for row in write_moving_shapes(tmp_path, 2, seed=seed, split=split, images=False, progress=False)
    ]
    assert len({row.path for row in rows}) == len({row.clip_id for row in rows}) == 6
    with pytest.raises(ValueError, match="counts start at 1"):
        write_moving_shapes(tmp_path, 0)


def test_beside_each_file_lies_what_it_shows(tmp_path):
    clip, image = write_moving_shapes(tmp_path, 1, split="heldout", progress=False)
    sidecar = json.loads((tmp_path / f"{clip.clip_id}.json").read_text())
    assert sidecar["caption"] == clip.caption
    assert sidecar["image_caption"] == image.caption
    assert sidecar["split"] == "heldout"
    assert sidecar["attributes"] == json.loads(clip.attributes)
