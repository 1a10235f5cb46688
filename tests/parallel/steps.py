"""Two optimiser steps of the test model under any layout, by megatron's own schedule, reductions and AdamW.

DDP, FSDP and the optimiser are set up as training sets them up. Which piece of a tensor a rank holds is
worked out here a second time: cutting and joining with the code under test would prove little.
"""

from dataclasses import dataclass, replace

import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    FullyShardedDataParallel,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_moviegen.batch import PackedVideoBatch
from nemo_moviegen.layout import Layout
from nemo_moviegen.recipe import Optim
from nemo_moviegen.training import step
from nemo_moviegen.video.model import VideoTransformer, video_config
from nemo_moviegen.video.parallel import gather_tokens, pack_of
from parallel.runs import gather_weights, recipe

SEED = 7
OPTIM = Optim(learning_rate=1e-3, clip_grad=0.05)  # far below the norms here: clipping acts


@dataclass(frozen=True)
class Steps:
    """What two optimiser steps gave; tensors are whole but for the cut over tensor ranks."""

    loss: float
    """Of the first step, as are all but the parameters."""
    outputs: dict
    """{number of the sample in the step: velocity tokens [S, X]} of the samples this rank took part in."""
    gradients: dict
    """{name: gradient} before clipping."""
    norm: float
    parameters: dict
    """{name: parameter} after the second step."""


def start_weights(size=tiny.SIZE) -> dict:
    """{name: whole parameter} that all layouts start from; call it on one rank."""
    join_groups(Layout())
    torch.manual_seed(0)
    model = VideoTransformer(video_config(size, Layout(), "fp64"))
    tiny.open_gates(model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def two_steps(layout, batches, micro_batch, weights, size=tiny.SIZE, plant=None) -> Steps:
    """Train from `weights` on `batches`, each cut into micro-batches that data parallel ranks take in turn;
    a pack is a micro-batch.

    The second step sees the samples in their next epoch: other noise and times. `plant(model, wrapped)` may
    plant a bug once all is built.
    """
    join_groups(layout)
    model = VideoTransformer(video_config(size, layout, "fp64"))
    model.config.finalize_model_grads_func = finalize_model_grads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_cut(name, parameter, size)(weights[name]))
    run = recipe("", "", layout=layout, size=size, optim=OPTIM)
    wrapped = _wrap(model, run)
    optimizer = _optimizer(wrapped, run)
    if plant is not None:
        plant(model, wrapped)
    micro_batches = _own_micro_batches(batches, micro_batch)
    first = None
    for epoch in range(2):
        loss, outputs = _forward_backward(wrapped, model, optimizer, micro_batches, epoch)
        if first is None:
            gradients = _gradients(wrapped, model)
        _, norm, _ = optimizer.step()
        first = first or Steps(loss, outputs, gradients, norm, {})
    gather_weights(wrapped)
    return replace(first, parameters=_parameters(wrapped, model))


def errors(steps, reference, layout, size=tiny.SIZE) -> dict:
    """Largest error of `steps` against one rank's, by what was compared: {"gradients": (error, name), ...}.

    Relative to the largest value of each tensor of the reference; a tensor that is zero there must be zero.
    """
    parameters = dict(VideoTransformer(video_config(size, layout, "fp64")).named_parameters())
    found = {
        "loss": (abs(steps.loss - reference.loss) / reference.loss, "loss"),
        "output": max((_error(o, reference.outputs[i]), f"sample {i}") for i, o in steps.outputs.items()),
        "norm": (abs(steps.norm - reference.norm) / reference.norm, "norm"),
    }
    for kind in ("gradients", "parameters"):
        own, true = getattr(steps, kind), getattr(reference, kind)
        if own.keys() != true.keys():
            raise AssertionError(f"{kind} of {sorted(own.keys() ^ true.keys())} are on one side only")
        found[kind] = max(
            (_error(own[name], _cut(name, parameters[name], size)(whole)), name)
            for name, whole in true.items()
        )
    return found


def _error(own, true):
    if own.shape != true.shape:
        raise AssertionError(f"shape {tuple(own.shape)} in place of {tuple(true.shape)}")
    scale, error = float(true.abs().max()), float((own - true).abs().max())
    if error == 0:
        return 0.0
    return error / scale if scale and error == error else float("inf")


def join_groups(layout):
    """Process groups take longer than a step: they are kept from row to row while the layout stays."""
    wanted = (layout.tensor, layout.context)
    if parallel_state.model_parallel_is_initialized():
        if wanted == (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        ):
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tensor, context_parallel_size=layout.context, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(123)


