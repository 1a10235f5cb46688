"""Real bugs of other training stacks, planted one by one into a rank: the parity test must notice each.

Each entry: what it does to the model of a forked rank, the layout it hides in, and whether the loss shows it.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_moviegen import flow
from nemo_moviegen.recipe import Layout
from nemo_moviegen.training import step
from nemo_moviegen.video import attention


def keys_values_without_reduce_scatter(_):
    """Each context rank keeps only its own queries' gradient of keys and values."""

    def keep_own(whole):
        group = parallel_state.get_context_parallel_group()
        return SimpleNamespace(wait=lambda: whole.chunk(group.size())[group.rank()])

    attention.start_sum_to_owners = keep_own


def text_split_over_context_ranks(model):
    """Each context rank attends to its own part of the text only."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    forward = attention.LocalAttention.forward

    def split(self, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None:
            key, value = key.chunk(size)[rank], value.chunk(size)[rank]
            attention_mask = attention_mask.chunk(size, dim=1)[rank]
        return forward(self, query, key, value, attention_mask, **kwargs)

    attention.LocalAttention.forward = split


def contiguous_swiglu_shards(model):
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

    def plant(model):
        for name, parameter in model.named_parameters():
            if marker in name:
                parameter.sequence_parallel = False

    return plant


def head_norms_not_summed(model):
    """Norms of queries and keys see one rank's heads only."""
    model.config.qk_layernorm = False


def tokens_counted_after_the_split(_):
    """Every sequence-parallel rank counts its own tokens: all gradients come out tp times too large."""
    count = step.token_loss

    def own_tokens(velocity, target, config):
        loss = count(velocity, target, config)
        return step.TokenLoss(loss.loss_sum, loss.num_tokens // config.tensor_model_parallel_size, loss.sums)

    step.token_loss = own_tokens


def noise_of_the_rank(_):
    """Noise drawn from each rank's own generator, as if it did not belong to the sample."""
    draw = flow.draw_noise
    flow.draw_noise = lambda shape, seed, *args: draw(shape, seed + dist.get_rank(), *args)


TP_SP = Layout(tensor=2)
CP = Layout(context=2)
BUGS = {
    "keys and values keep one rank's gradient": (keys_values_without_reduce_scatter, CP, 2, False),
    "text split over context ranks": (text_split_over_context_ranks, CP, 2, True),
    "SwiGLU cut in two halves": (contiguous_swiglu_shards, TP_SP, 2, True),
    "norm weights not summed over sequence ranks": (forget_sequence_parallel("layernorm"), TP_SP, 2, False),
    "modulation not summed over sequence ranks": (forget_sequence_parallel("modulation"), TP_SP, 2, False),
    "positions not summed over sequence ranks": (forget_sequence_parallel("positions"), TP_SP, 2, False),
    "head norms not summed over heads": (head_norms_not_summed, Layout(tensor=2, sequence=False), 2, False),
    "gradients tp times too large": (tokens_counted_after_the_split, TP_SP, 2, False),
    "every context rank its own noise": (noise_of_the_rank, CP, 2, True),
}
