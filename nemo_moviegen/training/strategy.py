"""NeMo's MegatronStrategy from a recipe: the parallelism of s3.1.6 as settings."""

import nemo.lightning as nl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_moviegen.precision import is_fp8, is_mixed
from nemo_moviegen.video.model import DTYPES


def strategy(recipe) -> nl.MegatronStrategy:
    """The strategy of a `VideoRecipe`: gloo on CPU, nccl on GPUs."""
    layout = recipe.layout
    result = nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_dtype=DTYPES[recipe.precision],
        process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        ddp=ddp_config(layout, recipe.precision, gathers_fp8=is_fp8(recipe.precision) and recipe.fp8.gathers),
        fsdp="megatron" if layout.sharding == "full" else None,
        use_gloo_process_groups=False,  # another checkpoint format's; thousands of ranks meet for minutes
    )
    # Each step NeMo asks its language models whether one is distilled, and to ask imports them all the first
    # time: 1,246 modules, 80 MiB
    MegatronStep.adjust_tensor_shapes_fn = None
    # NeMo's progress printer gathers megatron's timers on rank 0 alone: gloo deadlocks at the next collective
    result.timers = None
    return result


def ddp_config(layout, precision, gathers_fp8=False) -> DistributedDataParallelConfig:
    """What data-parallel ranks share out (`layout.sharding`) and how gradients meet."""
    full = layout.sharding == "full"
    return DistributedDataParallelConfig(
        use_distributed_optimizer=layout.sharding != "none",
        grad_reduce_in_fp32=is_mixed(precision),
        check_for_nan_in_grad=False,  # training/guard.py skips such a step on all ranks
        use_megatron_fsdp=full,
        data_parallel_sharding_strategy="optim_grads_params" if full else "no_shard",
        fp8_param_gather=gathers_fp8,
        preserve_fp32_weights=is_mixed(precision),  # other precisions train the weights themselves
        overlap_grad_reduce=full or layout.overlap,
        overlap_param_gather=full or (layout.overlap and layout.sharding == "optimizer"),
    )
