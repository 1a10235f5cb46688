"""`moviegen bench RECIPE`: the recipe's own training steps, timed and taken apart.

The run is `training.run.train`, with its loader, guard and metrics, on latents of noise of the recipe's
largest shape. First steps warm up, then come those that are timed, from the end of one to the end of the
next, and last some under torch's profiler, which slows them: of those only the shares are used.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nemo_moviegen.bench import rank_slice
from nemo_moviegen.bench.measure import empty_table, environment, write_json
from nemo_moviegen.bench.roofline import ceiling_here, work_of
from nemo_moviegen.cluster import placed
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.planning.plan import IMAGES, kinds_of, make_plan
from nemo_moviegen.precision import is_fp8
from nemo_moviegen.recipe import METRICS_FILE, TaeRecipe, recipe_yaml
from nemo_moviegen.utilisation import counting_error, utilisation

_TEXT_TOKENS = 128
"""Of a prompt in each encoder but ByT5, if it takes so many: a caption of 100 words."""
_LEAST_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one rank saw of its run."""

    step_seconds: list[float]
    """Of the timed steps."""
    components: dict[str, float]
    """Seconds of a profiled step by component."""


def bench_recipe(
    recipe, cluster, folder, *, steps=20, warm_up=5, profiled=3, slice_layers=None, output=None, log=print
):
    """Run it on the ranks this process is one of, in `folder`, which all of them see and which is emptied.

    With `slice_layers` this process alone is the first of the cluster's ranks, with so many layers (0: all).

    Rank 0 tells a table and lines, writes the JSON `output` and returns what `found_of` does; others None.

    ValueError for an autoencoder, and for numbers of steps that time nothing.
    """
    if isinstance(recipe, TaeRecipe):
        raise ValueError(f"{recipe.name} trains an autoencoder: use moviegen bench tae")
    if min(steps, warm_up, profiled) < 1:
        raise ValueError(f"steps {steps}, warm-up {warm_up}, profiled {profiled}: use 1 or more of each")
    whole, is_slice = recipe, slice_layers is not None
    if is_slice:
        recipe = rank_slice.slice_of(recipe, cluster, slice_layers)
        rank_slice.check_here(recipe, cluster)
    rank, folder, plan = int(os.environ.get("RANK", 0)), Path(folder), _plan(recipe, cluster)
    run = as_benched(recipe, cluster, folder, num_steps=warm_up + steps + profiled)
    # all ranks of a torchrun have its id; a folder of an earlier run has another's
    ready = folder / f"ready-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _write_latents(run, plan.iterations[0], _LEAST_SAMPLES if is_slice else 0)
        ready.touch()
    _wait_for(ready)
    watched = _run(run, warm_up, steps, cluster.num_ranks if is_slice else 0)
    if rank:
        return None
    shutil.rmtree(run.data.folder)  # may be gigabytes of noise
    lines = Path(run.output, METRICS_FILE).read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines][warm_up : warm_up + steps]
    found = found_of(recipe, plan, watched, metrics)
    if is_slice:
        found["slice"] = rank_slice.facts_of(found, _plan(whole, cluster), whole.size.num_layers)
    for part in told(found):
        log(part)
    if output:
        write_json(output, found)
    return found


def as_benched(recipe, cluster, folder, num_steps):
    """The recipe for so many steps of its largest clips (of images, if it has no others), writing and reading
    in `folder` alone, without checkpoints, validation and samples."""
    every = int(IMAGES in kinds_of(recipe) and len(kinds_of(recipe)) == 1)
    data = replace(recipe.data, folder=str(folder / "latents"), buckets="", image_every=every)
    return replace(
        placed(recipe, cluster),
        data=data,
        output=str(folder / "run"),
        init_from="",
        num_steps=num_steps,
        save_every=0,
        optim=replace(recipe.optim, decay="constant"),
        validation=replace(recipe.validation, every=0),
        progress=replace(recipe.progress, samples_every=0, wandb_project=""),
    )


