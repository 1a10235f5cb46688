"""Real bugs of other training stacks, planted one by one into forked ranks: the matrix must notice each.

Each plants itself through pytest's `patch`, or into the built model and its DDP or FSDP wrapper.
"""

from types import SimpleNamespace

import megatron.core.optimizer.optimizer as megatron_optimizer
import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

from nemo_moviegen import flow
from nemo_moviegen.layout import Layout
from nemo_moviegen.training import step
from nemo_moviegen.video import attention
from parallel.matrix import Row


def keys_values_without_reduce_scatter(patch, model, wrapped):
    """Each context rank keeps only its own queries' gradient of keys and values."""

    def keep_own(whole):
        group = parallel_state.get_context_parallel_group()
        return SimpleNamespace(wait=lambda: whole.chunk(group.size())[group.rank()])

    patch.setattr(attention, "start_sum_to_owners", keep_own)


def text_split_over_context_ranks(patch, model, wrapped):
    """Each context rank attends to its own part of the text only."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    forward = attention.LocalAttention.forward

    def split(self, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None:
            key, value = key.chunk(size)[rank], value.chunk(size)[rank]
            attention_mask = attention_mask.chunk(size, dim=1)[rank]
        return forward(self, query, key, value, attention_mask, **kwargs)

    patch.setattr(attention.LocalAttention, "forward", split)


def contiguous_swiglu_shards(patch, model, wrapped):
    """[gate; up] cut in two halves: rank 0 gates with rank 1's values."""
    group = parallel_state.get_tensor_model_parallel_group()
    for layer in model.decoder.layers:
        weight = layer.mlp.linear_fc1.weight.data
        shards = [torch.empty_like(weight) for _ in range(group.size())]
        dist.all_gather(shards, weight, group=group)
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        weight.copy_(torch.cat((*gates, *ups)).chunk(group.size())[group.rank()])


def forget_sequence_parallel(marker):
    """Replicated parameters whose gradient is not summed over the sequence-parallel ranks."""

    def plant(patch, model, wrapped):
        for name, parameter in model.named_parameters():
            if marker in name:
                parameter.sequence_parallel = False

    return plant


def head_norms_not_summed(patch, model, wrapped):
    """Norms of queries and keys see one rank's heads only."""
    model.config.qk_layernorm = False


