"""Model averaging: one run's weights out of several checkpoints (s3.3: models of different fine-tunings are
averaged into one).

Tensor by tensor: at any time there is one whole tensor of one source, its sum in fp64 and the result, so the
largest tensor sets the memory and neither the number of sources nor the size of the model does. The largest
of the 30B has 201 M elements, 0.8 GB in fp32.
"""

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_moviegen.recipe import RECIPE_FILE, VideoRecipe, read_recipe, recipe_yaml
from nemo_moviegen.training.checkpoint import (
    CHECKPOINTS,
    PARTIAL,
    STATE,
    TENSORS,
    last_checkpoint,
    read_state,
    size_differences,
)

EMA, WEIGHTS = "ema", "weights"
"""Kinds of tensors in a checkpoint that can be averaged; others belong to the optimiser."""


@dataclass(frozen=True)
class Source:
    """A finished checkpoint to average."""

    folder: Path
    run_folder: Path
    recipe: VideoRecipe
    step: int


def average(sources, output, *, weights=None, kind=None) -> Path:
    """Write the mean of `sources` as a new run folder `output`; returns its one checkpoint.

    `sources` are run folders, whose newest checkpoint counts, or folders checkpoints/step=N. `weights`, one
    above 0 for each, are scaled to a sum of one; None counts all alike. `kind` is "ema" or "weights" (those
    being trained); None takes the EMA where all sources kept one. The result has weights alone, in the
    sources' own precision and under the largest of their steps: it can be sampled from and be another run's
    init_from, and can not be resumed. The output appears whole or not at all. ValueError where the sources
    do not fit together or the output is taken, before anything is written.
    """
    from nemo_moviegen.training.cpu import stand_in_for_cuda

    stand_in_for_cuda()  # before the first import of megatron, which storage needs
    found = [find_source(folder) for folder in sources]
    shares = _shares(weights, found)
    _check_sizes(found)
    kind = _kind(found, kind)
    output = Path(output)
    _check_output(output, found)
    return _write(found, shares, kind, output, _check_tensors(found, kind))


def find_source(folder) -> Source:
    """What a run folder or a folder checkpoints/step=N stands for; ValueError where it is not whole."""
    from nemo_moviegen.training.storage import check_files

    folder = Path(folder)
    run_folder, checkpoint = folder, None
    if folder.name.startswith("step=") and folder.resolve().parent.name == CHECKPOINTS:
        run_folder, checkpoint = folder.resolve().parents[1], folder
    recipe_file = run_folder / RECIPE_FILE
    if not recipe_file.is_file():
        raise ValueError(
            f"{folder} is no run folder and no checkpoint: {recipe_file} is not there; name the folder of a "
            "run, or its checkpoints/step=N"
        )
    recipe = read_recipe(recipe_file)
    if not isinstance(recipe, VideoRecipe):
        raise ValueError(f"{folder} holds a run of {recipe.name}, which is no video transformer")
    checkpoint = checkpoint or last_checkpoint(run_folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no finished checkpoint yet: train it first, or leave it out")
    step = read_state(checkpoint)["step"]
    check_files(checkpoint / TENSORS)
    return Source(checkpoint, run_folder, recipe, step)


def _shares(weights, sources):
    """Weights of the sources, scaled to a sum of one."""
    weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(sources):
        raise ValueError(f"{len(weights)} weights for {len(sources)} checkpoints: give each checkpoint one")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        said = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"weights are {said}: use numbers above 0, and leave out what should not count")
    seen = set()
    for source in sources:
        if source.folder.resolve() in seen:
            raise ValueError(f"{source.folder} is named twice: name it once and give it a larger weight")
        seen.add(source.folder.resolve())
    return [weight / sum(weights) for weight in weights]


def _check_sizes(sources):
    first, *others = sources
    for other in others:
        different = size_differences(other.recipe, first.recipe)
        if different:
            raise ValueError(
                f"{other.folder} holds another model than {first.folder}: {'; '.join(different)}; average "
                "checkpoints of one size"
            )


