"""Training of the temporal autoencoder, from real files on disk to a run folder and back."""

import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks

from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, read_manifest, write_manifest
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.recipe import (
    AutoencoderLosses,
    AutoencoderSize,
    Bucket,
    ClipData,
    DiscriminatorSettings,
    Optim,
    TaeRecipe,
    read_recipe,
)
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training import autoencoder_step as training
from nemo_moviegen.training.autoencoder import train_autoencoder
from nemo_moviegen.training.autoencoder_clips import TrainingClips
from nemo_moviegen.training.autoencoder_module import AutoencoderModule
from nemo_moviegen.training.autoencoder_weights import CHECKPOINT_FILE, load_autoencoder, start_from
from nemo_moviegen.training.record import write_recipe

ADVERSARIAL = AutoencoderLosses(adversarial=0.5, adversarial_from_step=1, outlier=1.0, squared_error_steps=3)
SMALL_DISCRIMINATOR = DiscriminatorSettings(width=4, levels=2, learning_rate=1e-3)


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
        loss=AutoencoderLosses(squared_error_steps=3, outlier=1.0),
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
    return [(row["step"], row["train/loss"], row["train/l1"], row.get("train/discriminator")) for row in rows]


def test_training_brings_reconstructions_closer_and_writes_a_run_folder(manifest, tmp_path):
    recipe = small_recipe(
        manifest,
        tmp_path,
        num_steps=24,
        loss=AutoencoderLosses(squared_error_steps=24, outlier=1.0),
        save_every=6,
    )
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
    recipe = small_recipe(manifest, tmp_path, image_batch=8)
    one = TrainingClips(recipe, 0, 1)
    two = [TrainingClips(recipe, rank, 2) for rank in (0, 1)]
    for step in range(10):
        assert one.rows(step) == two[0].rows(step) + two[1].rows(step)


