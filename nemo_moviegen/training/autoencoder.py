"""Training of the temporal autoencoder (Movie Gen s3.1.1): clips, and images one step in four.

A run folder holds recipe.yaml, last.ckpt (weights, their average, discriminator, optimisers, step),
metrics.jsonl, tensorboard/ and, if files were bad, quarantine.jsonl. Samples, and the noise of each, are
functions of (seed, sample, step), so a run that was killed goes on with the losses it would have had.
"""

import os

import torch

from nemo_moviegen.recipe import TaeRecipe
from nemo_moviegen.training.autoencoder_clips import TrainingClips
from nemo_moviegen.training.autoencoder_weights import own_state, start_from
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
    state = own_state(recipe)
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