def _kind(sources, kind):
    from nemo_moviegen.training.storage import tensor_shapes

    has_ema = [
        any(name.startswith(f"{EMA}.") for name in tensor_shapes(source.folder / TENSORS))
        for source in sources
    ]
    if kind == WEIGHTS or (kind is None and not any(has_ema)):
        return WEIGHTS
    if all(has_ema):
        return EMA
    without = sources[has_ema.index(False)].folder
    raise ValueError(
        f"{without} holds no EMA of its weights{'' if kind else ', others do'}: average the trained weights "
        "of all with --of weights, or leave it out"
    )


def _check_output(output, sources):
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "a checkpoint" if output.is_dir() and last_checkpoint(output) else "files"
        raise ValueError(f"output {output} already holds {what}: name a new folder")
    for source in sources:
        if output.resolve().is_relative_to(source.run_folder.resolve()):
            raise ValueError(
                f"output {output} lies inside {source.run_folder}, which it averages: name another"
            )


def _check_tensors(sources, kind):
    """{parameter: tensor on the meta device} that all sources hold alike."""
    from nemo_moviegen.training.storage import meta_tensors

    first = None
    for source in sources:
        stored = meta_tensors(source.folder / TENSORS)
        own = {n.partition(".")[2]: t for n, t in stored.items() if n.startswith(f"{kind}.")}
        first = own if first is None else first
        wrong = [
            f"{name} {_facts(own.get(name))} instead of {_facts(first.get(name))}"
            for name in sorted(own.keys() | first.keys())
            if _facts(own.get(name)) != _facts(first.get(name))
        ]
        if wrong:
            raise ValueError(
                f"{source.folder} holds another model than {sources[0].folder}: {'; '.join(wrong[:5])} "
                f"({len(wrong)} tensors differ)"
            )
    return first


def _facts(tensor):
    return (
        "nothing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    )


def _write(sources, shares, kind, output, parameters):
    from nemo_moviegen.training.storage import check_space

    folder = Path(CHECKPOINTS, f"step={max(source.step for source in sources)}")
    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of an average that was killed
    (partial / folder).mkdir(parents=True)
    try:
        check_space(partial, sum(tensor.nbytes for tensor in parameters.values()))
        _write_checkpoint(partial / folder, sources, shares, kind, parameters)
        recipe = replace(sources[0].recipe, output=str(output))
        (partial / RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output / folder


def _write_checkpoint(folder, sources, shares, kind, parameters):
    from nemo_moviegen.training.storage import Piece, write_folder, write_json

    folders = [source.folder / TENSORS for source in sources]
    pieces = {
        f"{WEIGHTS}.{name}": [Piece((0,) * tensor.dim(), tuple(tensor.shape), tensor)]
        for name, tensor in parameters.items()
    }

    def make(name):
        return _mean(folders, shares, kind + name.removeprefix(WEIGHTS))

    write_folder(folder / TENSORS, pieces, make=make)
    averaged = [
        {"checkpoint": str(source.folder), "step": source.step, "weight": share}
        for source, share in zip(sources, shares, strict=True)
    ]
    told = {
        "step": max(source.step for source in sources),
        "recipe": sources[0].recipe.name,
        "optimizer_steps": None,
        "validation_loss": None,
    }
    write_json(folder / STATE, {**told, "of": kind, "averaged": averaged})


def _mean(folders, shares, name):
    """Weighted mean of one tensor over folders, summed in fp64."""
    from nemo_moviegen.training.storage import read_whole

    total = None
    for folder, share in zip(folders, shares, strict=True):
        tensor = read_whole(folder, [name])[name]
        if total is None:
            total = tensor.double().mul_(share)
        else:
            total.add_(tensor, alpha=share)
    return total.to(tensor.dtype)
