"""Training of the temporal autoencoder (Movie Gen s3.1.1): clips, and images one step in four.

A run folder holds recipe.yaml, last.ckpt (weights, their average, discriminator, optimisers, step),
metrics.jsonl, tensorboard/ and, if files were bad, quarantine.jsonl. Samples, and the noise of each, are
functions of (seed, sample, step), so a run that was killed goes on with the losses it would have had.
"""

import os
from pathlib import Path

import torch

from nemo_moviegen.recipe import RECIPE_FILE, TaeRecipe, read_recipe
from nemo_moviegen.tae.inflate import is_diffusers_folder, load_weights, read_diffusers
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.autoencoder_clips import TrainingClips
from nemo_moviegen.training.autoencoder_folder import CHECKPOINT_FILE
from nemo_moviegen.training.cpu import stand_in_for_cuda, stand_in_for_cuda_in_nemo
from nemo_moviegen.training.record import quiet, write_recipe


def train_autoencoder(recipe: TaeRecipe) -> dict | None:
    """Train on the ranks this process was started among; returns the last step's metrics on rank 0.

    Ranks come from torchrun's environment; one process trains alone. A run folder with a checkpoint goes on
    from it. ValueError where batch, manifest or run folder do not fit, before anything is built;
    Stopped where the run was asked to end early (stopping.py).
    """
    num_ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if recipe.layout.model_ranks > 1:
        raise ValueError(f"{recipe.name}: an autoencoder is not split; set layout.tensor=1 layout.context=1")
    accumulate = recipe.num_microbatches(num_ranks)
    state = _own_state(recipe)
    data = TrainingClips(recipe, rank, num_ranks)
    quiet()
    stand_in_for_cuda()
    stand_in_for_cuda_in_nemo()
    quiet()  # NeMo sets up its own logger when it is imported
    from nemo_moviegen.training.autoencoder_module import AutoencoderModule
    from nemo_moviegen.training.stopping import fit

    torch.manual_seed(recipe.seed)  # the same fresh weights on every rank
    module = AutoencoderModule(recipe, accumulate)
    if state is None and recipe.init_from:
        start_from(module, recipe.init_from, talks=rank == 0)
    module.keep_average()
    if state is not None:
        module.load_state(state)
        data.first_step = module.step
    if rank == 0:
        write_recipe(recipe)
    trainer = _trainer(recipe, data, num_ranks)
    fit(trainer, module, data)
    return getattr(trainer, "last_metrics", None)


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


def _own_state(recipe):
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


def _trainer(recipe, data, num_ranks):
    import nemo.lightning as nl

    from nemo_moviegen.training.autoencoder_folder import RunFolder
    from nemo_moviegen.training.heartbeat import Heartbeat
    from nemo_moviegen.training.loggers import loggers
    from nemo_moviegen.training.progress import ProgressPage
    from nemo_moviegen.training.stopping import StopWhenAsked

    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        strategy=_strategy(num_ranks),
        devices=ranks_per_node,
        num_nodes=num_ranks // ranks_per_node,
        precision={"bf16": "bf16-mixed", "fp32": "32-true", "fp64": "64-true"}[recipe.precision],
        max_epochs=1,  # the data end with the run
        callbacks=[StopWhenAsked(recipe), RunFolder(recipe, data), ProgressPage(recipe), Heartbeat(recipe)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.loggers = loggers(recipe)  # as in run.py
    return trainer


def _strategy(num_ranks):
    if num_ranks == 1:
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy

    class Replicas(DDPStrategy):
        """Ranks and their collectives; gradients are averaged by the module, once a step."""

        def configure_ddp(self): ...

    return Replicas(process_group_backend="nccl" if torch.cuda.is_available() else "gloo")