def test_two_ranks_train_the_weights_of_one(manifest, tmp_path):
    """In float64: images and clips, crops of them, both discriminators, the average.

    Seen to catch: every rank taking the rows of rank 0; gradients summed instead of averaged; the adaptive
    weight taken from a rank's own micro-batches; the discriminator's gradients left unaveraged.
    """
    changes = {"num_steps": 5, "image_batch": 8, "save_every": 2, "precision": "fp64", "ema_decay": 0.5}
    changes |= {"loss": ADVERSARIAL, "discriminator": SMALL_DISCRIMINATOR}
    data = small_recipe(manifest, tmp_path).data
    changes["data"] = replace(data, crop_px=24, crops=2)
    one, two = tmp_path / "one", tmp_path / "two"
    train_autoencoder(small_recipe(manifest, one, **changes))
    run_on_ranks(_train_on_a_rank, small_recipe(manifest, two, **changes), timeout_seconds=300)
    compared = [
        "loss",
        "l1",
        "kl",
        "psnr_db",
        "grad_norm",
        "adversarial",
        "adversarial_weight",
        "discriminator",
    ]
    for mine, theirs in zip(metrics(two)[0], metrics(one)[0], strict=True):
        for key in compared:
            name = f"train/{key}"
            assert (name in mine) == (name in theirs), name
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-15), name
    assert metrics(one)[0][-1]["train/adversarial_weight"] > 0
    mine, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (two, one))
    for part in ("autoencoder", "average", "discriminator"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(mine[part][name], value, rtol=0, atol=1e-10, msg=f"{part} {name}")


def test_micro_batches_do_not_change_a_step(manifest, tmp_path):
    """Seen to catch: losses not divided by the number of micro-batches; the adaptive weight of the last."""
    changes = {"num_steps": 4, "precision": "fp64", "loss": ADVERSARIAL, "discriminator": SMALL_DISCRIMINATOR}
    for micro_batch in (1, 4):
        train_autoencoder(
            small_recipe(manifest, tmp_path / str(micro_batch), micro_batch=micro_batch, **changes)
        )
    ones, four = (metrics(tmp_path / name)[0] for name in ("1", "4"))
    for a, b in zip(ones, four, strict=True):
        for key, value in a.items():
            if key.startswith("train/"):
                assert b[key] == pytest.approx(value, rel=1e-9, abs=1e-15), key


def test_bfloat16_trains_nearly_as_float32(manifest, tmp_path):
    """With discriminators. Seen to catch: losses summed up in bfloat16."""
    changes = {"num_steps": 4, "loss": ADVERSARIAL, "discriminator": SMALL_DISCRIMINATOR}
    for precision in ("bf16", "fp32"):
        train_autoencoder(small_recipe(manifest, tmp_path / precision, precision=precision, **changes))
    for half, full in zip(*(metrics(tmp_path / name)[0] for name in ("bf16", "fp32")), strict=True):
        for key in sorted(key for key in full if key in ("train/l1", "train/kl", "train/psnr_db")):
            assert half[key] == pytest.approx(full[key], rel=0.03), (full["step"], key)


def test_the_discriminator_comes_in_at_its_step_and_learns(manifest, tmp_path):
    """What it judges hardly changes here. Seen to catch: its parameters trained to please instead."""
    recipe = small_recipe(
        manifest,
        tmp_path,
        num_steps=30,
        data=replace(small_recipe(manifest, tmp_path).data, image_every=0),
        loss=replace(ADVERSARIAL, adversarial_from_step=2, squared_error_steps=0),
        discriminator=replace(SMALL_DISCRIMINATOR, learning_rate=1e-2),
        optim=Optim(learning_rate=1e-5, warmup_steps=1, weight_decay=0.0),
    )
    train_autoencoder(recipe)
    rows = metrics(tmp_path)[0]
    assert all("train/discriminator" not in row for row in rows[:2])
    # the weight shown is that of the next step: the first verdict has none, the second has it
    for before, row in itertools.pairwise(rows[1:]):
        weight = 0.5 * before.get("train/adversarial_weight", 0.0)
        terms = row["train/l1"] + 1e-6 * row["train/kl"] + row["train/outlier"]
        assert row["train/loss"] == pytest.approx(terms + weight * row["train/adversarial"], rel=1e-4)
    assert rows[2]["train/adversarial_weight"] > 0
    losses = [row["train/discriminator"] for row in rows[2:]]
    assert losses[0] == pytest.approx(1.0, abs=0.2) and sum(losses[-3:]) / 3 < 0.6


def test_the_average_trails_the_weights_and_is_what_is_loaded(manifest, tmp_path):
    """Followed by hand. Seen to catch: the average started before weights were loaded."""
    recipe = small_recipe(manifest, tmp_path, num_steps=1, ema_decay=0.9)
    train_autoencoder(recipe)
    torch.manual_seed(recipe.seed)
    start = TemporalAutoencoder(recipe.autoencoder).state_dict()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    decay = 2 / 11  # of the first step: (1 + 1) / (10 + 1), below 0.9
    for name, value in load_autoencoder(tmp_path).state_dict().items():
        expected = decay * start[name] + (1 - decay) * saved["autoencoder"][name]
        torch.testing.assert_close(value, expected)
    name = "decoder.conv_out.space.weight"
    assert not torch.equal(saved["average"][name], saved["autoencoder"][name])


def test_a_run_starts_from_the_2d_one_inflated_and_reproduces_its_frames(manifest, tmp_path, capsys):
    """Seen to catch: fresh weights kept; the last frame of eight taken for the latent."""
    flat = replace(small_recipe(manifest, tmp_path).autoencoder, inflation="2D", temporal_compression=1)
    data = replace(small_recipe(manifest, tmp_path).data, image_every=1)
    train_autoencoder(small_recipe(manifest, tmp_path / "2d", autoencoder=flat, data=data))
    recipe = small_recipe(
        manifest,
        tmp_path / "run",
        init_from=str(tmp_path / "2d"),
        num_steps=1,
        optim=Optim(learning_rate=1e-12, warmup_steps=1, weight_decay=0.0),
    )
    train_autoencoder(recipe)
    assert "inflated" in capsys.readouterr().out
    image, video = load_autoencoder(tmp_path / "2d"), load_autoencoder(tmp_path / "run")
    clip = torch.rand(1, 16, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = image.encode(clip[:, ::8]).mean_BTCHW
        torch.testing.assert_close(video.encode(clip).mean_BTCHW, latent, rtol=0, atol=1e-4)
        frames = image.decode(latent).repeat_interleave(8, dim=1)
        torch.testing.assert_close(video.decode(latent), frames, rtol=0, atol=1e-4)


def test_a_finetune_takes_the_discriminator_along(manifest, tmp_path):
    changes = {"loss": ADVERSARIAL, "discriminator": SMALL_DISCRIMINATOR, "num_steps": 2}
    first = small_recipe(manifest, tmp_path / "first", **changes)
    train_autoencoder(first)
    module = AutoencoderModule(first, 1)
    start_from(module, tmp_path / "first")
    saved = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)
    for part in ("autoencoder", "discriminator"):
        for name, value in getattr(module, part).state_dict().items():
            assert torch.equal(value, saved[part][name]), name


def test_a_run_of_another_temporal_compression_is_refused_as_a_start(manifest, tmp_path):
    """The weights have the same shapes. Seen to catch: they were taken."""
    small = small_recipe(manifest, tmp_path).autoencoder
    four = small_recipe(manifest, tmp_path, autoencoder=replace(small, temporal_compression=4), num_steps=1)
    train_autoencoder(four)
    module = AutoencoderModule(small_recipe(manifest, tmp_path), 1)
    with pytest.raises(
        ValueError, match=r"4 frames in a latent, this run 8: .*set autoencoder\.temporal_compression=4"
    ):
        start_from(module, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ema_decay": 0.9}, "without average"),
        ({"loss": AutoencoderLosses(adversarial=0.1)}, "without discriminator"),
    ],
)
def test_a_run_goes_on_only_with_the_parts_it_began_with(manifest, tmp_path, changes, says):
    train_autoencoder(small_recipe(manifest, tmp_path, num_steps=1))
    with pytest.raises(ValueError, match=says):
        train_autoencoder(small_recipe(manifest, tmp_path, **changes))


