"""`train(recipe)`: one training run through NeMo Lightning, resumed from its own folder if that holds one."""

import importlib.util
import os
import sys
from dataclasses import replace

import torch

from nemo_moviegen.precision import fp8_settings, is_fp8, is_mixed, why_not_fp8
from nemo_moviegen.training.checkpoint import starting_checkpoints
from nemo_moviegen.training.cpu import stand_in_for_cuda, stand_in_for_cuda_in_nemo
from nemo_moviegen.training.record import quiet, write_recipe
from nemo_moviegen.training.tensor_bytes import counted

SWITCH_SECONDS = 2e-4
"""After which a thread hands over the interpreter that another waits for. Python's 5 ms let the loader's
thread hold up the one that launches kernels, 3% of a demo's step."""


def train(recipe, also=()):
    """Train a `VideoRecipe` on the ranks this process was started among; `also` are Lightning callbacks that
    see each step last.

    Returns the last step's metrics on rank 0, None elsewhere. Ranks come from the launcher's environment
    (torchrun), one process trains alone. ValueError where layout, batch or data do not fit, before anything
    is built; Stopped where the run was asked to end early (stopping.py).
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if num_ranks > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        raise ValueError(f"{num_ranks} ranks and no LOCAL_WORLD_SIZE: start each node's ranks with torchrun")
    recipe.num_microbatches(num_ranks)
    sys.setswitchinterval(SWITCH_SECONDS)
    fused = uses_transformer_engine(recipe)
    own, other = starting_checkpoints(recipe)
    quiet()
    stand_in_for_cuda()
    stand_in_for_cuda_in_nemo()
    quiet()  # NeMo sets up its own logger when it is imported
    from nemo_moviegen.training.data import LatentDataModule
    from nemo_moviegen.training.module import FlowMatchingModule
    from nemo_moviegen.training.stopping import fit

    asked, recipe = recipe, replace(recipe, layout=recipe.layout.among(num_ranks))
    with counted():
        data = LatentDataModule(recipe)
        module = FlowMatchingModule(recipe, uses_transformer_engine=fused, is_fresh=own is None)
        if int(os.environ.get("RANK", 0)) == 0:
            write_recipe(asked)
        trainer = _trainer(recipe, module, data, num_ranks, own, other)
        trainer.callbacks.extend(also)
        fit(trainer, module, data)
    return getattr(trainer, "last_metrics", None)


def uses_transformer_engine(recipe) -> bool:
    """Whether the run uses Transformer Engine: its attention is fused, and splits a clip, in bf16 alone.

    ValueError where it should and is not installed, or the machine has no FP8 for an FP8 precision.
    """
    on_gpu = torch.cuda.is_available()
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    if is_fp8(recipe.precision) and recipe.fp8.emulated:
        return False
    if is_fp8(recipe.precision):
        capability = torch.cuda.get_device_capability() if on_gpu else None
        if missing := why_not_fp8(recipe.precision, capability, has_engine):
            raise ValueError(
                f"{recipe.name} trains in {recipe.precision}, which takes {missing}: set precision=bf16, or "
                "fp8.emulated=true to try out its numbers"
            )
    wanted = on_gpu and is_mixed(recipe.precision)
    if wanted and not has_engine:
        raise ValueError(
            f"{recipe.name} trains in bf16 on a GPU, which takes Transformer Engine; it is not installed: "
            "pip install -r requirements-gpu.txt, or set precision=fp32"
        )
    return wanted


def _trainer(recipe, module, data, num_ranks, own, other):
    import nemo.lightning as nl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from nemo_moviegen.training.loggers import loggers
    from nemo_moviegen.training.strategy import strategy

    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    plugins = [TorchElasticEnvironment()] if TorchElasticEnvironment.detect() else []
    if is_mixed(recipe.precision):
        told = fp8_settings(recipe.precision, recipe.fp8)  # it overwrites the model's
        told["fp8_param_gather"] = is_fp8(recipe.precision) and recipe.fp8.gathers
        plugins.append(nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16, **told))
    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=ranks_per_node,
        num_nodes=num_ranks // ranks_per_node,
        strategy=strategy(recipe),
        plugins=plugins or None,
        max_steps=recipe.num_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=_callbacks(recipe, module, data, own, other),
        enable_checkpointing=False,
        logger=False,
        log_every_n_steps=recipe.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.loggers = loggers(recipe)  # afterwards: NeMo's trainer copies its arguments, the logger too
    return trainer


def _callbacks(recipe, module, data, own, other):
    """In the order in which they see a step end: judged, compared, acted on, measured, stopped, saved."""
    from nemo_moviegen.training.callbacks import Metrics
    from nemo_moviegen.training.fp8_report import Fp8Report
    from nemo_moviegen.training.guard import SkipBadSteps
    from nemo_moviegen.training.heartbeat import Heartbeat
    from nemo_moviegen.training.monitor import Monitor
    from nemo_moviegen.training.plateau import LowerOnPlateau
    from nemo_moviegen.training.progress import ProgressPage
    from nemo_moviegen.training.samples import Samples
    from nemo_moviegen.training.saving import Checkpoints
    from nemo_moviegen.training.stopping import StopWhenAsked
    from nemo_moviegen.training.validation import ValidationLoss

    checkpoints = Checkpoints(recipe, own, other)
    checkpoints.data = data.order.contents
    guard = checkpoints.guard = SkipBadSteps(recipe, data, checkpoints.roll_back)
    validation = checkpoints.validation = ValidationLoss(recipe, data)
    monitor, samples = Monitor(recipe, data, guard), Samples(recipe, data)
    metrics = Metrics(recipe, data, guard, validation, samples)
    plateau = []
    if recipe.optim.decay == "plateau":
        checkpoints.plateau = module.plateau
        plateau = [LowerOnPlateau(recipe, validation)]
    stopping, heartbeat = StopWhenAsked(recipe), Heartbeat(recipe)
    stopping.guard = guard
    validating, sampling, saving = map(heartbeat.enters, ("validating", "sampling", "saving"))
    fp8 = [Fp8Report(recipe)] if is_fp8(recipe.precision) else []
    measured = [guard, *fp8, monitor, validating, validation, *plateau, sampling, samples, metrics]
    return [*measured, stopping, saving, checkpoints, ProgressPage(recipe), heartbeat]