def found_of(recipe, plan, watched, metrics) -> dict:
    """Everything as plain values, of the first kind of iteration of the recipe's `Plan`; `mfu` is None where
    the hardware's peak is not known."""
    iteration, ranks = plan.iterations[0], plan.num_ranks
    seconds = statistics.median(watched.step_seconds)
    emulates = is_fp8(recipe.precision) and recipe.fp8.emulated
    ceiling = ceiling_here("bf16" if emulates else recipe.precision)
    flops, peak = (iteration.model_flops, iteration.recomputed_flops), ceiling.tflops * ceiling.is_published
    used = utilisation(*flops, seconds, ranks, peak)
    mfu, hfu = used.get("speed/mfu"), used.get("speed/hfu")
    facts = environment("megatron-core", "nemo-toolkit", "transformer-engine")
    work = work_of(iteration.share, iteration.shape, plan.num_microbatches)
    return {
        "recipe": recipe.name,
        "cluster": plan.cluster,
        "environment": facts | {"hash": _hash(facts, recipe)},
        "layout": asdict(plan.layout) | {"data": plan.layout.data_parallel(ranks)},
        "precision": recipe.precision,
        "ranks": ranks,
        "layers": recipe.size.num_layers,
        "latent_shape": list(iteration.shape),
        "samples": iteration.samples,
        "tokens_of_a_sample": iteration.share.tokens,
        "text_tokens": iteration.share.text,
        "step_seconds": {
            "median": seconds,
            "least": min(watched.step_seconds),
            "most": max(watched.step_seconds),
            "steps": len(watched.step_seconds),
        },
        "tokens_per_second_per_rank": iteration.tokens / seconds / ranks,
        "model_tflops_per_rank": used["speed/tflops_per_gpu"],
        "mfu": mfu,
        "hfu": hfu,
        "why_no_mfu": "" if mfu else f"the dense peak of {ceiling.name} is not in planning/hardware.py",
        "counting_error": counting_error(hfu, ceiling.fastest) if hfu else "",
        "data_wait": statistics.median(line["speed/data_wait"] for line in metrics),
        "memory": {name: metrics[-1][name] for name in metrics[-1] if name.startswith("memory/")},
        "planned_peak_gib": plan.memory.peak_bytes / 2**30,
        "ceiling": asdict(ceiling),
        "components": _components(watched.components, work, ceiling, seconds),
        "predicted_step_seconds": iteration.step and iteration.step.seconds,
    }


def told(found):
    """What a terminal shows of `found_of`: lines and a table."""
    step, layout = found["step_seconds"], found["layout"]
    yield (
        f"{found['recipe']} on {found['cluster']}: {found['ranks']} ranks, TP{layout['tensor']} "
        f"CP{layout['context']} DP{layout['data']}, {found['precision']}, {found['layers']} layers; "
        f"{found['samples']} x "
        f"{found['tokens_of_a_sample']:,} tokens a step\n{found['ceiling']['name']}, environment "
        f"{found['environment']['hash']}"
    )
    headings = ("ms", "share", "least ms", "bound by", "of its bound")
    table = empty_table("where a step goes, first rank", "component", *headings)
    for name, row in found["components"].items():
        bound, least = row["bound_seconds"], ["-"] * 3
        if bound is not None:
            least = [f"{bound * 1e3:,.1f}", row["bound_by"], f"{row['of_bound']:.0%}"]
        table.add_row(
            name,
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['share']:.1%}",
            *least,
        )
    yield table
    ceiling = found["ceiling"]
    source = "data sheet" if ceiling["is_published"] else "measured here"
    yield f"ceilings ({source}): {ceiling['tflops']:.3g} TFLOP/s, {ceiling['gbyte_s']:,.0f} GB/s"
    yield (
        f"step {step['median']:.3f} s (median of {step['steps']}, {step['least']:.3f} to "
        f"{step['most']:.3f}), {found['tokens_per_second_per_rank']:,.0f} tokens/s a rank, "
        f"{found['model_tflops_per_rank']:.3g} TFLOP/s of the model's, data awaited {found['data_wait']:.1%}"
    )
    if found["mfu"] is None:
        yield f"no MFU: {found['why_no_mfu']}"
    else:
        yield f"MFU {found['mfu']:.1%}, HFU {found['hfu']:.1%}"
    if "slice" in found:
        yield from rank_slice.told(found["slice"], found["layers"])
    if found["counting_error"]:
        yield found["counting_error"]
    if found["predicted_step_seconds"]:
        yield f"predicted: {found['predicted_step_seconds']:.3f} s"
    memory = ", ".join(f"{name.removeprefix('memory/')} {gib:.2f}" for name, gib in found["memory"].items())
    yield f"memory: {memory}; planned {found['planned_peak_gib']:.2f} GiB of tensors"


