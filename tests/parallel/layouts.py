"""One training step of the test model under any layout, by megatron's own schedule, DDP and reductions."""

import tiny
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_moviegen.training import step
from nemo_moviegen.video.embeddings import unpatchify
from nemo_moviegen.video.model import VideoTransformer, video_config
from nemo_moviegen.video.parallel import gather_tokens

SEED = 7


def save_one_rank_weights(folder, size=tiny.SIZE):
    """Weights of one model, written by one rank, for all layouts: SwiGLU cut by hand is another model."""
    from nemo_moviegen.recipe import Layout

    model = _model(Layout(), size)
    tiny.open_gates(model)
    dist_checkpointing.save(model.sharded_state_dict(), folder)


def run_step(layout, folder, batch, micro_batch, size=tiny.SIZE, plant=None, **config_fields):
    """(loss, velocity of the first sample, {name: gradient}) of one step on all ranks' share of `batch`.

    Gradients come back whole: tp shards joined, and the distributed optimizer's dp shards. `plant(model)` may
    plant a bug; `config_fields` are set on megatron's configuration.
    """
    model = _model(layout, size, **config_fields)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    if plant is not None:
        plant(model)
    config = model.config
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=layout.sharding != "none",
            grad_reduce_in_fp32=False,
            bucket_size=None,
        ),
        model,
    )
    config.finalize_model_grads_func = finalize_model_grads
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = batch.latent_BTCHW.shape[0] // copies
    own = batch.rows(rank * share, (rank + 1) * share)
    micro_batches = [own.rows(i, i + micro_batch) for i in range(0, share, micro_batch)]

    def forward_step(data_iterator, model):
        part = next(data_iterator)
        x, target, t = step.noisy_pair(part, SEED)
        velocity = model(x, t, part.contexts, part.masks)

        def loss(velocity):
            result = step.token_loss(velocity, target, config)
            return result.loss_sum, result.num_tokens, result.sums

        return velocity, loss

    ddp.zero_grad_buffer()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[ddp],
        num_microbatches=len(micro_batches),
        seq_length=0,
        micro_batch_size=micro_batch,
        forward_only=False,
    )
    _gather_data_parallel_shards(ddp)
    return float(step.mean_loss(sums, config)), _first_velocity(model, batch), _whole_gradients(model)


def _model(layout, size, **config_fields):
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor, context_parallel_size=layout.context)
    model_parallel_cuda_manual_seed(123)
    config = video_config(size, layout, "fp64")
    for name, value in config_fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return VideoTransformer(config)


def _first_velocity(model, batch):
    first = batch.rows(0, 1)
    x, _, t = step.noisy_pair(first, SEED)
    with torch.no_grad():
        tokens = gather_tokens(model(x, t, first.contexts, first.masks), model.config)
    return unpatchify(tokens, tuple(x.shape[i] for i in (1, 3, 4)), model.size)


def _gather_data_parallel_shards(ddp):
    """The distributed optimizer leaves each dp rank its slice of the reduced gradient: join the slices."""
    if not ddp.ddp_config.use_distributed_optimizer:
        return
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _whole_gradients(model):
    """Each gradient with tp shards joined; of replicated weights this rank's own: all are compared."""
    gradients = {name: p.main_grad for name, p in model.named_parameters()}
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [None] * group.size()
    dist.all_gather_object(shards, gradients, group=group)
    whole = {}
    for name, parameter in model.named_parameters():
        pieces = [shard[name] for shard in shards]
        if not getattr(parameter, "tensor_model_parallel", False):
            whole[name] = gradients[name]
        elif "linear_fc1" in name and model.size.gated_ffn:  # [gate shard; up shard] of each rank
            gates, ups = zip(*(piece.chunk(2) for piece in pieces), strict=True)
            whole[name] = torch.cat((*gates, *ups))
        else:
            whole[name] = torch.cat(pieces, dim=parameter.partition_dim)
    return whole
