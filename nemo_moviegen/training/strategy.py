"""NeMo's MegatronStrategy from a recipe, and its checkpoints: the parallelism of s3.1.6 as settings."""

import nemo.lightning as nl
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_moviegen.training.checkpoint import CHECKPOINTS
from nemo_moviegen.video.model import DTYPES

KEPT_CHECKPOINTS = 2


def strategy(recipe) -> nl.MegatronStrategy:
    """The strategy of a `VideoRecipe`: gloo on CPU, nccl on GPUs."""
    layout = recipe.layout
    result = nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_dtype=DTYPES[recipe.precision],
        process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=layout.sharding != "none",
            grad_reduce_in_fp32=recipe.precision == "bf16",
            check_for_nan_in_grad=True,
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,  # another layout may resume
    )
    # NeMo's progress printer gathers megatron's timers on rank 0 alone: gloo deadlocks at the next collective
    result.timers = None
    return result


class RunCheckpoint(nl.ModelCheckpoint):
    """checkpoints/step=N every `save_every` steps and at the end, the newest two kept."""

    def __init__(self, recipe):
        super().__init__(
            dirpath=f"{recipe.output}/{CHECKPOINTS}",
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=KEPT_CHECKPOINTS,
            save_last=False,
            every_n_train_steps=recipe.save_every,
            save_optim_on_train_end=True,
            always_save_context=False,
            save_context_on_train_end=False,
            verbose=False,
        )

    def on_train_end(self, trainer, module):
        super().on_train_end(trainer, module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _monitor_candidates(self, trainer):
        # NeMo logs the number of the running step as `step`; a checkpoint is named by the steps that are done
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}