def _components(profiled, work, ceiling, step_seconds):
    """Rows by component. What the profiler saw is scaled to the steps that it did not slow."""
    total = sum(profiled.values())
    rows = {}
    for name, seconds in profiled.items():
        row = {"seconds": seconds / total * step_seconds, "share": seconds / total}
        own = ceiling.of(name)
        bound = work[name].bound(own) if name in work else None
        row |= {"bound_seconds": bound, "bound_by": None, "of_bound": None}
        if bound:
            row |= {"bound_by": work[name].bound_by(own), "of_bound": bound / row["seconds"]}
            row |= {"flops": work[name].flops, "bytes": work[name].bytes_}
        rows[name] = row
    return rows


def _run(recipe, warm_up, steps, slice_of_ranks=0) -> Watched:
    """`slice_of_ranks`: this process is the first of so many, which are not there."""
    import lightning.pytorch as pl
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nemo_moviegen.bench.components import seconds_by_component, watch_scopes
    from nemo_moviegen.training.run import train

    ends, stack = [], contextlib.ExitStack()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            ends.append(time.perf_counter())
            if len(ends) != warm_up + steps:
                return
            model = module.module
            while hasattr(model, "module"):  # megatron's wrappers
                model = model.module
            stack.enter_context(watch_scopes(model, trainer.optimizers[0].mcore_optimizer))
            on = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profile = stack.enter_context(profile(activities=on))

        def on_train_end(self, trainer, module):
            stack.close()

    watch = Watch()
    with rank_slice.first_of(slice_of_ranks) if slice_of_ranks else contextlib.nullcontext([]) as also, stack:
        train(recipe, also=[*also, watch])
    profiled, components = len(ends) - warm_up - steps, seconds_by_component(watch.profile.events())
    timed = itertools.pairwise(ends[warm_up - 1 : warm_up + steps])
    return Watched(
        step_seconds=[end - start for start, end in timed],
        components={name: seconds / profiled for name, seconds in components.items()},
    )


def _plan(recipe, cluster):
    """With the prompts that `_write_latents` writes."""
    return make_plan(recipe, cluster, text=_text(recipe.size))


def _write_latents(recipe, iteration, num_samples=0):
    """Latents of noise of a planned `Iteration`: those of a batch, or so many that come again and again."""
    write_random_latents(
        recipe.data.folder,
        recipe.size,
        num_samples or max(iteration.samples, _LEAST_SAMPLES),
        np.random.default_rng(0),
        shapes=(iteration.shape,),
        images=False,
        num_tokens=_text(recipe.size),
    )


def _wait_for(path, seconds=600):
    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path} did not appear in {seconds} s: rank 0 writes it, so do all nodes see it?"
            )
        time.sleep(0.1)


def _text(size):
    return {c.name: 0 if c.name == "byt5" else min(_TEXT_TOKENS, c.max_tokens) for c in size.contexts}


def _hash(facts, recipe):
    """Of what a figure depends on: machine, versions, recipe."""
    kept = {name: value for name, value in facts.items() if name not in ("time", "load")}
    return hashlib.sha256(json.dumps([kept, recipe_yaml(recipe)]).encode()).hexdigest()[:12]
