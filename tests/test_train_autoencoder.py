"""Training of the temporal autoencoder, from real files on disk to a run folder and back."""

import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks

from nemo_moviegen.data.clips import write_manifest
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.recipe import AutoencoderSize, Bucket, ClipData, Optim, TaeRecipe, read_recipe
from nemo_moviegen.training import autoencoder as training
from nemo_moviegen.training.autoencoder import (
    CHECKPOINT_FILE,
    TrainingClips,
    load_autoencoder,
    train_autoencoder,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    size = {"num_frames": 8, "size_px": 32, "fps": 8, "progress": False}
    clips = write_moving_shapes(folder, 8, **size) + write_moving_shapes(folder, 2, split="heldout", **size)
    return str(write_manifest(folder / "manifest.parquet", clips))


def small_recipe(manifest, output, **changes):
    recipe = TaeRecipe(
        name="test.tae",
        cluster="cpu_2",
        autoencoder=AutoencoderSize(base_width=4, multipliers=(1, 1, 2, 2), blocks_per_level=1),
        data=ClipData(manifest=manifest, bucket=Bucket(num_frames=8, height_px=32, width_px=32, fps=8)),
        optim=Optim(learning_rate=5e-3, warmup_steps=3, weight_decay=0.0, decay="cosine"),
        global_batch=4,
        micro_batch=2,
        num_steps=6,
        squared_error_steps=3,
        outlier_weight=1.0,
        precision="fp32",
        output=str(output),
        save_every=3,
        log_every=1,
    )
    return replace(recipe, **changes)


def metrics(run_folder):
    """Lines of steps, then those of checkpoints."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row], [row for row in rows if "heldout/psnr_db" in row]


def losses_of(rows):
    return [(row["step"], row["train/loss"], row["train/l1"]) for row in rows]


def test_training_brings_reconstructions_closer_and_writes_a_run_folder(manifest, tmp_path):
    recipe = small_recipe(manifest, tmp_path, num_steps=24, squared_error_steps=24, save_every=6)
    last = train_autoencoder(recipe)
    rows, checkpoints = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 25))
    clips = [row["train/psnr_db"] for row in rows if not row["train/is_image"]]
    assert sum(clips[-3:]) / 3 > sum(clips[:3]) / 3 + 3
    assert [row["step"] for row in checkpoints] == [6, 12, 18, 24]
    data = TrainingClips(recipe, 0, 1)
    (video, _), *rest = data.loader(data.heldout, range(2), 2)
    model = load_autoencoder(tmp_path)
    with torch.no_grad():
        rebuilt = model.decode(model.encode(video).mean_BTCHW, num_frames=8).clamp(-1, 1)
    psnr_db = 10 * math.log10(4 / float((rebuilt - video).square().mean()))
    assert not rest and checkpoints[-1]["heldout/psnr_db"] == pytest.approx(psnr_db, abs=1e-3)
    assert last["train/l1"] == rows[-1]["train/l1"]
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert list((tmp_path / "tensorboard").iterdir())
    wanted = (
        "train/kl train/outlier train/grad_norm speed/step_seconds speed/data_seconds speed/frames_per_second"
    )
    assert set(wanted.split()) <= rows[-1].keys()


def test_one_step_in_four_takes_images(manifest, tmp_path):
    train_autoencoder(small_recipe(manifest, tmp_path, num_steps=4))
    assert [row["train/is_image"] for row in metrics(tmp_path)[0]] == [0, 0, 0, 1]


def test_a_run_killed_after_a_checkpoint_goes_on_with_the_same_losses(manifest, tmp_path, monkeypatch):
    """Killed three steps past its checkpoint, inside the write of the next. Seen to catch: micro-batches
    accumulated one short after a resume."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_autoencoder(small_recipe(manifest, whole))

    def die(*_):
        raise KeyboardInterrupt("killed")

    real, writes = os.replace, []

    def replace_once(part, path):
        if path.name == CHECKPOINT_FILE:
            writes.append(path)
        return die() if len(writes) == 2 else real(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_once)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_autoencoder(small_recipe(manifest, killed))
    assert [row["step"] for row in metrics(killed)[0]] == [1, 2, 3, 4, 5, 6]
    train_autoencoder(small_recipe(manifest, killed))
    assert losses_of(metrics(killed)[0]) == losses_of(metrics(whole)[0])
    weights = load_autoencoder(killed).state_dict()
    for name, value in load_autoencoder(whole).state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


def test_ranks_share_the_batch_of_one_rank(manifest, tmp_path):
    recipe = small_recipe(manifest, tmp_path, image_batch=8, image_steps=2)
    one = TrainingClips(recipe, 0, 1)
    two = [TrainingClips(recipe, rank, 2) for rank in (0, 1)]
    for step in range(10):
        assert one.rows(step) == two[0].rows(step) + two[1].rows(step)


def test_two_ranks_train_the_weights_of_one(manifest, tmp_path):
    """In float64, images and clips. Seen to catch: every rank taking the rows of rank 0."""
    changes = {"num_steps": 4, "image_steps": 1, "image_batch": 8, "save_every": 2, "precision": "fp64"}
    one, two = tmp_path / "one", tmp_path / "two"
    train_autoencoder(small_recipe(manifest, one, **changes))
    run_on_ranks(_train_on_a_rank, small_recipe(manifest, two, **changes), timeout_seconds=300)
    for mine, theirs in zip(metrics(two)[0], metrics(one)[0], strict=True):
        for key in ("train/loss", "train/l1", "train/kl", "train/psnr_db", "train/grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9), key
    weights = load_autoencoder(two).state_dict()
    for name, value in load_autoencoder(one).state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)  # loaded in float32


def _train_on_a_rank(recipe):
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {"GROUP_RANK": "0"}
    train_autoencoder(recipe)


def test_steps_take_their_kind_and_every_row_comes_once_an_epoch(manifest, tmp_path):
    """Two image steps first, then one in four; eight clips and eight images are two and one batches."""
    clips = TrainingClips(small_recipe(manifest, tmp_path, image_batch=8, image_steps=2), 0, 1)
    kinds = [clips.kind(step) for step in range(10)]
    assert kinds == ["image"] * 2 + ["video", "video", "video", "image"] * 2
    for step, kind in enumerate(kinds):
        assert {clips.clips[row].kind for row in clips.rows(step)} == {kind}
    videos = [row for step in (2, 3) for row in clips.rows(step)]
    assert len(set(videos)) == 8
    assert all(len(set(clips.rows(step))) == 8 for step in (0, 1, 5, 9))


def test_clips_are_delivered_from_the_step_a_run_resumes_at(manifest, tmp_path):
    clips = TrainingClips(small_recipe(manifest, tmp_path, image_batch=8), 0, 1)
    first = [(tuple(video.shape), rows) for video, rows in itertools.islice(clips, 16)]
    clips.first_step = 3
    assert [(tuple(v.shape), rows) for v, rows in itertools.islice(clips, 10)] == first[
        6:
    ]  # two micro-batches a step
    assert first[6][0] == (4, 1, 3, 32, 32) and first[8][0] == (2, 8, 3, 32, 32)


def test_loading_gives_the_trained_weights_in_eval_mode(manifest, tmp_path):
    recipe = small_recipe(manifest, tmp_path, num_steps=2)
    train_autoencoder(recipe)
    model = load_autoencoder(tmp_path)
    assert not model.training
    assert model.size == recipe.autoencoder
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[f"autoencoder.{name}"]) for name, value in model.state_dict().items())