def _wrap(model, run):
    from nemo_moviegen.training.strategy import ddp_config  # imports NeMo

    full = run.layout.sharding == "full"
    model.config.use_megatron_fsdp = full
    wrapper = FullyShardedDataParallel if full else DistributedDataParallel
    wrapped = wrapper(model.config, ddp_config(run.layout, run.precision), model)
    if wrapped.ddp_config.overlap_grad_reduce:  # as NeMo does
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def _optimizer(wrapped, run):
    from nemo_moviegen.training import module as production

    optimizer = get_megatron_optimizer(
        production.optimizer_config(run),
        [wrapped],
        no_weight_decay_cond=production._is_not_a_matrix,
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:  # NeMo applies megatron's factor itself
        group["weight_decay"] *= group["wd_mult"]
    return optimizer


def _own_micro_batches(batches, micro_batch):
    """[(number of the first sample, micro-batch)] of this rank's model copy."""
    parts, number = [], 0
    for batch in batches:
        samples = len(batch.sample_ids)
        if isinstance(batch, PackedVideoBatch):
            parts.append((number, batch))
        else:
            parts += [(number + i, batch.rows(i, i + micro_batch)) for i in range(0, samples, micro_batch)]
        number += samples
    copy, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if len(parts) % copies:
        raise AssertionError(f"{len(parts)} micro-batches for {copies} copies of the model")
    share = len(parts) // copies
    return parts[copy * share : (copy + 1) * share]


def _forward_backward(wrapped, model, optimizer, micro_batches, epoch):
    """(loss, {sample: velocity tokens}) of one step whose reduced gradients lie ready."""
    outputs, config = {}, model.config

    def forward_step(data_iterator, model):
        number, part = next(data_iterator)
        x, target, t = step.noisy_pair(replace(part, epochs=part.epochs + epoch), SEED)
        velocity_SBX = model(x, t, part.contexts, part.masks)
        outputs.update(enumerate(_by_sample(velocity_SBX.detach(), part, config), start=number))

        def loss(velocity):
            result = step.token_loss(velocity, target, config)
            return result.loss_sum, result.num_tokens, result.sums

        return velocity_SBX, loss

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[wrapped],
        num_microbatches=len(micro_batches),
        seq_length=0,
        micro_batch_size=1,
        forward_only=False,
    )
    return float(step.mean_loss(sums, config)), outputs


def _by_sample(velocity_SBX, part, config):
    """Whole velocities [S, X] of the samples of a micro-batch."""
    if not isinstance(part, PackedVideoBatch):
        return gather_tokens(velocity_SBX, config).unbind(1)
    lengths = [clip.shape[0] * clip[0, 0].numel() // 4 for clip in part.latents]  # patches of 1 x 2 x 2
    return gather_tokens(velocity_SBX, config, pack_of(lengths, config)).squeeze(1).split(lengths)


def _cut(name, parameter, size):
    """The function from a whole tensor to what this tensor rank holds of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return lambda whole: whole
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if "linear_fc1" in name and size.gated_ffn:  # [its gates; its values] of the whole [gates; values]
        return lambda whole: torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    dim = parameter.partition_dim
    return lambda whole: whole.chunk(ranks, dim=dim)[rank]


def _gradients(wrapped, model):
    """{name: reduced gradient}, the slices of data-parallel ranks joined."""
    if wrapped.ddp_config.use_megatron_fsdp:
        return _joined({name: p.grad for name, p in _shards(wrapped)})
    if not wrapped.ddp_config.use_distributed_optimizer:
        return {name: p.main_grad.clone() for name, p in model.named_parameters()}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    gradients, names = {}, {p: name for name, p in model.named_parameters()}
    for bucket in (b for buffer in wrapped.buffers for b in buffer.buckets):
        whole = torch.empty_like(bucket.grad_data)
        own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        dist.all_gather_into_tensor(whole, own, group=group)
        for p in bucket.params:  # which lie in the bucket with gaps between them
            start = p.main_grad.storage_offset() - bucket.grad_data.storage_offset()
            gradients[names[p]] = whole[start : start + p.numel()].view_as(p)
    return gradients


def _parameters(wrapped, model):
    if wrapped.ddp_config.use_megatron_fsdp:
        return _joined(dict(_shards(wrapped)))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _shards(wrapped):
    """(name, the rows of the parameter that Megatron FSDP's optimiser steps on this rank)."""
    shards = wrapped.param_and_grad_buffer.optimizer_named_parameters
    return [(name.removeprefix("module."), shard) for name, shard in shards]


def _joined(shards):
    """Megatron FSDP leaves each data-parallel rank some rows of a tensor, in rank order, or none."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = {name: None if s is None else s._local_tensor.detach().clone() for name, s in shards.items()}
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    pieces = {name: [rows[name] for rows in everyone if rows[name] is not None] for name in own}
    return {name: torch.cat([rows for rows in of if rows.numel()]) for name, of in pieces.items()}
