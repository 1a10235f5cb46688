"""`train(recipe)`: one training run through NeMo Lightning, resumed from its own folder if that holds one."""

import os
from pathlib import Path

import torch

from nemo_moviegen.recipe import recipe_yaml
from nemo_moviegen.training.checkpoint import last_checkpoint
from nemo_moviegen.training.cpu import stand_in_for_cuda, stand_in_for_cuda_in_nemo
from nemo_moviegen.training.record import RECIPE_FILE, quiet


def train(recipe):
    """Train a `VideoRecipe` on the ranks this process was started among.

    Returns the last step's metrics on rank 0, None elsewhere. Ranks come from the launcher's environment
    (torchrun), one process trains alone. ValueError where layout, batch or data do not fit, before anything
    is built.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    recipe.num_microbatches(num_ranks)
    quiet()
    stand_in_for_cuda()
    from nemo.lightning.callback_group import CallbackGroup

    stand_in_for_cuda_in_nemo()
    quiet()  # NeMo sets up its own logger when it is imported
    from nemo_moviegen.training.data import LatentDataModule
    from nemo_moviegen.training.module import FlowMatchingModule

    data = LatentDataModule(recipe)
    module = FlowMatchingModule(recipe, uses_transformer_engine=uses_transformer_engine(recipe))
    trainer = _trainer(recipe, data, num_ranks)
    _resume(trainer, module, recipe)
    # NeMo's telemetry raises at the first checkpoint of a run that did not come through nemo.collections.llm
    CallbackGroup.get_instance().update_config(nemo_version="v2", trainer=trainer, data=data)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(recipe.output, RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
    trainer.fit(module, data)
    return getattr(trainer, "last_metrics", None)


def uses_transformer_engine(recipe) -> bool:
    """Whether the run uses Transformer Engine: its attention is fused, and splits a clip, in bf16 alone."""
    return torch.cuda.is_available() and recipe.precision == "bf16"


def _trainer(recipe, data, num_ranks):
    import nemo.lightning as nl
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from nemo_moviegen.training.callbacks import Metrics
    from nemo_moviegen.training.strategy import RunCheckpoint, strategy

    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    plugins = [TorchElasticEnvironment()] if TorchElasticEnvironment.detect() else []
    if recipe.precision == "bf16":
        plugins.append(nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16))
    return nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=ranks_per_node,
        num_nodes=num_ranks // ranks_per_node,
        strategy=strategy(recipe),
        plugins=plugins or None,
        max_steps=recipe.num_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Metrics(recipe, data), RunCheckpoint(recipe)],
        logger=TensorBoardLogger(recipe.output, name="tensorboard", version=""),
        log_every_n_steps=recipe.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _resume(trainer, module, recipe):
    """From this run's newest checkpoint, or with the weights of `init_from`, or afresh."""
    import nemo.lightning as nl

    state = nl.NeMoLogger(explicit_log_dir=recipe.output, update_logger_directory=False).setup(trainer)
    state.files_to_move = []  # a resumed run goes on in its own files
    own = last_checkpoint(recipe.output)
    other = last_checkpoint(recipe.init_from) if recipe.init_from and not own else None
    if recipe.init_from and not own and not other:
        raise ValueError(f"init_from={recipe.init_from} holds no finished checkpoint; train that run first")
    restore = (
        nl.RestoreConfig(path=str(other / "weights"), load_optim_state=False, load_artifacts=False)
        if other
        else None
    )
    nl.AutoResume(resume_from_path=str(own) if own else None, restore_config=restore).setup(trainer, module)
