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


def gather_keys_values(key_SBNH, value_SBNH):
    """Keys and values of all cp ranks from [S/cp, B, N/tp, H], in one collective.

    The backward pass sums the gradients that all ranks' queries send and leaves each rank its own tokens'
    (s3.1.6: all-gather forward, reduce-scatter backward).
    """
    group = parallel_state.get_context_parallel_group()
    width = key_SBNH.shape[-1]
    both = tensor_parallel.gather_from_sequence_parallel_region(
        torch.cat((key_SBNH, value_SBNH), dim=-1), tensor_parallel_output_grad=True, group=group
    )
    return both[..., :width], both[..., width:]


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
