"""`moviegen bench RECIPE`: where a step goes, what it could take, and no MFU that cannot be taken."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from megatron.core import parallel_state
from ranks import run_on_ranks

import recipes
from nemo_moviegen.bench import components, roofline
from nemo_moviegen.bench.recipe import Watched, as_benched, bench_recipe, found_of, told
from nemo_moviegen.cluster import Cluster, read_cluster
from nemo_moviegen.flops import forward_flops
from nemo_moviegen.layout import Layout
from nemo_moviegen.planning.hardware import H100
from nemo_moviegen.planning.plan import make_plan
from nemo_moviegen.planning.share import share_of
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.training.cpu import stand_in_for_cuda

SHAPE = (2, 8, 8)
TEXT = {"ul2": 24, "metaclip": 24, "byt5": 0}
HERE = Cluster(name="here", accelerator="cpu", nodes=1, ranks_per_node=1, memory_gib=4)
H100_CEILING = roofline.Ceiling(name="NVIDIA H100", tflops=989, gbyte_s=3350, is_published=True)


def recipe(**changes):
    """Of clips alone, one rank."""
    base = recipes.get("tiny.t2iv")
    return replace(base, data=replace(base.data, image_every=0), init_from="", global_batch=16, **changes)


def found_with(monkeypatch, ceiling, seconds, cluster=HERE, **changes):
    import nemo_moviegen.bench.recipe as bench

    monkeypatch.setattr(bench, "ceiling_here", lambda precision: ceiling)
    watched = Watched(step_seconds=[seconds] * 3, components=dict.fromkeys(components.COMPONENTS, 1.0))
    made, metrics = recipe(**changes), [{"speed/data_wait": 0.0, "memory/peak_gib": 1.0}]
    return found_of(made, make_plan(made, cluster, text=TEXT), watched, metrics)


def profiled_components(size):
    """Names of profiled operations by the component they were given, of a forward and a backward pass."""
    from nemo_moviegen.video.model import VideoTransformer, video_config

    stand_in_for_cuda()
    parallel_state.initialize_model_parallel()
    model = VideoTransformer(video_config(size, Layout(), "fp32"))
    tiny.open_gates(model)
    parameters = list(model.parameters())

    class Optimizer:
        def step(self):
            for parameter in parameters:
                parameter.grad.mul_(2)
            torch.distributed.all_reduce(parameters[0].grad)

    batch, optimizer, found = tiny.batch(dtype=torch.float32), Optimizer(), {}
    component = components._component

    def remember(event, labels):
        name = component(event, labels)
        found.setdefault(name, set()).add(event.name)
        return name

    on = [torch.profiler.ProfilerActivity.CPU]
    with components.watch_scopes(model, optimizer), torch.profiler.profile(activities=on) as profile:
        model(batch.latent_BTCHW, torch.rand(4).double(), batch.contexts, batch.masks).sum().backward()
        optimizer.step()
    components._component = remember
    return found, components.seconds_by_component(profile.events())


def test_operations_find_their_component_forward_and_backward():
    ((found, seconds),) = run_on_ranks(profiled_components, tiny.SIZE, world_size=1)
    assert set(seconds) == set(components.COMPONENTS)
    assert all(seconds[name] > 0 for name in components.COMPONENTS)
    assert any("attention" in name for name in found["attention"])
    assert {"_Linear", "_LinearBackward"} <= found["linear"]
    assert {"_NormModulate", "_NormModulateBackward", "_SwiGlu", "_GatedSumBackward"} <= found["modulation"]
    assert {"MmBackward0", "aten::native_layer_norm", "NativeLayerNormBackward0"} <= found["embeddings"]
    assert {"torch::autograd::AccumulateGrad", "aten::mul_"} <= found["optimiser"]
    assert any(name.startswith("c10d::") for name in found["communication"])
    assert not any("Norm" in name or "Linear" in name for name in found["other"])


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, context=2)])
def test_flops_of_the_roofline_are_those_of_the_model(layout):
    made = recipe(layout=layout)
    share = share_of(made, layout.model_ranks, "cpu", latent_shape=SHAPE, text=TEXT)
    work = roofline.work_of(share, SHAPE, num_microbatches=2)
    counts = forward_flops(VIDEO_TINY, SHAPE, TEXT)
    samples = 2 * made.micro_batch
    whole = ("time_embedding", "context_projections", "modulation")  # every rank of a copy computes them
    scores = sum(counts[name] for name in ("self_attention_scores", "cross_attention_scores"))
    text = counts["cross_attention_keys_values"]  # whole on every context rank
    cut = sum(counts[name] for name in ("self_attention_projections", "cross_attention_queries", "ffn"))
    linear = 3 * samples * (cut / layout.model_ranks + text / layout.tensor)
    assert work["linear"].flops == pytest.approx(linear)
    assert work["attention"].flops == pytest.approx(3.5 * samples * scores / layout.model_ranks)
    ends = (counts["patch_embedding"] + counts["head"]) / layout.model_ranks
    assert work["embeddings"].flops == pytest.approx(3 * samples * (ends + sum(counts[n] for n in whole)))


def test_recomputation_is_work_of_the_hardware():
    def linear_and_attention(recompute):
        made = recipe(layout=Layout(recompute=recompute))
        work = roofline.work_of(share_of(made, 1, "cpu", latent_shape=SHAPE, text=TEXT), SHAPE, 1)
        return work["linear"].flops, work["attention"].flops

    none, selective, full = (linear_and_attention(name) for name in ("none", "selective", "full"))
    ffn = forward_flops(VIDEO_TINY, SHAPE, TEXT)["ffn"] * recipe().micro_batch
    assert selective == (pytest.approx(none[0] + ffn), none[1])
    assert full == (pytest.approx(4 / 3 * none[0]), pytest.approx(4.5 / 3.5 * none[1]))


def test_a_bound_is_the_larger_of_flops_and_bytes():
    ceiling = roofline.Ceiling(name="x", tflops=1, gbyte_s=1, is_published=True)
    assert roofline.Work(flops=3e12, bytes_=1e9).bound(ceiling) == 3
    assert roofline.Work(flops=1e12, bytes_=2e9).bound(ceiling) == 2
    assert roofline.Work(flops=1e12, bytes_=2e9).bound_by(ceiling) == "bytes"
    for tflops in (0.0737, 0.129, 0.185, 0.3):  # also where a division rounds
        assert roofline.Work(flops=3e9, bytes_=1.0).bound_by(replace(ceiling, tflops=tflops)) == "FLOPs"


def test_no_mfu_without_a_published_peak(monkeypatch):
    ceiling = replace(H100_CEILING, name="Some CPU", is_published=False)
    found = found_with(monkeypatch, ceiling, seconds=1.0)
    assert found["mfu"] is None and found["hfu"] is None
    assert any("no MFU: the dense peak of Some CPU is not in" in str(line) for line in told(found))


def test_mfu_and_hfu_are_of_the_models_flops(monkeypatch):
    found = found_with(monkeypatch, H100_CEILING, seconds=1e-3, layout=Layout(recompute="full"))
    flops = 3 * 16 * sum(forward_flops(VIDEO_TINY, SHAPE, TEXT).values())
    assert found["mfu"] == pytest.approx(flops / 1e-3 / 989e12)
    assert found["mfu"] < found["hfu"] < 4 / 3 * found["mfu"] and not found["counting_error"]


def test_a_result_above_the_kernels_ceiling_is_called_a_mistake(monkeypatch):
    found = found_with(monkeypatch, H100_CEILING, seconds=1e-6)
    assert "counting error" in found["counting_error"]
    assert found["counting_error"] in list(told(found))


def test_linears_in_fp8_are_held_against_its_peak(monkeypatch):
    in_fp8 = replace(H100_CEILING, fp8_tflops=1978)
    assert in_fp8.of("linear").tflops == 1978 and in_fp8.of("attention") == in_fp8 and in_fp8.fastest == 2
    assert H100_CEILING.of("linear") == H100_CEILING and H100_CEILING.fastest == 1
    bf16, fp8 = (found_with(monkeypatch, ceiling, seconds=1.0) for ceiling in (H100_CEILING, in_fp8))
    rows = [found["components"]["linear"] for found in (bf16, fp8)]
    assert rows[1]["bound_seconds"] == max(rows[0]["flops"] / 1978e12, rows[0]["bytes"] / 3350e9)
    share = bf16["hfu"] / 0.9  # of a step so short that HFU is 90%
    assert found_with(monkeypatch, H100_CEILING, seconds=share)["counting_error"]
    assert not found_with(monkeypatch, in_fp8, seconds=share)["counting_error"]


def test_known_gpus_have_the_peaks_of_their_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3", raising=False)
    ceiling = roofline.ceiling_here("bf16")
    assert (ceiling.tflops, ceiling.gbyte_s, ceiling.is_published) == (H100.bf16_peak, H100.memory_peak, True)
    assert ceiling.fp8_tflops == 0 and roofline.ceiling_here("fp8_block").fp8_tflops == H100.fp8_peak


def test_a_benched_recipe_writes_nowhere_else(tmp_path):
    made = as_benched(recipes.get("video_30b.t2iv_768_cp2_4096"), read_cluster("h100_4096"), tmp_path, 9)
    assert made.output.startswith(str(tmp_path)) and made.data.folder.startswith(str(tmp_path))
    assert made.num_steps == 9 and made.save_every == 0 and not made.init_from
    assert made.layout == recipes.get("video_30b.t2iv_768_cp2_4096").layout


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [("tae.tiny", {}, "moviegen bench tae"), ("tiny.t2i", {"steps": 0}, "use 1 or more of each")],
)
def test_what_can_not_be_timed_is_refused(tmp_path, name, numbers, message):
    with pytest.raises(ValueError, match=message):
        bench_recipe(recipes.get(name), HERE, tmp_path, **numbers)


def benched(folder, recompute):
    """Alone, as where no launcher started it."""
    torch.distributed.destroy_process_group()
    lines, made = [], recipe(layout=Layout(recompute=recompute))
    numbers = {"steps": 3, "warm_up": 1, "profiled": 2}
    bench_recipe(made, HERE, folder / "work", **numbers, output=folder / "f", log=lines.append)
    return len(lines)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_recipe_is_timed_and_taken_apart(tmp_path, recompute):
    (told_lines,) = run_on_ranks(benched, tmp_path, recompute, world_size=1)
    found = json.loads((tmp_path / "f").read_text())
    assert told_lines >= 5 and found["mfu"] is None and len(found["environment"]["hash"]) == 12
    step, rows = found["step_seconds"], found["components"]
    assert step["steps"] == 3 and 0 < step["least"] <= step["median"] <= step["most"]
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(step["median"])
    assert rows["other"]["share"] < 0.15 and rows["linear"]["share"] > 0.2
    ceiling, linear = found["ceiling"], rows["linear"]
    by_flops = linear["flops"] / ceiling["tflops"] / 1e3 >= linear["bytes"] / ceiling["gbyte_s"]
    assert linear["bound_by"] == ("FLOPs" if by_flops else "bytes")
    assert rows["optimiser"]["bound_by"] == "bytes"
    assert not (tmp_path / "work" / "latents").exists()