def test_crops_are_a_function_of_sample_and_step_and_differ_between_samples(manifest, tmp_path):
    data = replace(small_recipe(manifest, tmp_path).data, crop_px=16, crops=3)
    recipe = small_recipe(manifest, tmp_path, data=data)
    clips = TrainingClips(recipe, 0, 1)
    video = torch.arange(2 * 8 * 3 * 32 * 32, dtype=torch.float32).view(2, 8, 3, 32, 32)
    crops, ids = clips.cropped(video, [0, 1], step=5)
    again, same_ids = TrainingClips(recipe, 0, 1).cropped(video, [0, 1], step=5)
    assert crops.shape == (6, 8, 3, 16, 16) and len(set(ids)) == 6
    assert torch.equal(crops, again) and ids == same_ids
    corners = crops[:, 0, 0, 0, 0] % (32 * 32)
    assert len(set(corners.tolist())) > 3
    assert not torch.equal(clips.cropped(video, [0, 1], step=6)[0], crops)
    # one place for all frames of a clip: consecutive frames lie 3 * 32 * 32 values apart
    assert torch.equal(crops[:, 1:, :, :, :] - crops[:, :-1], torch.full_like(crops[:, 1:], 3 * 32 * 32))
    flat = replace(recipe.autoencoder, inflation="2D", temporal_compression=1)
    alone = TrainingClips(replace(recipe, autoencoder=flat), 0, 1).cropped(video, [0, 1], step=5)[0]
    assert len(set((alone[0, :, 0, 0, 0] % (32 * 32)).tolist())) > 4  # a place for each frame


