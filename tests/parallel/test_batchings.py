"""Whole runs whose steps mix clips of several shapes: balanced and packed, on any ranks, also interrupted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from nemo_moviegen.data.latent_writer import LatentWriter
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.recipe import LatentData, Layout
from nemo_moviegen.training.checkpoint import starting_checkpoints
from nemo_moviegen.training.data import batch_order
from parallel.runs import recipe, train_on_ranks, write_latents

FRAMES, HEIGHT, WIDTH = tiny.LATENT_SHAPE
SHAPES = [tiny.LATENT_SHAPE, (FRAMES - 1, HEIGHT, WIDTH), (FRAMES, WIDTH, HEIGHT), (2, WIDTH, WIDTH)]
LAYOUTS = {
    "dp2 full": (Layout(sharding="full"), 2),
    "tp2+sp": (Layout(tensor=2), 2),
    "cp2 x dp2": (Layout(context=2), 4),
}


pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, shapes=SHAPES)
    return folder


def run_of(folder, latents, batching, **changes):
    data = LatentData(folder=str(latents), image_every=3, batching=batching)
    return recipe(folder, latents, data=data, micro_batch=1, **changes)


@pytest.fixture(scope="module", params=["balanced", "packed"])
def batching(request):
    return request.param


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, latents, batching):
    run = run_of(tmp_path_factory.mktemp("one"), latents, batching)
    train_on_ranks(run, 1)
    return told(run)


def told(run):
    """[(loss, video tokens)] of each step."""
    rows = [json.loads(line) for line in Path(run.output, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    tokens = [round(row["speed/tokens_per_second"] * row["speed/step_seconds"]) for row in rows]
    return [(row["train/loss"], count) for row, count in zip(rows, tokens, strict=True)]


def test_steps_mix_shapes_or_fill_packs(one_rank, batching):
    """Of four slots each: a step of one shape would hold a multiple of it, a pack more than one clip."""
    sizes = {tiny.SIZE.num_tokens(shape) for shape in SHAPES}
    clips = [tokens for number, (_, tokens) in enumerate(one_rank, start=1) if number % 3]
    if batching == "balanced":
        assert any(tokens not in {4 * size for size in sizes} for tokens in clips)
        assert all(tokens <= 4 * max(sizes) for tokens in clips)
    else:
        average = sum(tiny.SIZE.num_tokens(shape) for shape in SHAPES) / len(SHAPES)
        assert sum(clips) / len(clips) > 4 * average
        assert all(tokens <= 4 * tiny.SIZE.num_tokens(tiny.LATENT_SHAPE) for tokens in clips)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_losses_of_one_rank(name, tmp_path, latents, batching, one_rank):
    """Weights are a function of (seed, name) in every layout, and a copy's share one of the step."""
    layout, num_ranks = LAYOUTS[name]
    run = run_of(tmp_path, latents, batching, layout=layout)
    train_on_ranks(run, num_ranks)
    assert_same(told(run), one_rank)


def test_a_run_stopped_on_two_copies_goes_on_with_one_and_four(tmp_path, latents, batching, one_rank):
    run = run_of(tmp_path, latents, batching, layout=Layout(sharding="full"), num_steps=2)
    for num_steps, num_ranks in ((2, 2), (4, 1), (6, 4)):
        train_on_ranks(replace(run, num_steps=num_steps), num_ranks)
    assert_same(told(run), one_rank)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"global_batch": 8}, "global_batch 4 instead of 8"),
        ({"seed": 5}, "seed 0 instead of 5"),
        ({"data.batching": "bucket"}, "data.batching {batching} instead of bucket"),
        ({"data.image_every": 2}, "data.image_every 3 instead of 2"),
    ],
)
def test_a_run_does_not_go_on_with_samples_in_another_order(change, told, batching, stopped):
    of_data = {key[5:]: value for key, value in change.items() if key.startswith("data.")}
    own = {key: value for key, value in change.items() if not key.startswith("data.")}
    with pytest.raises(ValueError, match=told.format(batching=batching) + ".*init_from"):
        starting_checkpoints(replace(stopped, data=replace(stopped.data, **of_data), **own))


def test_packs_of_another_size_or_other_pieces_are_another_order(batching, stopped):
    if batching == "packed":
        change, told = {"latent_frames": 4}, "packs of 24 tokens instead of 32"
    else:
        change, told = {"micro_batch": 2}, "micro_batch 1 instead of 2"
    with pytest.raises(ValueError, match=told):
        starting_checkpoints(replace(stopped, **change))


def test_a_run_does_not_go_on_with_other_latents(tmp_path, latents, stopped):
    samples = LatentReader(latents).read(range(20))
    shutil.copytree(latents, tmp_path / "kept")
    with LatentWriter(latents) as writer:
        for sample in samples:
            writer.add(sample)
    try:
        with pytest.raises(AssertionError, match=r"its 24 samples are now 20.*init_from"):
            train_on_ranks(replace(stopped, num_steps=4), 1)
    finally:
        shutil.copytree(tmp_path / "kept", latents, dirs_exist_ok=True)


def test_a_pack_without_room_for_the_longest_clip_says_what_to_set(latents):
    run = run_of("unused", latents, "packed", latent_frames=2)
    with pytest.raises(ValueError, match="latents of 24: set latent_frames=3 latent_height="):
        batch_order(LatentReader(latents), run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, latents, batching):
    run = run_of(tmp_path_factory.mktemp("stopped"), latents, batching, num_steps=2)
    train_on_ranks(run, 1)
    return run


def assert_same(found, wanted):
    assert [tokens for _, tokens in found] == [tokens for _, tokens in wanted]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=0, abs=1e-9)
