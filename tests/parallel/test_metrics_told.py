"""What a run tells of its speed: MFU of the very steps it took, and the same numbers to every logger."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.flops import forward_flops
from nemo_moviegen.launch import check_inputs
from nemo_moviegen.recipe import LatentData, Layout, Progress
from nemo_moviegen.training.data import batch_order
from parallel.runs import recipe, train_on_ranks, write_latents

QUIET = Progress(every_seconds=0)
PEAK_TFLOPS = 1e-3
"""Of a rank, so small that these runs have an MFU one can read."""
SHAPES = ((3, 8, 4), (2, 8, 8))


pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder, shapes=SHAPES)
    return folder


def lines(run):
    return [json.loads(line) for line in Path(run.output, "metrics.jsonl").read_text().splitlines()]


def give_the_cluster_a_peak():
    from nemo_moviegen.training import callbacks

    right = callbacks.read_cluster
    callbacks.read_cluster = lambda name: replace(right(name), peak_dense_tflops=PEAK_TFLOPS)


def real_flops(run, reader, step):
    """(model, recomputed) FLOPs of a step, sample by sample, with each prompt's own tokens."""
    rows, _ = batch_order(reader, run).batch(step)
    model = again = 0
    for row in rows:
        sample = reader[row]
        text = {name: len(features) for name, features in sample.contexts.items()}
        forward = forward_flops(run.size, tuple(reader.latent_shapes[row].tolist()), text)
        model += 3 * sum(forward.values())
        again += forward["ffn"]
    return model, again


@pytest.mark.parametrize("batching", ["bucket", "packed"])
def test_mfu_is_of_the_steps_own_shapes_and_prompts_over_the_peak_of_both_ranks(batching, tmp_path, latents):
    """One copy on two ranks, so that it sees every prompt; steps of clips, packs, and images."""
    run = recipe(
        tmp_path,
        latents,
        data=LatentData(folder=str(latents), image_every=3, prompt_drop=0.0, batching=batching),
        layout=Layout(tensor=2, sharding="none", recompute="selective"),
        micro_batch=1,
        num_steps=3,
        latent_width=8,
        progress=QUIET,
    )
    train_on_ranks(run, 2, before=give_the_cluster_a_peak)
    reader = LatentReader(latents)
    for line in lines(run):
        seconds = line["speed/step_seconds"]
        model, again = real_flops(run, reader, line["step"] - 1)
        tflops = model / seconds / 2 / 1e12
        assert line["speed/tflops_per_gpu"] == pytest.approx(tflops, rel=1e-3), line["step"]
        assert line["speed/mfu"] == pytest.approx(tflops / PEAK_TFLOPS, rel=1e-3)
        assert line["speed/hfu"] / line["speed/mfu"] == pytest.approx((model + again) / model, rel=1e-3)
        assert line["speed/data_wait"] == pytest.approx(line["speed/data_seconds"] / seconds)
        assert 0.1 < line["memory/resident_gib"] < 50 and "memory/peak_gib" not in line


def test_a_cluster_without_a_peak_has_no_mfu(tmp_path, latents):
    run = recipe(tmp_path, latents, latent_width=8, num_steps=1, progress=QUIET)
    train_on_ranks(run, 1)
    (line,) = lines(run)
    assert line["speed/tflops_per_gpu"] > 0
    assert "speed/mfu" not in line and "speed/hfu" not in line


STAND_IN = """
import json, os, sys, types
class Run:
    def __init__(self, **said):
        self.file = os.path.join(said["dir"], "wandb.jsonl")
        self.config = types.SimpleNamespace(update=lambda *a, **k: None)
        init = {k: said[k] for k in ("project", "name", "id", "resume")}
        self.write(init=init, size=said["config"]["size"]["name"])
    def write(self, **row):
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\\n")
    def log(self, metrics, **rest):
        self.write(**metrics)
    def define_metric(self, *names, **rest): ...
    def __getattr__(self, name):
        raise AttributeError(name)
class RunDisabled: ...
run = None
def init(**said):
    return Run(**said)
def module(name, **names):
    made = sys.modules[name] = types.ModuleType(name)
    vars(made).update(names)
module("wandb.sdk")
module("wandb.sdk.lib", RunDisabled=RunDisabled)
module("wandb.wandb_run", Run=Run)
"""


def test_weights_and_biases_gets_the_numbers_of_metrics_jsonl_in_one_place_over_a_resume(tmp_path, latents):
    """With a stand-in for its package: nothing leaves the machine."""
    stand_in = tmp_path / "packages"
    (stand_in / "wandb-99.0.dist-info").mkdir(parents=True)
    (stand_in / "wandb-99.0.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 99.0\n")
    (stand_in / "wandb.py").write_text(STAND_IN)

    def use_stand_in():
        for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
            del sys.modules[name]
        sys.path.insert(0, str(stand_in))

    progress = replace(QUIET, wandb_project="movies")
    run = recipe(
        tmp_path / "run", latents, latent_width=8, num_steps=2, log_every=1, save_every=2, progress=progress
    )
    train_on_ranks(run, 2, before=use_stand_in)
    train_on_ranks(replace(run, num_steps=3), 2, before=use_stand_in)
    first, *told = map(json.loads, Path(run.output, "wandb.jsonl").read_text().splitlines())
    again = next(row for row in told if "init" in row)
    told = [row for row in told if "train/loss" in row]  # NeMo's trainer logs rows of its own
    assert first == again  # the same id
    assert first["init"] | {"id": ""} == {"project": "movies", "name": "test", "id": "", "resume": "allow"}
    assert first["size"] == "test" and len(first["init"]["id"]) == 12
    assert [row["trainer/global_step"] for row in told] == [1, 2, 3]
    assert [row["train/loss"] for row in told] == [line["train/loss"] for line in lines(run)]


def test_without_its_package_weights_and_biases_are_refused_before_launch(tmp_path, latents, monkeypatch):
    run = recipe(tmp_path, latents, latent_width=8, progress=Progress(wandb_project="movies"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=r"project movies .* not installed: pip install wandb, or set progress"
    ):
        check_inputs(run)
    check_inputs(replace(run, progress=Progress()))
