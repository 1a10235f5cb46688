"""Run folders: recipe.yaml, checkpoints/step=N (megatron's sharded format, any layout reads it), metrics.

A checkpoint counts once NeMo has removed its unfinished marker, so a run killed inside a write falls back to
the checkpoint before.
"""

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nemo_moviegen.recipe import RECIPE_FILE, Layout, VideoRecipe, read_recipe
from nemo_moviegen.training.record import quiet

CHECKPOINTS = "checkpoints"


def last_checkpoint(run_folder):
    """Folder of the newest finished checkpoint of a run, or None."""
    found = {}
    for folder in Path(run_folder, CHECKPOINTS).glob("step=*"):
        number = folder.name.partition("=")[2]
        finished = not folder.with_name(folder.name + "-unfinished").exists()
        if (
            folder.is_dir()
            and number.isdigit()
            and finished
            and (folder / "weights" / "metadata.json").is_file()
        ):
            found[int(number)] = folder
    return found[max(found)] if found else None


def starting_checkpoints(recipe):
    """(this run's newest checkpoint, that of `init_from`): at most one is not None, and its weights fit.

    ValueError where `init_from` holds no finished checkpoint, or a run holds a model of another size.
    """
    own = last_checkpoint(recipe.output)
    if own:
        _check_same_size(recipe, recipe.output, "set another output, or remove that folder")
        return own, None
    if not recipe.init_from:
        return None, None
    other = last_checkpoint(recipe.init_from)
    if other is None:
        raise ValueError(f"init_from={recipe.init_from} holds no finished checkpoint; train that run first")
    _check_same_size(recipe, recipe.init_from, "set another init_from (empty = fresh weights)")
    return None, other


def _check_same_size(recipe, folder, what_to_change):
    theirs = read_recipe(Path(folder, RECIPE_FILE))
    theirs = asdict(theirs.size) if isinstance(theirs, VideoRecipe) else {}
    different = [
        f"{name} {theirs.get(name)} instead of {value}"
        for name, value in asdict(recipe.size).items()
        if name != "name" and theirs.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{folder} holds another model than {recipe.name}: {'; '.join(different)}; {what_to_change}"
        )


def load_video_model(run_folder, layout=None):
    """(VideoTransformer in eval mode, its VideoRecipe) from the newest checkpoint of a run.

    The weights may have been trained in any layout; this process holds them whole, or its part under
    `layout`, for which megatron's groups exist. On a CPU bf16 weights are read as fp32. ValueError where the
    folder holds no finished run of a video recipe.
    """
    recipe_file = Path(run_folder, RECIPE_FILE)
    if not recipe_file.is_file():
        raise ValueError(
            f"{run_folder} is no run folder: it holds no {RECIPE_FILE}; train one with `moviegen train`"
        )
    recipe = read_recipe(recipe_file)
    if not isinstance(recipe, VideoRecipe):
        raise ValueError(f"{run_folder} holds a run of {recipe.name}, which is no video transformer")
    folder = last_checkpoint(run_folder)
    if folder is None:
        raise ValueError(
            f"{run_folder} holds no finished checkpoint yet; train it with `moviegen train {recipe.name}`"
        )
    from nemo_moviegen.training.cpu import stand_in_for_cuda

    on_gpu = torch.cuda.is_available()
    quiet()
    stand_in_for_cuda()
    from megatron.core import dist_checkpointing

    from nemo_moviegen.video.model import VideoTransformer, video_config

    layout = layout or Layout()
    join_process_groups(layout)
    precision = recipe.precision if on_gpu or recipe.precision == "fp64" else "fp32"
    model = VideoTransformer(video_config(recipe.size, layout, precision))
    if on_gpu:
        model.cuda()
    # NeMo wraps the model once before it saves, and the checkpoint's other contents come along
    wanted = {f"module.{name}": value for name, value in model.sharded_state_dict(prefix="module.").items()}
    loaded = dist_checkpointing.load(wanted, str(folder / "weights"))
    prefix = "module.module."
    model.load_state_dict({n.removeprefix(prefix): v for n, v in loaded.items() if n.startswith(prefix)})
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
