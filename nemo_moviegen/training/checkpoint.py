"""Run folders: recipe.yaml, metrics, and checkpoints/step=N that any layout reads.

    step=N/state.json    how far the run was: steps, losses, what the guard has seen
    step=N/tensors/      weights, moments, EMA in full precision (storage.py)

A checkpoint is written under another name and renamed when it is whole, so a run killed at any instant, also
inside a write, finds the one before. Randomness and the data order are functions of (seed, sample, step) and
need no saving.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nemo_moviegen.precision import is_mixed
from nemo_moviegen.recipe import RECIPE_FILE, Layout, VideoRecipe, read_recipe
from nemo_moviegen.training.record import quiet
from nemo_moviegen.training.stages import check_transition

CHECKPOINTS = "checkpoints"
STATE, TENSORS = "state.json", "tensors"
PARTIAL, REMOVING = ".partial", ".removing"
SAME = ("seed", "global_batch")
"""Settings a run keeps for good: with another one it would not be the run its checkpoint belongs to."""


def checkpoints(run_folder) -> dict:
    """{step: folder} of the finished checkpoints of a run, oldest first."""
    found = {}
    for folder in Path(run_folder, CHECKPOINTS).glob("step=*"):
        number = folder.name.partition("=")[2]
        if number.isdigit() and (folder / STATE).is_file():
            found[int(number)] = folder
    return dict(sorted(found.items()))


def last_checkpoint(run_folder):
    """Folder of the newest finished checkpoint of a run, or None."""
    return next(reversed(checkpoints(run_folder).values()), None)


def read_state(folder) -> dict:
    """What state.json of a checkpoint says; ValueError where it is damaged."""
    path = Path(folder, STATE)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        assert state["step"] >= 0
        return state
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} can not be read ({type(error).__name__}: {error})") from None


def superfluous(losses, *, keep_last, keep_every, keep_best) -> list:
    """Steps whose checkpoints go. `losses`: {step: validation loss or None} of those that exist.

    The newest `keep_last` stay, multiples of `keep_every` (0: none) and the `keep_best` of lowest loss.
    """
    steps = sorted(losses)
    kept = set(steps[-keep_last:])
    kept |= {step for step in steps if keep_every and step % keep_every == 0}
    measured = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    kept |= {step for _, step in measured[:keep_best]}
    return [step for step in steps if step not in kept]


def tidy(run_folder):
    """Remove what a killed run left half written or half removed. One rank, before training."""
    for leftover in Path(run_folder, CHECKPOINTS).glob("step=*.*"):
        if leftover.name.endswith((PARTIAL, REMOVING)):
            shutil.rmtree(leftover)


def remove(folder):
    """Remove a checkpoint; a run killed meanwhile does not find half of it."""
    removing = folder.with_name(folder.name + REMOVING)
    os.replace(folder, removing)
    shutil.rmtree(removing)


def starting_checkpoints(recipe):
    """(this run's newest checkpoint, that of `init_from`): at most one is not None, and it is whole and fits.

    ValueError where `init_from` holds no finished checkpoint, one is damaged, or holds another model or run.
    """
    own = last_checkpoint(recipe.output)
    if own:
        _check_same_run(recipe)
        _check_whole(own)
        return own, None
    if not recipe.init_from:
        return None, None
    other = last_checkpoint(recipe.init_from)
    if other is None:
        raise ValueError(f"init_from={recipe.init_from} holds no finished checkpoint; train that run first")
    theirs = read_recipe(Path(recipe.init_from, RECIPE_FILE))
    if not isinstance(theirs, VideoRecipe):
        raise ValueError(
            f"init_from={recipe.init_from} holds a run of {theirs.name}, which is no video transformer"
        )
    try:
        check_transition(theirs.size, recipe.size)
    except ValueError as error:
        raise ValueError(
            f"init_from={recipe.init_from}: {error}; or set init_from= for fresh weights"
        ) from None
    _check_whole(other)
    return None, other


def _check_whole(folder):
    from nemo_moviegen.training.storage import check_files

    try:
        read_state(folder)
        check_files(folder / TENSORS)
    except ValueError as error:
        others = [f.name for f in checkpoints(folder.parents[1]).values() if f != folder]
        before = f"remove that folder to go on from {others[-1]}" if others else "it was the only one"
        raise ValueError(f"checkpoint {folder} can not be used: {error}; {before}") from None


def _check_same_run(recipe):
    _check_same_size(recipe)
    theirs = read_recipe(Path(recipe.output, RECIPE_FILE))
    changed = [
        f"{name} {getattr(theirs, name)} instead of {getattr(recipe, name)}"
        for name in ("name", *SAME)
        if getattr(theirs, name) != getattr(recipe, name)
    ]
    changed += [
        f"data.{name} {getattr(theirs.data, name)} instead of {getattr(recipe.data, name)}"
        for name in ("folder", "image_every", "batching")
        if getattr(theirs.data, name) != getattr(recipe.data, name)
    ]
    if theirs.global_batch == recipe.global_batch and theirs.images_per_step != recipe.images_per_step:
        changed.append(f"image_batch {theirs.images_per_step} instead of {recipe.images_per_step}")
    if recipe.data.batching == "balanced" and theirs.micro_batch != recipe.micro_batch:
        changed.append(f"micro_batch {theirs.micro_batch} instead of {recipe.micro_batch}")
    if recipe.data.batching == "packed" and theirs.pack_tokens != recipe.pack_tokens:
        changed.append(f"packs of {theirs.pack_tokens} tokens instead of {recipe.pack_tokens}")
    if changed:
        raise ValueError(
            f"{recipe.output} holds another run than {recipe.name}: {'; '.join(changed)}; resume with its "
            f"own settings, or start a new run from its weights: output=NEW init_from={recipe.output}"
        )


def size_differences(theirs, recipe) -> list[str]:
    """Where the model of another run's recipe is not that of `recipe`, field by field; names do not count."""
    theirs = asdict(theirs.size) if isinstance(theirs, VideoRecipe) else {}
    return [
        f"{name} {theirs.get(name)} instead of {value}"
        for name, value in asdict(recipe.size).items()
        if name != "name" and theirs.get(name) != value
    ]


def _check_same_size(recipe):
    theirs = read_recipe(Path(recipe.output, RECIPE_FILE))
    different = size_differences(theirs, recipe)
    if different:
        raise ValueError(
            f"{recipe.output} holds another model than {recipe.name}: {'; '.join(different)}; set another "
            "output, or remove that folder"
        )


def checkpoint_of(run_folder, step=0):
    """Folder of the checkpoint of a step, the newest where it is 0; ValueError names those that are there."""
    found = checkpoints(run_folder)
    if not found:
        raise ValueError(f"{run_folder} holds no finished checkpoint yet: train it with `moviegen train`")
    if step and step not in found:
        raise ValueError(f"{run_folder} holds no checkpoint of step {step}; use {', '.join(map(str, found))}")
    return found[step or max(found)]


def load_video_model(run_folder, layout=None, *, weights=None, step=0):
    """(VideoTransformer in eval mode, its VideoRecipe) from a checkpoint of a run: of a step, or the newest.

    `weights` is "ema" or "weights" (those being trained); None takes the average where the run kept one. They
    may have been trained in any layout; this process holds them whole, or its part under `layout`, for which
    megatron's groups exist. On a CPU bf16 weights are read as fp32. ValueError where the folder holds no
    finished run of a video recipe, no such weights, or those of another size than its recipe.
    """
    recipe_file = Path(run_folder, RECIPE_FILE)
    if not recipe_file.is_file():
        raise ValueError(
            f"{run_folder} is no run folder: it holds no {RECIPE_FILE}; train one with `moviegen train`"
        )
    recipe = read_recipe(recipe_file)
    if not isinstance(recipe, VideoRecipe):
        raise ValueError(f"{run_folder} holds a run of {recipe.name}, which is no video transformer")
    folder = checkpoint_of(run_folder, step)
    from nemo_moviegen.training.cpu import stand_in_for_cuda

    on_gpu = torch.cuda.is_available()
    quiet()
    stand_in_for_cuda()
    from nemo_moviegen.training.shards import whole_shards
    from nemo_moviegen.training.state import EMA, WEIGHTS, pieces
    from nemo_moviegen.training.storage import read_into, tensor_shapes
    from nemo_moviegen.video.model import VideoTransformer, video_config

    layout = layout or Layout()
    join_process_groups(layout)
    if recipe.precision == "fp64":
        precision = "fp64"
    else:
        precision = "bf16" if on_gpu and is_mixed(recipe.precision) else "fp32"
    model = VideoTransformer(video_config(recipe.size, layout, precision), seed=None)
    if on_gpu:
        model.cuda()
    stored = tensor_shapes(folder / TENSORS)
    has_average = any(name.startswith(f"{EMA}.") for name in stored)
    if weights == EMA and not has_average:
        raise ValueError(f"{folder} holds no average of its weights; it was trained with ema_decay=0")
    kind = weights or (EMA if has_average else WEIGHTS)
    shards = {f"{kind}.{shard.name}": shard for shard in whole_shards(model)}
    unread = sorted(name for name in stored if name.startswith(f"{kind}.") and name not in shards)
    if unread:  # fewer layers than were trained would make samples all the same, bad ones
        raise ValueError(
            f"{folder / TENSORS} holds another model than {recipe_file} says: {', '.join(unread[:5])} "
            f"({len(unread)} tensors too many); restore the recipe the run was trained with"
        )
    read_into(folder / TENSORS, pieces({name: shard.weight for name, shard in shards.items()}, shards))
    return model.eval(), replace(recipe, layout=layout)


def join_process_groups(layout):
    """Megatron's process groups of `layout` if there are none; a process launched alone is a world of one."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this stage runs in one process, and a launcher started several: start it alone")
        store = tempfile.mkdtemp()
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{store}/store",
            rank=0,
            world_size=1,
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(layout.tensor, context_parallel_size=layout.context)
        model_parallel_cuda_manual_seed(0)
