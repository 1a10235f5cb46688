"""Whole runs through NeMo Lightning on gloo ranks: one loss in every layout, exact resume, nothing lost."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from ranks import run_on_ranks

from nemo_moviegen.recipe import Layout
from nemo_moviegen.training.checkpoint import last_checkpoint, load_video_model
from nemo_moviegen.training.storage import read_whole, tensor_shapes
from parallel.runs import recipe, train_on_ranks, write_latents

pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def start(tmp_path_factory, latents):
    """One step on one rank: the weights every layout starts from."""
    run = recipe(tmp_path_factory.mktemp("start"), latents, num_steps=1)
    train_on_ranks(run, 1)
    return run.output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, latents, start):
    run = recipe(tmp_path_factory.mktemp("one"), latents, init_from=start)
    train_on_ranks(run, 1)
    return run.output


def metrics(folder):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def losses(folder):
    return [line["train/loss"] for line in metrics(folder)]


def test_a_run_takes_images_every_third_step_and_reports_what_it_did(one_rank):
    lines = metrics(one_rank)
    assert [line["train/is_image"] for line in lines] == [0, 0, 1, 0, 0, 1]
    assert [line["train/learning_rate"] for line in lines] == [1.5e-3] + 5 * [3e-3]  # two steps of warm-up
    for line in lines:
        assert line["speed/tokens_per_second"] * line["speed/step_seconds"] == pytest.approx(
            4 * (8 if line["train/is_image"] else 24)
        )
        assert line["train/grad_norm"] > 0
        assert 0 <= line["speed/data_seconds"] < line["speed/step_seconds"]
    assert os.listdir(f"{one_rank}/tensorboard")


LAYOUTS = {
    "one rank": (Layout(), 1),
    "dp2 none": (Layout(sharding="none"), 2),
    "dp2 optimizer": (Layout(), 2),
    "dp2 full": (Layout(sharding="full"), 2),
    "tp2+sp": (Layout(tensor=2), 2),
    "cp2": (Layout(context=2), 2),
    "cp2 full": (Layout(context=2, sharding="full"), 2),
    "tp2+sp x cp2": (Layout(tensor=2, context=2), 4),
    "tp2+sp x dp2 full": (Layout(tensor=2, sharding="full"), 4),
}


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "one rank"])
def test_six_steps_of_any_layout_have_the_losses_of_one_rank(name, tmp_path, latents, start, one_rank):
    """Loss after loss, so the parameters after every optimiser step agree too."""
    layout, num_ranks = LAYOUTS[name]
    run = recipe(tmp_path, latents, init_from=start, layout=layout)
    train_on_ranks(run, num_ranks)
    assert losses(run.output) == pytest.approx(losses(one_rank), rel=0, abs=1e-9)
    assert_same_checkpoint(run.output, one_rank)


@pytest.mark.parametrize(
    "first, second",
    [
        ("dp2 full", "tp2+sp"),
        ("tp2+sp", "dp2 full"),
        ("cp2", "dp2 optimizer"),
        ("dp2 optimizer", "one rank"),
        ("one rank", "tp2+sp x dp2 full"),
        ("tp2+sp x dp2 full", "dp2 none"),
    ],
)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(first, second, tmp_path, latents, start, one_rank):
    """Weights, moments and the average: the end is that of one rank which was never interrupted."""
    (before, num_before), (after, num_after) = LAYOUTS[first], LAYOUTS[second]
    run = recipe(tmp_path, latents, init_from=start, num_steps=3, layout=before)
    train_on_ranks(run, num_before)
    train_on_ranks(replace(run, num_steps=6, layout=after), num_after)
    assert losses(run.output) == pytest.approx(losses(one_rank), rel=0, abs=1e-9)
    assert_same_checkpoint(run.output, one_rank)


def assert_same_checkpoint(folder, reference):
    """Every tensor of the newest checkpoints: weights, both moments, average."""
    (own, true) = (last_checkpoint(f) / "tensors" for f in (folder, reference))
    names = list(tensor_shapes(true))
    assert {name.split(".")[0] for name in names} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    assert set(names) == set(tensor_shapes(own))
    found, wanted = read_whole(own, names), read_whole(true, names)
    errors = {n: float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in names}
    assert {n: error for n, error in errors.items() if not error < 1e-9} == {}


@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_a_run_killed_inside_a_checkpoint_resumes_bit_for_bit(sharding, tmp_path, latents, start, one_rank):
    layout = Layout(sharding=sharding)
    run = recipe(tmp_path / "run", latents, init_from=start, precision="fp32", layout=layout)
    uninterrupted = replace(run, output=str(tmp_path / "whole"))
    train_on_ranks(uninterrupted, 2)
    assert losses(uninterrupted.output) == pytest.approx(losses(one_rank), rel=1e-5)
    with pytest.raises(AssertionError, match="died without a result"):
        train_on_ranks(run, 2, before=_die_in_the_second_checkpoint)
    assert last_checkpoint(run.output).name == "step=3"
    assert len(losses(run.output)) > 3
    train_on_ranks(run, 2)
    assert losses(run.output) == losses(uninterrupted.output)
    assert not list(Path(run.output, "checkpoints").glob("*.partial"))


def test_a_damaged_sample_is_named_and_training_goes_on_alike_on_all_ranks(tmp_path, start):
    write_latents(tmp_path / "latents")
    index = pq.read_table(tmp_path / "latents" / "index.parquet").to_pylist()
    damaged = next(row for row in index if row["latent_frames"] > 1)
    with open(tmp_path / "latents" / damaged["shard"], "r+b") as shard:
        shard.seek(damaged["offset"] + damaged["nbytes"] // 2)
        shard.write(b"\xff" * 64)
    one = recipe(tmp_path / "one", tmp_path / "latents", init_from=start)  # four batches: all sixteen clips
    two = replace(one, output=str(tmp_path / "two"), layout=Layout(tensor=2, sharding="none"))
    train_on_ranks(one, 1)
    train_on_ranks(two, 2)
    assert losses(two.output) == pytest.approx(losses(one.output), rel=0, abs=1e-9)
    (line,) = map(json.loads, (tmp_path / "one" / "quarantine.jsonl").read_text().splitlines())
    assert line["clip_id"] == damaged["clip_id"] and "checksum does not match" in line["reason"]


def test_fresh_weights_follow_the_seed_and_not_the_layout(tmp_path, latents, start):
    layout = recipe(tmp_path / "layout", latents, num_steps=1, layout=Layout(tensor=2, sharding="none"))
    seed = recipe(tmp_path / "seed", latents, num_steps=1, seed=1)
    train_on_ranks(layout, 2)
    train_on_ranks(seed, 1)
    first, same, other = (
        run_on_ranks(_positions, folder, world_size=1)[0] for folder in (start, layout.output, seed.output)
    )
    assert (first - same).abs().max() < 1e-10
    assert (first - other).abs().max() > 0.02


def test_bf16_trains_two_tensor_ranks_near_fp64_and_loads_as_fp32_on_a_cpu(
    tmp_path, latents, start, one_rank
):
    """Bf16 rounds to three digits; megatron's mixed precision keeps main weights and gradients in fp32."""
    run = recipe(tmp_path, latents, init_from=start, precision="bf16", layout=Layout(tensor=2))
    train_on_ranks(run, 2)
    assert losses(run.output) == pytest.approx(losses(one_rank), rel=1e-2)
    assert losses(run.output) != pytest.approx(losses(one_rank), rel=1e-6)
    trained, whole = (run_on_ranks(_positions, f, world_size=1)[0] for f in (run.output, one_rank))
    assert trained.dtype == torch.float32
    assert (trained - whole).abs().mean() < 2e-3  # six steps of up to 3e-3 each


def test_a_finished_run_loads_whole_on_one_process_for_sampling(tmp_path, latents, start):
    """Weights trained on two tensor ranks give one process the velocity they give two."""
    run = recipe(tmp_path, latents, init_from=start, layout=Layout(tensor=2, sharding="none"), num_steps=2)
    train_on_ranks(run, 2)
    (velocity,) = run_on_ranks(_velocity_of_loaded, run.output, Layout(), world_size=1)
    assert velocity.abs().max() > 1e-3
    for sharded in run_on_ranks(_velocity_of_loaded, run.output, run.layout, world_size=2):
        assert (sharded - velocity).abs().max() < 1e-10


def _positions(folder):
    return load_video_model(folder)[0].positions.row.data


def _velocity_of_loaded(folder, layout):
    model, run = load_video_model(folder, layout)
    assert run.name == "test" and not model.training
    batch = tiny.batch(2)
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)
    return model.velocity(batch.latent_BTCHW, times, batch.contexts, batch.masks)


def _die_in_the_second_checkpoint():
    from nemo_moviegen.training import saving

    write = saving.write_folder

    def write_and_die(folder, pieces, group):
        if "step=6" in str(folder):
            os.makedirs(folder, exist_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, pieces, group)

    saving.write_folder = write_and_die