def tokens_counted_after_the_split(patch, model, wrapped):
    """Every sequence-parallel rank counts its own tokens: all gradients come out tp times too large."""
    count = step.token_loss

    def own_tokens(velocity, target, config):
        loss = count(velocity, target, config)
        return step.TokenLoss(loss.loss_sum, loss.num_tokens // config.tensor_model_parallel_size, loss.sums)

    patch.setattr(step, "token_loss", own_tokens)


def tokens_of_one_copy_not_counted(patch, model, wrapped):
    """The last copy of the model adds its gradient and not its tokens."""
    count = step.token_loss

    def uncounted(velocity, target, config):
        loss = count(velocity, target, config)
        last = parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1
        return step.TokenLoss(loss.loss_sum, loss.num_tokens * (not last), loss.sums)

    patch.setattr(step, "token_loss", uncounted)


def mean_of_means(patch, model, wrapped):
    """Each micro-batch its own mean, then their mean: right until token counts differ."""
    count = step.token_loss

    def mean(velocity, target, config):
        loss = count(velocity, target, config)
        one = torch.ones_like(loss.num_tokens)
        sums = torch.stack((loss.sums[0] / loss.sums[1], torch.ones_like(loss.sums[1])))
        return step.TokenLoss(loss.loss_sum / loss.num_tokens, one, sums)

    patch.setattr(step, "token_loss", mean)


def noise_of_the_rank(patch, model, wrapped):
    """Noise drawn from each rank's own generator, as if it did not belong to the sample."""
    draw = flow.draw_noise
    patch.setattr(flow, "draw_noise", lambda shape, seed, *args: draw(shape, seed + dist.get_rank(), *args))


def averaged_over_ranks(patch, model, wrapped):
    """The mean over ranks, Megatron FSDP's default, of what is divided by the tokens of all ranks already."""
    buffer, ranks = wrapped.param_and_grad_buffer, wrapped.megatron_fsdp_dist_index.get_dp_group().size()
    scale = buffer.scale_gradients
    buffer.scale_gradients = lambda factor: scale(factor / ranks)


def duplicates_in_the_norm(patch, model, wrapped):
    """Every tensor rank adds the replicated parameters to the norm that clips."""
    patch.setattr(tensor_parallel, "param_is_not_tensor_parallel_duplicate", lambda parameter: True)


def norm_of_own_shards(patch, model, wrapped):
    """Each rank clips by the norm of what it holds."""
    alone = parallel_state.get_pipeline_model_parallel_group()  # of one rank
    patch.setattr(
        megatron_optimizer,
        "get_grad_norm_fp32",
        lambda gradients, grad_stats_parallel_group: get_grad_norm_fp32(
            gradients, grad_stats_parallel_group=alone
        ),
    )


def not_gathered_after_the_step(patch, model, wrapped):
    """Ranks go on with their own new shards and the others' old ones."""
    wrapped.start_param_sync = lambda *_, **__: None


def gathered_once(patch, model, wrapped):
    """Megatron FSDP takes weights gathered before the optimiser's step for those after it."""
    wrapped.module.all_gather_pipeline.reset = lambda: None


DP, TP_SP, CP = Layout(sharding="none"), Layout(tensor=2, sharding="none"), Layout(context=2, sharding="none")
TP, ZERO, FSDP = (
    Layout(tensor=2, sequence=False, sharding="none"),
    Layout(sharding="optimizer"),
    Layout(sharding="full"),
)


def _row(layout, plant, batches="clips", size=tiny.SIZE):
    return Row(ranks=2, layout=layout, plant=plant, batches=batches, size=size)


BUGS = {  # name: (where it hides, what shows it first)
    "keys and values keep one rank's gradient": (_row(CP, keys_values_without_reduce_scatter), "gradients"),
    "text split over context ranks": (_row(CP, text_split_over_context_ranks), "loss"),
    "SwiGLU cut in two halves": (_row(TP_SP, contiguous_swiglu_shards), "loss"),
    "norm weights not summed over sequence ranks": (
        _row(TP_SP, forget_sequence_parallel("layernorm")),
        "gradients",
    ),
    "modulation not summed over sequence ranks": (
        _row(TP_SP, forget_sequence_parallel("modulation")),
        "gradients",
    ),
    "positions not summed over sequence ranks": (
        _row(TP_SP, forget_sequence_parallel("positions")),
        "gradients",
    ),
    "biases not summed over sequence ranks": (
        _row(TP_SP, forget_sequence_parallel("linear_proj.bias"), size=tiny.DIT_SIZE),
        "gradients",
    ),
    "head norms not summed over heads": (_row(TP, head_norms_not_summed), "gradients"),
    "gradients tp times too large": (_row(TP_SP, tokens_counted_after_the_split), "gradients"),
    "tokens of one copy not counted": (_row(DP, tokens_of_one_copy_not_counted, "uneven"), "gradients"),
    "mean of the copies' means": (_row(DP, mean_of_means, "uneven"), "loss"),
    "every context rank its own noise": (_row(CP, noise_of_the_rank), "loss"),
    "FSDP averages gradients": (_row(FSDP, averaged_over_ranks), "gradients"),
    "duplicates counted in the norm": (_row(TP_SP, duplicates_in_the_norm), "norm"),
    "norm not summed over tensor ranks": (_row(TP_SP, norm_of_own_shards), "norm"),
    "norm not summed over shards": (_row(FSDP, norm_of_own_shards), "norm"),
    "optimiser's shards not gathered": (_row(ZERO, not_gathered_after_the_step), "parameters"),
    "FSDP's weights gathered once": (_row(FSDP, gathered_once), "parameters"),
}
