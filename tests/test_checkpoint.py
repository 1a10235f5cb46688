"""Run folders: which checkpoint counts, where a run starts, and what is refused before anything is built."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen.recipe import METRICS_FILE, LatentData, Layout, Optim, VideoRecipe, read_recipe
from nemo_moviegen.training.checkpoint import (
    join_process_groups,
    last_checkpoint,
    load_video_model,
    remove,
    starting_checkpoints,
    superfluous,
    tidy,
)
from nemo_moviegen.training.record import RunRecord, learning_rate_factor, write_recipe
from nemo_moviegen.training.run import train, uses_transformer_engine
from nemo_moviegen.training.storage import Piece, write_folder, write_json


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


def finish(folder, step, loss=None):
    """A finished checkpoint that holds one small tensor."""
    checkpoint = folder / "checkpoints" / f"step={step}"
    weight = torch.arange(6.0)
    write_folder(checkpoint / "tensors", {"weights.x": [Piece((0,), (6,), weight)]})
    write_json(checkpoint / "state.json", {"step": step, "validation_loss": loss})
    return checkpoint


def test_the_newest_finished_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        finish(tmp_path, step)
    assert last_checkpoint(tmp_path).name == "step=100"
    (tmp_path / "checkpoints" / "step=100").rename(tmp_path / "checkpoints" / "step=100.partial")
    assert last_checkpoint(tmp_path).name == "step=10"
    (tmp_path / "checkpoints" / "step=10" / "state.json").unlink()
    assert last_checkpoint(tmp_path).name == "step=9"


def test_what_a_killed_run_left_is_tidied_away_and_nothing_else(tmp_path):
    for step in (3, 6, 9):
        finish(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step=9").rename(folder / "step=9.partial")
    remove(folder / "step=3")
    (folder / "step=2.removing").mkdir()
    tidy(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["step=6"]


def test_retention_keeps_the_newest_the_best_and_the_landmarks():
    losses = {1: 5.0, 2: 1.0, 3: None, 4: 3.0, 5: 2.0, 6: 4.0}
    assert superfluous(losses, keep_last=2, keep_every=0, keep_best=0) == [1, 2, 3, 4]
    assert superfluous(losses, keep_last=1, keep_every=3, keep_best=0) == [1, 2, 4, 5]
    assert superfluous(losses, keep_last=1, keep_every=0, keep_best=2) == [1, 3, 4]
    assert superfluous(losses, keep_last=9, keep_every=0, keep_best=0) == []


@given(
    st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 1), max_size=12),
    st.integers(1, 4),
    st.integers(0, 7),
    st.integers(0, 3),
)
def test_retention_never_removes_the_newest_and_keeps_no_more_than_asked(losses, last, every, best):
    gone = superfluous(losses, keep_last=last, keep_every=every, keep_best=best)
    kept = set(losses) - set(gone)
    assert set(sorted(losses)[-last:]) <= kept
    assert len(kept) <= last + best + sum(1 for step in losses if every and step % every == 0)


def test_a_checkpoint_cut_short_or_without_a_file_is_refused_and_the_one_before_named(tmp_path):
    run = recipe(tmp_path)
    write_recipe(run)
    finish(tmp_path, 3)
    newest = finish(tmp_path, 6)
    (file,) = (newest / "tensors").glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(
        ValueError, match=r"is damaged: .*distcp has .* remove that folder to go on from step=3"
    ):
        starting_checkpoints(run)
    file.unlink()
    with pytest.raises(ValueError, match=r"is incomplete: .*distcp is missing"):
        starting_checkpoints(run)
    file.write_bytes(whole)
    assert starting_checkpoints(run) == (newest, None)
    (newest / "tensors" / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="can not be read"):
        starting_checkpoints(run)
    (newest / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json can not be read"):
        starting_checkpoints(run)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 7}, "seed 7 instead of 0"),
        ({"global_batch": 8}, "global_batch 8 instead of 4"),
        ({"name": "other"}, "name other instead of test"),
        ({"data": LatentData(folder="elsewhere")}, r"data\.folder elsewhere instead of latents"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_naming_what_differs(tmp_path, change, said):
    write_recipe(recipe(tmp_path, **change))
    finish(tmp_path, 3)
    with pytest.raises(ValueError, match=f"holds another run than test: {said}; resume with its"):
        starting_checkpoints(recipe(tmp_path))
    starting_checkpoints(recipe(tmp_path, **change, num_steps=99, save_every=3))  # a run may go on for longer


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


@pytest.mark.parametrize(
    "role, said",
    [
        ("output", "ffn_width 128 instead of 64; set another output"),
        ("init_from", "ffn_width is 64, those weights have 128: set size.ffn_width=128; or set init_from="),
    ],
)
def test_weights_of_another_size_are_refused_naming_the_difference(tmp_path, role, said):
    write_recipe(recipe(tmp_path / "wide", size=replace(tiny.SIZE, name="wide", ffn_width=128)))
    finish(tmp_path / "wide", 5)
    run = recipe(tmp_path / "run", **{role: str(tmp_path / "wide")})
    with pytest.raises(ValueError, match=said):
        starting_checkpoints(run)


def test_folders_that_hold_no_video_run_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it holds no recipe\.yaml"):
        load_video_model(tmp_path)
    write_recipe(recipe(tmp_path))
    with pytest.raises(ValueError, match="holds no finished checkpoint yet"):
        load_video_model(tmp_path)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (1, r"holds another model than .*recipe\.yaml says: weights\.decoder\.layers\.1\."),
        (3, r"holds another model: weights\.decoder\.layers\.2\..* is missing"),
    ],
    ids=["fewer", "more"],
)
def test_a_model_of_fewer_or_more_layers_than_were_trained_is_refused(tmp_path, layers, said):
    """Seen to catch: the layers that a changed recipe still names are read, and the others left out."""
    run_on_ranks(_save_a_model, tmp_path, world_size=1)
    write_recipe(recipe(tmp_path, size=replace(tiny.SIZE, num_layers=layers)))
    with pytest.raises(AssertionError, match=said):
        run_on_ranks(_load_a_model, tmp_path, world_size=1)


def _save_a_model(folder):
    """A finished checkpoint of fresh weights of `tiny.SIZE`."""
    from nemo_moviegen.training.cpu import stand_in_for_cuda
    from nemo_moviegen.video.model import VideoTransformer, video_config

    stand_in_for_cuda()
    join_process_groups(Layout())
    weights = VideoTransformer(video_config(tiny.SIZE, Layout(), "fp32"), seed=0).named_parameters()
    checkpoint = folder / "checkpoints" / "step=1"
    write_folder(
        checkpoint / "tensors",
        {f"weights.{n}": [Piece((0,) * p.dim(), tuple(p.shape), p.detach())] for n, p in weights},
    )
    write_json(checkpoint / "state.json", {"step": 1, "validation_loss": None})


def _load_a_model(folder):
    load_video_model(folder)


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
    with pytest.raises(ValueError, match=r"whose tokens divide by 4"):
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
