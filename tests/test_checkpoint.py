"""Run folders: which checkpoint counts, where a run starts, and what is refused before anything is built."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from nemo_moviegen.recipe import METRICS_FILE, LatentData, Layout, Optim, VideoRecipe, read_recipe
from nemo_moviegen.training.checkpoint import (
    join_process_groups,
    last_checkpoint,
    load_video_model,
    starting_checkpoints,
)
from nemo_moviegen.training.record import RunRecord, learning_rate_factor, write_recipe
from nemo_moviegen.training.run import train, uses_transformer_engine


def recipe(folder, **changes):
    frames, height, width = tiny.LATENT_SHAPE
    base = VideoRecipe(
        name="test",
        cluster="cpu_2",
        size=tiny.SIZE,
        data=LatentData(folder="latents"),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        optim=Optim(learning_rate=1e-3, warmup_steps=4),
        global_batch=4,
        micro_batch=2,
        num_steps=6,
        precision="fp32",
        output=str(folder),
    )
    return replace(base, **changes)


def finish(folder, step):
    weights = folder / "checkpoints" / f"step={step}" / "weights"
    weights.mkdir(parents=True)
    (weights / "metadata.json").write_text("{}")


def test_the_newest_finished_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        finish(tmp_path, step)
    assert last_checkpoint(tmp_path).name == "step=100"
    (tmp_path / "checkpoints" / "step=100-unfinished").touch()
    assert last_checkpoint(tmp_path).name == "step=10"
    (tmp_path / "checkpoints" / "step=10" / "weights" / "metadata.json").unlink()
    assert last_checkpoint(tmp_path).name == "step=9"


def test_a_run_starts_from_its_own_checkpoint_before_that_of_another(tmp_path):
    run = recipe(tmp_path / "own", init_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="other holds no finished checkpoint; train that run first"):
        starting_checkpoints(run)
    write_recipe(recipe(tmp_path / "other"))
    finish(tmp_path / "other", 5)
    assert starting_checkpoints(run) == (None, tmp_path / "other" / "checkpoints" / "step=5")
    write_recipe(run)
    finish(tmp_path / "own", 2)
    assert starting_checkpoints(run) == (tmp_path / "own" / "checkpoints" / "step=2", None)
    assert starting_checkpoints(recipe(tmp_path / "fresh")) == (None, None)


@pytest.mark.parametrize("role", ["output", "init_from"])
def test_weights_of_another_size_are_refused_naming_the_difference(tmp_path, role):
    write_recipe(recipe(tmp_path / "wide", size=replace(tiny.SIZE, name="wide", ffn_width=128)))
    finish(tmp_path / "wide", 5)
    run = recipe(tmp_path / "run", **{role: str(tmp_path / "wide")})
    with pytest.raises(ValueError, match=f"ffn_width 128 instead of 64; set another {role}"):
        starting_checkpoints(run)


def test_folders_that_hold_no_video_run_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it holds no recipe\.yaml"):
        load_video_model(tmp_path)
    write_recipe(recipe(tmp_path))
    with pytest.raises(ValueError, match="holds no finished checkpoint yet"):
        load_video_model(tmp_path)


def test_a_recipe_is_written_whole_and_read_back(tmp_path):
    write_recipe(recipe(tmp_path / "new"))
    assert read_recipe(tmp_path / "new" / "recipe.yaml") == recipe(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["recipe.yaml"]


def test_ranks_started_without_torchrun_and_lone_stages_among_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="ranks with torchrun"):
        train(recipe(tmp_path))
    with pytest.raises(ValueError, match="runs in one process"):
        join_process_groups(Layout())


def test_bf16_on_a_gpu_asks_for_transformer_engine(monkeypatch):
    bf16 = SimpleNamespace(name="test", precision="bf16")
    assert not uses_transformer_engine(bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert uses_transformer_engine(bf16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not uses_transformer_engine(SimpleNamespace(precision="fp32"))
    with pytest.raises(ValueError, match=r"requirements-gpu\.txt, or set precision=fp32"):
        uses_transformer_engine(bf16)


def test_odd_pieces_are_refused_where_transformer_engine_would_refuse_them(tmp_path):
    shape = {"latent_frames": 3, "latent_height": 4, "latent_width": 2, "layout": Layout(context=2)}
    images = LatentData(folder="latents", image_every=0)
    assert recipe(tmp_path, data=images, **shape).precision == "fp32"  # 3 of 6 tokens each
    with pytest.raises(ValueError, match=r"whose tokens divide by 4, or another layout\.context"):
        recipe(tmp_path, data=images, precision="bf16", **shape)


def test_the_learning_rate_warms_up_and_then_stays_or_falls_to_a_tenth():
    constant = Optim(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_factor(step, constant, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    cosine = replace(constant, decay="cosine")
    assert learning_rate_factor(4, cosine, 104) == 1
    assert learning_rate_factor(54, cosine, 104) == pytest.approx(0.55)
    assert learning_rate_factor(104, cosine, 104) == pytest.approx(0.1)
    assert learning_rate_factor(500, cosine, 104) == pytest.approx(0.1)


def test_a_resumed_record_forgets_what_is_written_again(tmp_path, capsys):
    record = RunRecord("run", tmp_path, 0, 10)
    for step in range(1, 8):
        record.write(step, {"train/loss": step / 10})
        record.show(step, "fine")
    record.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "train/l')  # killed while writing
    record = RunRecord("run", tmp_path, 5, 10)
    record.write(6, {"train/loss": 60})
    record.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["train/loss"] == 60
    assert "run 3/10  fine" in capsys.readouterr().out