def test_clips_kept_in_memory_are_those_of_the_files_and_decoded_once(manifest, tmp_path, monkeypatch):
    """Over three epochs, with a file that cannot be read. Seen to catch: a substitute under its own row."""
    clips = [*read_manifest(manifest)]
    spoilt = next(
        number for number, clip in enumerate(clips) if clip.kind == "video" and clip.split == "train"
    )
    clips[spoilt] = replace(clips[spoilt], path=str(tmp_path / "gone.mp4"))
    damaged = str(write_manifest(tmp_path / "manifest.parquet", clips))
    recipe = small_recipe(damaged, tmp_path, num_steps=9)
    streamed = list(TrainingClips(recipe, 0, 1))
    keeps = TrainingClips(replace(recipe, data=replace(recipe.data, in_memory=True)), 0, 1)
    decoded, real = [], keeps.loader
    monkeypatch.setattr(
        keeps, "loader", lambda clips, rows, size: decoded.extend(rows) or real(clips, rows, size)
    )
    for (video, ids), (kept, kept_ids) in zip(streamed, keeps, strict=True):
        assert torch.equal(video, kept) and ids == kept_ids
    assert len(decoded) == len(set(decoded)) == 8 + 8


def test_a_video_file_is_cut_into_clips_of_the_bucket(tmp_path):
    data = ClipData(
        manifest=str(BIG_BUCK_BUNNY), bucket=Bucket(num_frames=16, height_px=64, width_px=64, fps=25)
    )
    clips = TrainingClips(small_recipe("", tmp_path, data=data), 0, 1).clips
    kinds = clips.column("kind").tolist()
    assert kinds.count("video") == kinds.count("image") == 8
    assert clips[2].start_seconds == pytest.approx(16 / 25)


def _train_on_a_rank(recipe):
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {"GROUP_RANK": "0"}
    train_autoencoder(recipe)


def test_steps_take_their_kind_and_every_row_comes_once_an_epoch(manifest, tmp_path):
    """Eight clips and eight images are two and one batches."""
    clips = TrainingClips(small_recipe(manifest, tmp_path, image_batch=8), 0, 1)
    kinds = [clips.kind(step) for step in range(8)]
    assert kinds == ["video", "video", "video", "image"] * 2
    for step, kind in enumerate(kinds):
        assert {clips.clips[row].kind for row in clips.rows(step)} == {kind}
    videos = [row for step in (0, 1) for row in clips.rows(step)]
    assert len(set(videos)) == 8
    assert all(len(set(clips.rows(step))) == 8 for step in (3, 7))
    assert all(len(set(clips.rows(step))) == 4 for step in (0, 1, 2))


def test_clips_are_delivered_from_the_step_a_run_resumes_at(manifest, tmp_path):
    clips = TrainingClips(small_recipe(manifest, tmp_path, image_batch=8, num_steps=8), 0, 1)
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
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["autoencoder"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_the_penalty_and_the_squared_error_follow_their_steps(manifest, tmp_path):
    loss = AutoencoderLosses(squared_error_steps=2, outlier_from_step=3, outlier=10.0, kl=0.0)
    recipe = small_recipe(manifest, tmp_path, loss=loss)
    torch.manual_seed(0)
    model = TemporalAutoencoder(recipe.autoencoder)
    video = torch.rand(1, 8, 3, 32, 32) * 2 - 1
    real = training.outlier_penalty
    try:
        training.outlier_penalty = lambda latent, scale: real(latent, 0.5)  # fresh latents have no outlier
        found = [training.reconstruct(recipe, model, video, [7], step).losses for step in range(5)]
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
    changed = small_recipe(manifest, tmp_path, autoencoder=other)
    with pytest.raises(ValueError, match="another autoencoder"):
        train_autoencoder(changed)
    write_recipe(changed)
    with pytest.raises(ValueError, match=r"holds another autoencoder than its recipe\.yaml says"):
        load_autoencoder(tmp_path)


def test_a_folder_without_a_trained_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trained autoencoder"):
        load_autoencoder(tmp_path)


def test_a_bucket_without_whole_latents_is_refused(manifest, tmp_path):
    data = ClipData(manifest=manifest, bucket=Bucket(num_frames=8, height_px=36, width_px=32, fps=8))
    with pytest.raises(ValueError, match="multiples of 8"):
        small_recipe(manifest, tmp_path, data=data)
