"""Images in larger batches than clips (the 5B ablation, s3.6.2): one loss in every layout, exact resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen.recipe import LatentData, Layout
from nemo_moviegen.training.checkpoint import starting_checkpoints
from parallel.runs import recipe, train_on_ranks

pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, latents):
    run = recipe(tmp_path_factory.mktemp("one"), latents, image_batch=12)
    train_on_ranks(run, 1)
    return run


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["train/loss"] for line in metrics(folder)]


def test_image_steps_have_their_own_number_of_samples(one_rank):
    for line in metrics(one_rank.output):
        tokens = line["speed/tokens_per_second"] * line["speed/step_seconds"]
        assert tokens == pytest.approx(12 * 8 if line["train/is_image"] else 4 * 24)


@pytest.mark.parametrize(
    "layout, micro_batch",
    [(Layout(), 1), (Layout(sharding="full"), 2), (Layout(tensor=2), 1), (Layout(context=2), 4)],
)
def test_every_layout_and_micro_batch_has_the_losses_of_one_rank(
    layout, micro_batch, tmp_path, latents, one_rank
):
    run = recipe(tmp_path, latents, image_batch=12, layout=layout, micro_batch=micro_batch)
    train_on_ranks(run, 2)
    assert losses(run.output) == pytest.approx(losses(one_rank.output), rel=0, abs=1e-9)


def test_a_run_interrupted_before_an_image_step_goes_on_bit_for_bit(tmp_path, latents, one_rank):
    run = replace(one_rank, output=str(tmp_path), num_steps=4, save_every=2)
    train_on_ranks(run, 1)
    train_on_ranks(replace(run, num_steps=6), 1)
    assert losses(run.output) == losses(one_rank.output)


def test_a_checkpoint_goes_on_with_as_many_images_only(one_rank):
    with pytest.raises(ValueError, match="image_batch 12 instead of 4"):
        starting_checkpoints(replace(one_rank, image_batch=0))
    starting_checkpoints(one_rank)


def test_a_model_of_one_frame_trains_on_the_images_of_a_folder_with_clips(tmp_path, latents):
    images = recipe(tmp_path, latents)
    images = replace(
        images,
        size=replace(images.size, max_frames=1),
        data=LatentData(folder=str(latents), image_every=1),
        latent_frames=1,
        num_steps=1,
    )
    assert train_on_ranks(images, 1)[0]["train/is_image"] == 1
