"""A run's weights from another run's checkpoint, grown where the stages differ (`stages.py`)."""

from pathlib import Path

import torch

from nemo_moviegen.recipe import RECIPE_FILE, read_recipe
from nemo_moviegen.training.checkpoint import TENSORS
from nemo_moviegen.training.stages import grow, plan_transition
from nemo_moviegen.training.state import WEIGHTS
from nemo_moviegen.training.storage import read_into, read_whole, tensor_shapes
from nemo_moviegen.video.weights import fresh_weight


def start_from(state, folder, recipe) -> list[str]:
    """Fill the weights of `state` from the checkpoint `folder` of another run; what the log should say.

    Parameters that are the same are read in place, each rank its own; the few that grow are read whole. Fresh
    ones stay as `recipe.seed` drew them. Moments stay fresh. ValueError where the models do not fit.
    """
    old_size = read_recipe(Path(folder).parents[1] / RECIPE_FILE).size
    old_shapes = {
        name.removeprefix(f"{WEIGHTS}."): shape
        for name, shape in tensor_shapes(folder / TENSORS).items()
        if name.startswith(f"{WEIGHTS}.")
    }
    plan = plan_transition(old_shapes, old_size, state.model.whole_shapes, recipe.size)
    state.read_weights(lambda pieces: _fill(pieces, plan, folder / TENSORS, state.model.config, recipe.seed))
    return plan.describe()


def _fill(pieces, plan, folder, config, seed):
    """Fill `pieces` ({"weights.name": [Piece]} of the new model) by the plan."""
    copied = {}
    for key, parts in pieces.items():
        growth = plan.growths[key.removeprefix(f"{WEIGHTS}.")]
        if growth.how == "copy":
            copied[f"{WEIGHTS}.{growth.source}"] = parts
        elif growth.how != "fresh":
            _fill_grown(key.removeprefix(f"{WEIGHTS}."), parts, growth, folder, config, seed)
    read_into(folder, copied)


@torch.no_grad()
def _fill_grown(name, parts, growth, folder, config, seed):
    source = f"{WEIGHTS}.{growth.source}"
    old = read_whole(folder, [source])[source]
    fresh = fresh_weight(name, growth.new_shape, config, seed).to(old.device, old.dtype)
    whole = grow(name, old, growth, fresh)
    for part in parts:
        place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.data.shape, strict=True))
        part.data.copy_(whole[place])
