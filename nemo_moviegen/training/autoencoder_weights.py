"""Weights of a trained autoencoder, out of its run folder: to be used, started from or gone on with.

Without Lightning or NeMo: what makes videos or measures them starts five seconds sooner.
"""

from pathlib import Path

import torch

from nemo_moviegen.recipe import RECIPE_FILE, TaeRecipe, read_recipe
from nemo_moviegen.tae.inflate import is_diffusers_folder, load_weights, read_diffusers
from nemo_moviegen.tae.model import TemporalAutoencoder

CHECKPOINT_FILE = "last.ckpt"


def load_autoencoder(run_folder) -> TemporalAutoencoder:
    """The autoencoder of a run's last checkpoint, its average where it kept one, on the CPU, in eval mode.

    ValueError if there is none, or one of another size than the run's recipe.
    """
    recipe, state = _read_run(run_folder)
    autoencoder = TemporalAutoencoder(recipe.autoencoder)
    try:
        autoencoder.load_state_dict(_trained(state))
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint of {run_folder} holds another autoencoder than its {RECIPE_FILE} says; restore "
            f"the recipe the run was trained with ({' '.join(str(error).split())[:300]})"
        ) from None
    return autoencoder.eval()


def start_from(module, folder, talks=True):
    """Fill a fresh module's weights from another run's, or from a 2D autoencoder that is inflated.

    A discriminator of the same sizes comes along. ValueError where the autoencoders do not fit.
    """
    if is_diffusers_folder(folder):
        state, fresh = {}, load_weights(module.autoencoder, read_diffusers(folder), str(folder))
    else:
        before, state = _read_run(folder)
        _check_compression(before.autoencoder, module.recipe.autoencoder, folder)
        fresh = load_weights(module.autoencoder, _trained(state), str(folder))
    theirs, ours = state.get("discriminator"), module.discriminator
    if ours is not None and theirs is not None:
        own = {name: value.shape for name, value in ours.state_dict().items()}
        if own == {name: value.shape for name, value in theirs.items()}:
            ours.load_state_dict(theirs)
    if talks:
        what = f", inflated: {len(fresh)} tensors over time are fresh" if fresh else ""
        print(f"{module.recipe.name}: weights of {folder}{what}", flush=True)


def _check_compression(theirs, ours, folder):
    """What the shapes of weights do not tell: a 2D one has none, and may become any."""
    if theirs.inflation != "2D" and theirs.temporal_compression != ours.temporal_compression:
        raise ValueError(
            f"{folder} puts {theirs.temporal_compression} frames in a latent, this run "
            f"{ours.temporal_compression}: start from a 2D autoencoder, or set "
            f"autoencoder.temporal_compression={theirs.temporal_compression}"
        )


def _read_run(folder):
    recipe_file, checkpoint = Path(folder, RECIPE_FILE), Path(folder, CHECKPOINT_FILE)
    if not recipe_file.is_file() or not checkpoint.is_file():
        raise ValueError(
            f"{folder} holds no trained autoencoder ({RECIPE_FILE} and {CHECKPOINT_FILE}): "
            "train one with `moviegen train tae.tiny_image` and `moviegen train tae.tiny`, or name another "
            "run folder"
        )
    recipe = read_recipe(recipe_file)
    if not isinstance(recipe, TaeRecipe):
        raise ValueError(f"{folder} is a run of {recipe.name}, which is no autoencoder; name another run")
    return recipe, torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def _trained(state):
    return state["average" if "average" in state else "autoencoder"]


def own_state(recipe):
    """What the run's own checkpoint holds, or None; ValueError where it is of another autoencoder."""
    if not Path(recipe.output, CHECKPOINT_FILE).is_file():
        return None
    before, state = _read_run(recipe.output)
    if before.autoencoder != recipe.autoencoder:
        raise ValueError(
            f"{recipe.output} holds a run of another autoencoder, which cannot go on with this one: "
            "set another output, or remove that folder"
        )
    parts = {"average": bool(recipe.ema_decay), "discriminator": bool(recipe.loss.adversarial)}
    for part, wanted in parts.items():
        if wanted != (part in state):
            key = {"average": "ema_decay", "discriminator": "loss.adversarial"}[part]
            raise ValueError(
                f"{recipe.output} holds a run {'without' if wanted else 'with'} {part}, and {key} says "
                f"otherwise: set it as it was, or start a new run from this one (init_from={recipe.output} "
                "and another output)"
            )
    return state
