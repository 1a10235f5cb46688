"""Who holds which tokens: the only file of the backbone that splits, gathers, or marks gradients to reduce.

A clip of S tokens is cut into context-parallel (cp) pieces, each of those into sequence-parallel (sp) pieces:

    tokens   0 ............................................ S-1
    cp rank  |          0           |          1           |
    tp rank  |    0     |    1      |    0     |    1      |      with sequence parallelism
             |        0 and 1       |        0 and 1       |      without

What happens to the gradient of each group of parameters (p: reduced by Megatron after the backward pass):

    parameters                           held by tp        reduced over tp            over cp and dp
    ------------------------------------ ----------------- -------------------------- --------------
    q, k, v, projections, FFN            sharded           -                          p: summed
    norms, modulation, positions,        replicated        p: summed with sp          p: summed
      patch and time embedding, head                       - (equal on tp) without
    norms of queries and keys            replicated        p: summed (heads differ)   p: summed
    context projections                  replicated        in the backward pass of    p: summed
                                                           the sharded k, v linear

The loss is a sum over the tokens a rank holds and is divided once, by the number of tokens of all cp and dp
ranks. Text keys and values stay whole on every cp rank: odd lengths need no padding, and nothing travels
(s3.1.6).
"""

from typing import NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel


def split_tokens(tokens_SBX, config):
    """The tokens of this rank, [S/cp/sp, B, X]; ValueError if S does not divide. Moves no data."""
    pieces, index = _pieces(config)
    num_tokens = tokens_SBX.shape[0]
    if num_tokens % pieces:
        raise ValueError(
            f"{num_tokens} tokens do not split over context parallel {config.context_parallel_size} x "
            f"sequence parallel {pieces // config.context_parallel_size}: "
            f"use a bucket whose tokens divide by {pieces}"
        )
    length = num_tokens // pieces
    return tokens_SBX[index * length : (index + 1) * length]


def gather_tokens(tokens_SBX, config):
    """All S tokens on every rank from [S/cp/sp, B, X], for sampling: carries no gradient."""
    with torch.no_grad():
        if config.sequence_parallel:
            tokens_SBX = tensor_parallel.gather_from_sequence_parallel_region(
                tokens_SBX, tensor_parallel_output_grad=False
            )
        if config.context_parallel_size > 1:
            tokens_SBX = tensor_parallel.gather_from_sequence_parallel_region(
                tokens_SBX,
                tensor_parallel_output_grad=False,
                group=parallel_state.get_context_parallel_group(),
            )
    return tokens_SBX


class UnderWay(NamedTuple):
    """A collective that was started. `wait` returns its result; on a GPU only the stream waits."""

    result: torch.Tensor
    work: torch.distributed.Work
    source: torch.Tensor  # must outlive the collective, which reads it

    def wait(self):
        self.work.wait()
        return self.result


def start_gather_tokens(own_SX, into=None) -> UnderWay:
    """Start to collect the tokens of all cp ranks, in the order of the clip: [S/cp, ...] -> [S, ...].

    `into` is a buffer of an earlier gather to fill again. Every rank must start its collectives in one order.
    """
    group = parallel_state.get_context_parallel_group()
    own_SX = own_SX.contiguous()
    if into is None:
        into = own_SX.new_empty((group.size() * own_SX.shape[0], *own_SX.shape[1:]))
    work = torch.distributed.all_gather_into_tensor(into, own_SX, group=group, async_op=True)
    return UnderWay(into, work, own_SX)


def start_sum_to_owners(whole_SX) -> UnderWay:
    """Start to sum over all cp ranks and leave each its own tokens: [S, ...] -> [S/cp, ...].

    What the gradient of `start_gather_tokens` needs: every rank's queries send one to every token's key and
    value (s3.1.6: all-gather forward, reduce-scatter backward).
    """
    group = parallel_state.get_context_parallel_group()
    whole_SX = whole_SX.contiguous()
    own = whole_SX.new_empty((whole_SX.shape[0] // group.size(), *whole_SX.shape[1:]))
    work = torch.distributed.reduce_scatter_tensor(own, whole_SX, group=group, async_op=True)
    return UnderWay(own, work, whole_SX)


def sum_gradient_over_sequence_ranks(parameters, config):
    """Mark replicated parameters that act on own tokens: under sp each rank has a part of their gradient."""
    for parameter in parameters:
        parameter.sequence_parallel = config.sequence_parallel


def sum_over_token_ranks(tensor, config):
    """Sum, in place, over all ranks that hold different tokens of the global batch: sp, cp and dp."""
    torch.distributed.all_reduce(
        tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    if config.sequence_parallel:
        torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def _pieces(config):
    """Into how many pieces a clip is cut, and which one is this rank's."""
    pieces, index = config.context_parallel_size, parallel_state.get_context_parallel_rank()
    if config.sequence_parallel:
        pieces *= config.tensor_model_parallel_size
        index = index * config.tensor_model_parallel_size + parallel_state.get_tensor_model_parallel_rank()
    return pieces, index