def test_the_penalty_and_the_squared_error_follow_their_steps(manifest, tmp_path):
    recipe = small_recipe(
        manifest, tmp_path, squared_error_steps=2, outlier_from_step=3, outlier_weight=10.0, kl_weight=0.0
    )
    torch.manual_seed(0)
    model = training.TemporalAutoencoder(recipe.autoencoder)
    video = torch.rand(1, 8, 3, 32, 32) * 2 - 1
    real = training.outlier_penalty
    try:
        training.outlier_penalty = lambda latent, scale: real(latent, 0.5)  # fresh latents have no outlier
        found = [training.losses(recipe, model, video, [7], step) for step in range(5)]
    finally:
        training.outlier_penalty = real
    for step, values in enumerate(found):
        expected = values["squared_error"] if step < 2 else values["l1"]
        assert values["outlier"] > 0
        expected = expected + (10.0 * values["outlier"] if step >= 3 else 0)
        torch.testing.assert_close(values["loss"], expected)


def test_a_folder_of_another_autoencoder_is_refused(manifest, tmp_path):
    train_autoencoder(small_recipe(manifest, tmp_path, num_steps=1))
    other = AutoencoderSize(base_width=8, multipliers=(1, 1, 2, 2), blocks_per_level=1)
    with pytest.raises(ValueError, match="another autoencoder"):
        train_autoencoder(small_recipe(manifest, tmp_path, autoencoder=other))


def test_a_folder_without_a_trained_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trained autoencoder"):
        load_autoencoder(tmp_path)


def test_a_bucket_without_whole_latents_is_refused(manifest, tmp_path):
    data = ClipData(manifest=manifest, bucket=Bucket(num_frames=8, height_px=36, width_px=32, fps=8))
    with pytest.raises(ValueError, match="multiples of 8"):
        small_recipe(manifest, tmp_path, data=data)
