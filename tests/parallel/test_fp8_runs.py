"""Runs in emulated FP8: near bf16's under every layout, judged by the gate, what they lose reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from nemo_moviegen.bench import parity
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.layout import Layout
from nemo_moviegen.precision import PARTS, Fp8
from nemo_moviegen.recipe import LatentData, Optim, VideoRecipe, override
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.training.fp8_report import facts_of, fp8_linears
from nemo_moviegen.video import fp8_emulated
from parallel.runs import train_on_ranks

pytestmark = pytest.mark.usefixtures("nemo")

SIZE = replace(VIDEO_TINY, num_layers=3)
SHAPE = (2, 8, 8)
EMULATED = Fp8(emulated=True)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "latents"
    write_random_latents(folder, SIZE, 24, np.random.default_rng(0), shapes=(SHAPE,))
    return folder


def run_of(folder, latents, **changes) -> VideoRecipe:
    base = VideoRecipe(
        name="test",
        cluster="cpu_2",
        size=SIZE,
        data=LatentData(folder=str(latents), image_every=0),
        latent_frames=2,
        latent_height=8,
        latent_width=8,
        optim=Optim(learning_rate=3e-3, warmup_steps=2),
        global_batch=8,
        micro_batch=4,
        num_steps=12,
        save_every=0,
        precision="fp8_current",
        fp8=EMULATED,
        output=str(folder),
    )
    return replace(base, **changes)


def losses(recipe, num_ranks=1, before=None):
    train_on_ranks(recipe, num_ranks, before=before)
    lines = Path(recipe.output, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory, latents):
    folder = tmp_path_factory.mktemp("twin") / "bf16"
    losses(run_of(folder, latents, precision="bf16"))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, latents):
    return np.array(losses(run_of(tmp_path_factory.mktemp("alone"), latents)))


def cut_off_most():
    """A planted bug: scales that are 64 times too large."""
    scale_of = fp8_emulated.Scaling.scale_of
    fp8_emulated.Scaling.scale_of = lambda *args, **kwargs: 64 * scale_of(*args, **kwargs)


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_current", "fp8_block"])
def test_a_run_in_fp8_passes_the_gate_and_says_what_it_lost(precision, tmp_path, latents, in_bf16):
    recipe = run_of(tmp_path / "fp8", latents, precision=precision)
    losses(replace(recipe, fp8=replace(EMULATED, report_every=4)))
    lines = []
    code = parity.judge(tmp_path / "fp8", in_bf16, gap=0.01, output=tmp_path / "json", log=lines.append)
    found = json.loads((tmp_path / "json").read_text())
    assert code == 0 and found["passes"] and 0 < abs(found["gap"]) < 0.01
    assert found["steps"] == 12 and found["largest_difference"] > 0
    assert len(found["linears"]) == 3 * 3 * 7  # operands, layers, their linears
    assert all(row["largest"] > 0 and row["cut_off"] < 0.01 for row in found["linears"])
    assert len((tmp_path / "fp8" / "fp8.jsonl").read_text().splitlines()) == 3
    assert any("passes" in line for line in lines if isinstance(line, str))


def test_a_run_whose_scales_are_wrong_fails_the_gate(tmp_path, latents, in_bf16, capfd):
    recipe = run_of(tmp_path / "fp8", latents, fp8=replace(EMULATED, report_every=6))
    losses(recipe, before=cut_off_most)
    assert parity.judge(tmp_path / "fp8", in_bf16, gap=0.01, log=lambda _: None) == 1
    assert parity.compare(tmp_path / "fp8", in_bf16)["linears"][0]["cut_off"] > 0.1
    assert "FP8 cuts off" in capfd.readouterr().out


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(context=2), Layout(tensor=2, sequence=False), Layout(sharding="full")]
)
def test_layouts_differ_by_less_than_fp8_rounds(layout, tmp_path, latents, alone):
    shared = np.array(losses(run_of(tmp_path / "shared", latents, layout=layout), 2))
    assert np.abs(shared / alone - 1).max() < 0.01


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_current"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(precision, recompute, tmp_path, latents):
    """A scale that moved between the two forward passes would."""
    kept = losses(run_of(tmp_path / "kept", latents, precision=precision, num_steps=4))
    layout = Layout(recompute=recompute)
    assert (
        losses(run_of(tmp_path / "again", latents, precision=precision, num_steps=4, layout=layout)) == kept
    )


def modules_in_fp8(recipe):
    from megatron.core import parallel_state

    from nemo_moviegen.training.cpu import stand_in_for_cuda
    from nemo_moviegen.video.model import VideoTransformer, video_config

    stand_in_for_cuda()
    parallel_state.initialize_model_parallel()
    config = video_config(recipe.size, Layout(), recipe.precision, fp8=recipe.fp8)
    return [name for name, _ in fp8_linears(VideoTransformer(config))]


def test_what_stays_in_bf16_is_the_recipes_choice(tmp_path, latents):
    base = run_of(tmp_path / "fp8", latents, micro_batch=8)
    changes = ["fp8.bf16_layers=1", "fp8.bf16_parts=[context_projections]"]
    (names,) = run_on_ranks(modules_in_fp8, override(base, changes), world_size=1)
    outside = {name.partition(".")[0] for name in names if not name.startswith("decoder")}
    assert outside == set(PARTS) - {"context_projections"}
    assert {name.split(".")[2] for name in names if name.startswith("decoder")} == {"1"}
    (names,) = run_on_ranks(modules_in_fp8, base, world_size=1)
    assert len(names) == 3 * 7 and all(name.startswith("decoder.layers.") for name in names)


def test_every_part_in_fp8_trains(tmp_path, latents):
    fp8 = replace(EMULATED, bf16_parts=())
    found = losses(run_of(tmp_path / "all", latents, fp8=fp8, micro_batch=8))
    assert len(found) == 12 and found[-1] < found[0]


def test_what_is_lost_is_counted():
    scale = torch.tensor(448.0)
    tensor = torch.tensor([[1.0, 2.0, 0.0, 1e-6]])  # at this scale 1 is the largest
    assert facts_of(tensor, "input", scale) == {
        "largest": 2.0,
        "cut_off": 0.25,
        "to_zero": pytest.approx(1 / 3),
    }


def test_runs_that_are_no_twins_are_not_compared(tmp_path, latents, in_bf16):
    losses(run_of(tmp_path / "other", latents, num_steps=9, seed=1))
    with pytest.raises(ValueError, match="differ in num_steps, seed too"):
        parity.compare(tmp_path / "other", in_bf16)
    with pytest.raises(ValueError, match="name a run in FP8, then its twin in bf16"):
        parity.compare(in_bf16, in_bf16)
    losses(run_of(tmp_path / "short", latents))
    lines = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()[:5]
    (tmp_path / "short" / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="5 steps in common: train 8 or more"):
        parity.compare(tmp_path / "short", in_bf16)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [({"precision": "bf16"}, 20, "--parity compares FP8 with bf16"), ({}, 4, "use 8 or more")],
)
def test_what_can_not_be_judged_is_refused(changes, steps, message, tmp_path, latents):
    from nemo_moviegen.cluster import read_cluster

    with pytest.raises(ValueError, match=message):
        parity.gate(run_of(tmp_path, latents, **changes), read_cluster("cpu_2"), tmp_path, steps=steps)
