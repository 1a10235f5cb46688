"""`moviegen average`: the mean is exact, needs the memory of one tensor, and what does not fit is refused."""

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ranks import run_on_ranks
from test_checkpoint import recipe

from nemo_moviegen import __main__ as cli
from nemo_moviegen.training.cpu import stand_in_for_cuda

stand_in_for_cuda()

from megatron.core import dist_checkpointing  # noqa: E402, after the stand-in

from nemo_moviegen.training.average import average  # noqa: E402
from nemo_moviegen.training.checkpoint import (  # noqa: E402
    join_process_groups,
    load_video_model,
    starting_checkpoints,
)
from nemo_moviegen.training.record import write_recipe  # noqa: E402
from nemo_moviegen.training.saving import Checkpoints  # noqa: E402
from nemo_moviegen.training.storage import Piece, read_whole, tensor_shapes, write_folder, write_json  # noqa: E402

SHAPES = {"a": (6, 4), "b.bias": (5,)}


def finish(run_folder, step, seed, *, kinds=("weights", "exp_avg"), shapes=SHAPES, dtype=torch.float32):
    """A finished checkpoint of random tensors, some cut in two pieces; returns ({name: array}, folder)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{kind}.{name}": torch.randn(shape, generator=generator, dtype=dtype)
        for kind in kinds
        for name, shape in shapes.items()
    }
    folder = run_folder / "checkpoints" / f"step={step}"
    write_folder(folder / "tensors", {name: _halves(tensor) for name, tensor in tensors.items()})
    write_json(folder / "state.json", {"step": step, "optimizer_steps": step, "validation_loss": None})
    return {name: tensor.numpy() for name, tensor in tensors.items()}, folder


def _halves(tensor):
    half, shape, rest = len(tensor) // 2, tuple(tensor.shape), (0,) * (tensor.dim() - 1)
    return [Piece((0, *rest), shape, tensor[:half]), Piece((half, *rest), shape, tensor[half:])]


@pytest.fixture
def runs(tmp_path):
    """Three runs: ({name: array}, newest checkpoint) of each; the first has an older one too."""
    made = []
    for number, name in enumerate("xyz"):
        write_recipe(recipe(tmp_path / name, init_from=f"start {name}"))
        made.append(finish(tmp_path / name, step=10 + number, seed=number))
    finish(tmp_path / "x", step=5, seed=9)
    return made


def averaged(folder):
    names = list(tensor_shapes(folder / "tensors"))
    return {name: tensor.numpy() for name, tensor in read_whole(folder / "tensors", names).items()}


def test_the_mean_of_two_runs_newest_checkpoints_is_exact_and_has_weights_alone(tmp_path, runs):
    (x, x_folder), (y, y_folder), _ = runs
    folder = average([tmp_path / "x", tmp_path / "y"], tmp_path / "mean")
    assert folder == tmp_path / "mean" / "checkpoints" / "step=11"
    mean = averaged(folder)
    assert set(mean) == {"weights.a", "weights.b.bias"}
    for name, array in mean.items():
        expected = (x[name].astype(np.float64) + y[name]) / 2
        assert array.dtype == np.float32
        assert np.array_equal(array, expected.astype(np.float32))
    state = json.loads((folder / "state.json").read_text())
    assert state["averaged"] == [
        {"checkpoint": str(x_folder), "step": 10, "weight": 0.5},
        {"checkpoint": str(y_folder), "step": 11, "weight": 0.5},
    ]
    assert state["step"] == 11 and state["optimizer_steps"] is None and state["of"] == "weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean", "x", "y", "z"]


def test_weights_count_and_a_checkpoints_own_folder_may_be_named(tmp_path, runs):
    """Summed in fp64: a sum in fp32 was seen to differ."""
    (x, _), (y, _), _ = runs
    old = tmp_path / "x" / "checkpoints" / "step=5"
    first = average([old], tmp_path / "one", weights=[3])
    assert all(np.array_equal(array, averaged(old)[name]) for name, array in averaged(first).items())
    mean = averaged(average([old, tmp_path / "x", tmp_path / "y"], tmp_path / "three", weights=[1, 2, 1]))
    for name, array in mean.items():
        parts = [part.astype(np.float64) for part in (averaged(old)[name], x[name], y[name])]
        assert np.array_equal(array, np.average(parts, axis=0, weights=[1, 2, 1]).astype(np.float32))


def test_the_ema_is_averaged_where_all_have_one_and_what_is_asked_for_counts(tmp_path):
    kinds, made = ("weights", "ema"), []
    for number, name in enumerate("xy"):
        write_recipe(recipe(tmp_path / name))
        made.append(finish(tmp_path / name, step=3, seed=number, kinds=kinds)[0])
    sources = [tmp_path / "x", tmp_path / "y"]
    for kind, output in ((None, "default"), ("ema", "ema"), ("weights", "weights")):
        mean = averaged(average(sources, tmp_path / output, kind=kind))
        expected = [one[f"{kind or 'ema'}.a"].astype(np.float64) for one in made]
        assert np.array_equal(mean["weights.a"], np.mean(expected, axis=0).astype(np.float32))
    write_recipe(recipe(tmp_path / "z"))
    finish(tmp_path / "z", step=3, seed=7)
    for kind in (None, "ema"):
        with pytest.raises(ValueError, match=r"z/checkpoints/step=3 holds no EMA .* --of weights"):
            average([*sources, tmp_path / "z"], tmp_path / "mixed", kind=kind)
    average([*sources, tmp_path / "z"], tmp_path / "mixed", kind="weights")


def test_memory_holds_a_few_tensors_and_never_a_model(tmp_path):
    """Three models of 64 tensors of 2 MiB: what comes on top stays below the 128 MiB of one.

    Seen to fail where all tensors go to one file: torch keeps them until it is written.
    """
    shapes = {f"layer{number}": (512, 1024) for number in range(64)}
    for name in "xyz":
        write_recipe(recipe(tmp_path / name))
        finish(tmp_path / name, step=1, seed=0, kinds=("weights",), shapes=shapes)
    (growth,) = run_on_ranks(_growth_of_an_average, tmp_path, world_size=1)
    assert growth < 96 * 2**20


def _growth_of_an_average(tmp_path):
    """Bytes by which the peak of this process rose. Small ones go first, for what is set up once."""
    for name in "vw":
        write_recipe(recipe(tmp_path / name))
        finish(tmp_path / name, step=1, seed=0)
    average([tmp_path / "v", tmp_path / "w"], tmp_path / "small")
    ctypes.CDLL(None).malloc_trim(0)  # what the parent has freed would hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    before = _kib("VmRSS")
    average([tmp_path / name for name in "xyz"], tmp_path / "mean")
    return 1024 * (_kib("VmHWM") - before)


def _kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        (["x", "y"], {"weights": [1, 2, 3]}, "3 weights for 2 checkpoints: give each checkpoint one"),
        (["x", "y"], {"weights": [1, 0]}, "weights are 1, 0: use numbers above 0"),
        (["x", "y"], {"weights": [1, float("nan")]}, "weights are 1, nan: use numbers above 0"),
        (["x", "x/checkpoints/step=10"], {}, "step=10 is named twice"),
        (["x", "nowhere"], {}, r"nowhere is no run folder and no checkpoint: .*recipe\.yaml is not there"),
        (["x", "x/checkpoints/step=99"], {}, r"step=99/state\.json can not be read"),
        (["x", "fresh"], {}, "fresh holds no finished checkpoint yet"),
        (
            ["x", "wide"],
            {},
            r"wide/checkpoints/step=3 holds another model than .*ffn_width 128 instead of 64",
        ),
        (
            ["x", "other"],
            {},
            r"other.* holds another .*: a \(6, 5\) float32 instead of \(6, 4\) float32.*1 ten",
        ),
        (["x", "fewer"], {}, r"fewer.*: b\.bias nothing instead of \(5,\) float32"),
        (["x", "double"], {}, r"double.*: a \(6, 4\) float64 instead of \(6, 4\) float32.*2 tensors"),
        (["x", "cut"], {}, r"cut/checkpoints/step=3/tensors is incomplete: .*distcp is missing"),
        (["x", "y"], {"output": "z"}, "output .*z already holds a checkpoint: name a new folder"),
        (["x", "y"], {"output": "y/mean"}, "lies inside .*y, which it averages"),
        (["x", "y"], {"output": "full"}, "output .*full already holds files"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(
    tmp_path, runs, sources, options, said
):
    for name, changes in {
        "wide": {"size": replace(tiny.SIZE, ffn_width=128)},
        **{name: {} for name in ("fresh", "other", "fewer", "double", "cut")},
    }.items():
        write_recipe(recipe(tmp_path / name, **changes))
    finish(tmp_path / "wide", step=3, seed=0)
    finish(tmp_path / "other", step=3, seed=0, shapes={**SHAPES, "a": (6, 5)})
    finish(tmp_path / "fewer", step=3, seed=0, shapes={"a": SHAPES["a"]})
    finish(tmp_path / "double", step=3, seed=0, dtype=torch.float64)
    next((finish(tmp_path / "cut", step=3, seed=0)[1] / "tensors").glob("*.distcp")).unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / options.pop("output", "mean")
    with pytest.raises(ValueError, match=said):
        average([tmp_path / source for source in sources], output, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_average_that_fails_leaves_nothing_and_the_next_one_takes_its_place(tmp_path, runs, monkeypatch):
    from nemo_moviegen.training import storage

    def full(*_, **__):
        raise RuntimeError("disk full")

    sources = [tmp_path / "x", tmp_path / "y"]
    (tmp_path / "mean.partial" / "checkpoints").mkdir(parents=True)  # of one that was killed
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", full)
        with pytest.raises(RuntimeError, match="disk full"):
            average(sources, tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))
    average(sources, tmp_path / "mean")
    assert [path.name for path in tmp_path.glob("mean*")] == ["mean"]


def test_the_command_averages_and_a_mistake_is_one_line(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (x, _), (y, _), _ = runs
    assert cli.main(["average", "x", "y", "--output", "mean", "--weights", "1,3", "--of", "weights"]) == 0
    assert capsys.readouterr().out == "mean/checkpoints/step=11\n"
    expected = (x["weights.a"].astype(np.float64) + 3 * y["weights.a"].astype(np.float64)) / 4
    folder = tmp_path / "mean" / "checkpoints" / "step=11"
    assert np.array_equal(averaged(folder)["weights.a"], expected.astype(np.float32))
    assert cli.main(["average", "x", "y", "--output", "mean"]) == 2
    assert capsys.readouterr().err == (
        "moviegen: output mean already holds a checkpoint: name a new folder\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["average", "x", "--output", "other", "--weights", "1;2"])
    assert "'1;2' are no weights: write numbers with commas between" in capsys.readouterr().err


def test_a_model_of_averaged_weights_samples_starts_runs_and_does_not_resume(tmp_path):
    (differences,) = run_on_ranks(_average_two_models, tmp_path, world_size=1)
    assert differences["from x"] > 1e-3 and differences["from mean"] == 0
    run = recipe(tmp_path / "next", init_from=str(tmp_path / "mean"), precision="fp64")
    assert starting_checkpoints(run) == (None, tmp_path / "mean" / "checkpoints" / "step=8")
    resumed = recipe(tmp_path / "mean", precision="fp64")
    own, _ = starting_checkpoints(resumed)
    with pytest.raises(ValueError, match="holds weights alone: start a new run from it with init_from"):
        Checkpoints(resumed, own).read(own)
    (loaded,) = run_on_ranks(dist_checkpointing.load_plain_tensors, str(own / "tensors"), world_size=1)
    assert set(loaded) == set(tensor_shapes(own / "tensors"))  # megatron's own reader reads it as well


def _average_two_models(tmp_path):
    """Largest difference of the averaged run's velocity from the first model's and from the mean model's."""
    from nemo_moviegen.recipe import Layout
    from nemo_moviegen.video.model import VideoTransformer, video_config

    join_process_groups(Layout())
    parameters = []
    for number, name in enumerate("xy"):
        model = VideoTransformer(video_config(tiny.SIZE, Layout(), "fp64"), seed=number)
        tiny.open_gates(model, seed=number)
        parameters.append({n: p.detach().clone() for n, p in model.named_parameters()})
        write_recipe(recipe(tmp_path / name, precision="fp64"))
        folder = tmp_path / name / "checkpoints" / f"step={7 + number}"
        write_folder(
            folder / "tensors",
            {
                f"weights.{n}": [Piece((0,) * p.dim(), tuple(p.shape), p)]
                for n, p in parameters[number].items()
            },
            torch.distributed.group.WORLD,
        )
        write_json(folder / "state.json", {"step": 7 + number, "optimizer_steps": 7})
    average([tmp_path / "x", tmp_path / "y"], tmp_path / "mean")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.5 * parameters[0][name] + 0.5 * parameters[1][name])
    mean, first, loaded = (
        _velocity(one)
        for one in (model.eval(), load_video_model(tmp_path / "x")[0], load_video_model(tmp_path / "mean")[0])
    )
    return {
        "from x": (loaded - first).abs().max().item(),
        "from mean": (loaded - mean).abs().max().item(),
    }


@torch.no_grad()
def _velocity(model):
    batch = tiny.batch(2)
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)
    return model.velocity(batch.latent_BTCHW, times, batch.contexts, batch.masks)
