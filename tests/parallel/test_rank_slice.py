"""`moviegen bench --rank-slice`: alone, a process does what the first rank of a layout does among others."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.utils.flop_counter import FlopCounterMode

import recipes
from nemo_moviegen.bench.rank_slice import facts_of, first_of, slice_of, told
from nemo_moviegen.bench.recipe import bench_recipe
from nemo_moviegen.cluster import Cluster, read_cluster
from nemo_moviegen.layout import Layout
from nemo_moviegen.planning.plan import make_plan
from nemo_moviegen.training import tensor_bytes
from parallel.runs import recipe, train_on_ranks, write_latents

pytestmark = pytest.mark.usefixtures("nemo")

LAYOUTS = {
    "tensor x context": Layout(tensor=2, context=2),
    "selective": Layout(tensor=2, context=2, recompute="selective"),
    "optimiser shared out": Layout(tensor=2),
    "context, all shared out": Layout(context=2, sharding="full"),
    "all shared out": Layout(tensor=2, sharding="full"),
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliced") / "latents"
    write_latents(folder)
    return folder


def counted_flops(train):
    """Of the products and attention of a run, by name."""
    with FlopCounterMode(display=False) as counter:
        train()
    return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}


def last_line(run):
    return json.loads(Path(run.output, "metrics.jsonl").read_text().splitlines()[-1])


def among_others(run, monkeypatch):
    """(FLOPs, peak GiB) of the first of four ranks."""
    monkeypatch.setenv(tensor_bytes.TRACK, "1")
    counts = Path(run.output + "-flops.json")

    def before():
        from nemo_moviegen.training import stopping

        fit, rank = stopping.fit, int(os.environ["RANK"])

        def counting(*args):
            found = counted_flops(lambda: fit(*args))
            if rank == 0:
                counts.write_text(json.dumps(found))

        stopping.fit = counting

    train_on_ranks(run, 4, before=before)
    return json.loads(counts.read_text()), last_line(run)["memory/peak_gib"]


def alone(run):
    """The same of a process that is the first of four by itself."""
    dist.destroy_process_group()
    os.environ[tensor_bytes.TRACK] = "1"
    from nemo_moviegen.training.run import train

    with first_of(4) as also:
        flops = counted_flops(lambda: train(run, also=also))
    line = last_line(run)
    return flops, line["memory/peak_gib"], line["train/loss"], line["train/skipped"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_slice_computes_and_holds_what_the_first_rank_does(layout, tmp_path, latents, monkeypatch):
    run = recipe(tmp_path / "among", latents, layout=layout, num_steps=3, save_every=0, precision="fp32")
    flops, peak = among_others(run, monkeypatch)
    ((own_flops, own_peak, loss, skipped),) = run_on_ranks(
        alone, replace(run, output=str(tmp_path / "alone")), world_size=1
    )
    assert own_flops == flops and sum(flops.values()) > 0
    # gathers that gloo's threads have not ended yet keep their buffers, up to 7% of this tiny model seen
    assert own_peak == pytest.approx(peak, rel=0.15 if layout.context > 1 else 0.02)
    assert skipped == 0 and loss > 0  # finite: no step is left out by the guard


def test_the_optimiser_has_the_piece_of_one_rank_of_thousands():
    base = recipes.get("video_30b.t2iv_768_cp2_4096")
    cluster = read_cluster("h100_4096")
    part = slice_of(base, cluster, 12)
    assert part.size.num_layers == 12 and part.layout == base.layout
    share = make_plan(part, cluster).iterations[0].share
    assert share.state_pieces == 1024 and share.own_tokens == 73728 / 2 / 4


def benched(folder, made, cluster, lines):
    dist.destroy_process_group()
    numbers = {"steps": 2, "warm_up": 1, "profiled": 1, "slice_layers": 2}
    found = bench_recipe(made, cluster, folder, **numbers, output=folder / "json", log=lines.append)
    assert "WORLD_SIZE" not in os.environ and not dist.is_initialized()
    return found, lines


def test_a_slice_is_benched_and_says_what_it_leaves_out(tmp_path):
    base = recipes.get("tiny.t2iv")
    made = replace(base, layout=Layout(tensor=2, context=2), init_from="", global_batch=32, image_batch=0)
    cluster = Cluster(name="eight", accelerator="cpu", nodes=4, ranks_per_node=2, memory_gib=4)
    ((found, lines),) = run_on_ranks(benched, tmp_path, made, cluster, [], world_size=1)
    assert found["ranks"] == 8 and found["layers"] == 2 and found["slice"]["of_layers"] == 4
    assert found["components"]["communication"]["seconds"] > 0  # copies that stand for it
    assert found["slice"]["step_seconds_of_all"] > found["step_seconds"]["median"]
    said = " ".join(line for line in lines if isinstance(line, str))
    assert "Not measured: communication" in said and "all 4 layers" in said


def test_more_layers_lengthen_what_is_in_them():
    plan = make_plan(recipes.get("video_30b.t2iv_768_cp2_4096"), read_cluster("h100_4096"))
    components = {"attention": {"seconds": 2.0}, "other": {"seconds": 0.5}, "embeddings": {"seconds": 0.25}}
    ceiling = {"tflops": 989, "is_published": True}
    found = facts_of({"layers": 12, "components": components, "ceiling": ceiling}, plan, 48)
    assert found["step_seconds_of_all"] == 8.75
    flops = plan.iterations[0].model_flops
    assert found["mfu_of_all"] == pytest.approx(flops / 8.75 / plan.num_ranks / 989e12)
    assert len(list(told(found, 12))) == 2 and len(list(told(found, 48))) == 1


@pytest.mark.parametrize(
    ("layout", "layers", "message"),
    [
        (Layout(tensor=2, context=8), 0, "8 ranks do not split into tensor 2 x context 8"),
        (Layout(context=3), 0, "do not split over context 3"),
        (Layout(tensor=4), 0, "6 heads do not split over tensor 4"),
        (Layout(), 9, "--layers 9: tiny.t2iv has 4 layers, use 1 to 4"),
    ],
)
def test_what_does_not_divide_is_refused(layout, layers, message):
    cluster = Cluster(name="eight", accelerator="cpu", nodes=4, ranks_per_node=2, memory_gib=4)
    with pytest.raises(ValueError, match=message):
        slice_of(replace(recipes.get("tiny.t2iv"), layout=layout), cluster, layers)


def test_memory_that_a_slice_does_not_have_is_refused_and_a_smaller_one_is_not():
    small = replace(read_cluster("h100_4096"), memory_gib=40)
    base = recipes.get("video_30b.t2iv_768_cp2_4096")
    with pytest.raises(ValueError, match="GiB"):
        slice_of(base, small)
    assert slice_of(base, small, 8).size.num_layers == 8


def _echoed(outputs, own):
    with first_of(4):
        dist.all_gather_into_tensor(outputs, own)
        pieces = torch.empty(2)
        dist.reduce_scatter_tensor(pieces, torch.arange(8.0))
        summed = torch.ones(3)
        work = dist.all_reduce(summed, async_op=True)
        work.wait()
        objects = [None] * 4
        dist.all_gather_object(objects, {"a": 1})
        received = torch.empty(2)
        dist.send(torch.tensor([1.0, 2.0]), 1)
        dist.recv(received, 3)
        swapped = torch.empty(4)
        dist.all_to_all_single(swapped, torch.arange(4.0))
    return outputs, pieces, summed, objects, received, swapped


def echoes():
    dist.destroy_process_group()
    return _echoed(torch.empty(8), torch.tensor([5.0, 6.0]))


def test_other_ranks_say_what_this_one_says():
    ((gathered, piece, summed, objects, received, swapped),) = run_on_ranks(echoes, world_size=1)
    assert gathered.tolist() == [5, 6] * 4 and piece.tolist() == [0, 1] and summed.tolist() == [1, 1, 1]
    assert objects == [{"a": 1}] * 4 and received.tolist() == [1, 2] and swapped.tolist() == [0, 1, 2, 3]


def test_a_slice_of_gpus_is_not_started_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base, cluster = recipes.get("video_30b.t2iv_768_cp2_4096"), read_cluster("h100_4096")
    with pytest.raises(ValueError, match="runs on h100 GPUs, and this machine has none"):
        bench_recipe(base, cluster, tmp_path, slice_layers=1)
    assert not list(tmp_path.iterdir())
