"""Who holds which tokens: the only file of the backbone that splits, gathers, or marks gradients to reduce.

A clip of S tokens is cut into context-parallel (cp) pieces, each of those into sequence-parallel (sp) pieces:

    tokens   0 ............................................ S-1
    cp rank  |          0           |          1           |
    tp rank  |    0     |    1      |    0     |    1      |      with sequence parallelism
             |        0 and 1       |        0 and 1       |      without

A pack (clips one after the other as one sequence) is cut clip by clip, so that each cp rank has as many
queries of a long clip as any other: attention costs a clip the square of its length. See `Pack`.

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

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(kw_only=True)
class Pack(PackedSeqParams):
    """Where the clips of a packed sequence lie. Megatron hands it to the layers and to Transformer Engine.

        clip order    | clip 0 ............ | clip 1 .... |
        rank order    | first halves of 0, 1 | second halves of 0, 1 |      with two cp ranks
                      |      cp rank 0       |       cp rank 1       |

    The fields of megatron's class say the same of whole clips in the "thd" format. Build it with `pack_of`.
    """

    lengths: tuple[int, ...]
    """Tokens of each clip."""
    context_lengths: tuple[int, ...]
    """Of them, those of this context rank."""
    own_lengths: tuple[int, ...]
    """Of those, the ones sequence parallelism leaves this rank; 0 for clips it has nothing of."""
    rank_order: torch.Tensor | None
    """int64 [S]: clip-order numbers of the tokens in rank order; None for one context rank: no difference."""
    clip_order: torch.Tensor | None
    """Its inverse."""

    def by_rank(self, tokens_SX):
        """Tokens in rank order from all tokens in clip order."""
        return tokens_SX if self.rank_order is None else tokens_SX.index_select(0, self.rank_order)

    def by_clip(self, tokens_SX, into=None):
        """Tokens in clip order from all tokens in rank order; written to `into` where given."""
        if self.clip_order is None:
            return tokens_SX
        return torch.index_select(tokens_SX, 0, self.clip_order, out=into)


def pack_of(lengths, config, device="cpu") -> Pack:
    """The `Pack` of clips with so many tokens each, on this rank, its tensors on `device`.

    ValueError where a clip does not divide over the context ranks, or what is left over the sequence ranks.
    """
    pieces, index = _pieces(config)
    context = config.context_parallel_size
    for length in lengths:
        if length % context:
            raise ValueError(
                f"a clip of {length} tokens in a pack does not split over context parallel {context}: "
                f"use buckets whose tokens divide by {context}"
            )
    context_lengths = tuple(length // context for length in lengths)
    _check_split(sum(lengths), pieces, context)
    own = sum(lengths) // pieces
    first = index % (pieces // context) * own
    ends = (0, *accumulate(context_lengths))
    rank_order = clip_order = None
    if context > 1:
        cut = torch.arange(sum(lengths)).split([length for length in context_lengths for _ in range(context)])
        rank_order = torch.cat([part for rank in range(context) for part in cut[rank::context]])
        rank_order, clip_order = rank_order.to(device), rank_order.argsort().to(device)
    starts = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)
    padded = starts if context > 1 else None  # Transformer Engine asks for it there, and nowhere else
    return Pack(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=tuple(lengths),
        context_lengths=context_lengths,
        own_lengths=tuple(max(0, min(end, first + own) - max(start, first)) for start, end in pairwise(ends)),
        rank_order=rank_order,
        clip_order=clip_order,
    )


def split_tokens(tokens_SBX, config, pack=None):
    """The tokens of this rank, [S/cp/sp, B, X]; ValueError if S does not divide.

    With a `Pack`, tokens of all its clips in clip order. Without one, moves no data.
    """
    pieces, index = _pieces(config)
    _check_split(tokens_SBX.shape[0], pieces, config.context_parallel_size)
    if pack is not None:
        tokens_SBX = pack.by_rank(tokens_SBX)
    length = tokens_SBX.shape[0] // pieces
    return tokens_SBX[index * length : (index + 1) * length]


def gather_tokens(tokens_SBX, config, pack=None):
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
        return tokens_SBX if pack is None else pack.by_clip(tokens_SBX)


class UnderWay(NamedTuple):
    """A collective that was started. `wait` returns its result; on a GPU only the stream waits."""

    result: torch.Tensor
    work: torch.distributed.Work
    source: torch.Tensor  # must outlive the collective, which reads it

    def wait(self):
        self.work.wait()
        return self.result


def start_gather_tokens(own_SX, into=None) -> UnderWay:
    """Start to collect the tokens of all cp ranks, in the order of the ranks: [S/cp, ...] -> [S, ...].

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


def _check_split(num_tokens, pieces, context):
    if num_tokens % pieces:
        raise ValueError(
            f"{num_tokens} tokens do not split over context parallel {context} x "
            f"sequence parallel {pieces // context}: use a bucket whose tokens divide by {pieces}"
        )


def _pieces(config):
    """Into how many pieces a clip is cut, and which one is this rank's."""
    pieces, index = config.context_parallel_size, parallel_state.get_context_parallel_rank()
    if config.sequence_parallel:
        pieces *= config.tensor_model_parallel_size
        index = index * config.tensor_model_parallel_size + parallel_state.get_tensor_model_parallel_rank()
    return pieces, index
