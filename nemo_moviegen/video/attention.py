"""Core attention of the local spec: torch's scaled dot product, bidirectional, split over context ranks.

Context parallelism as in s3.1.6: each rank keeps its queries and collects everybody's keys and values; the
backward pass returns to each rank the sum of their gradients. Scores and values are one fused kernel, so
heads make the pipeline: while one group of heads attends, the keys and values of the next travel.

    gather     | 0 | 1 | 2 | 3 |                  sum to owners          | 0 | 1 | 2 | 3 |
    attention      | 0 | 1 | 2 | 3 |              its backward       | 0 | 1 | 2 | 3 |

Heads do not meet inside attention: with any kernel this is the one-rank result, and nothing is merged.

Clips of a pack do not meet either: each is a kernel call of its own, without a mask, over its own tokens and
its own text. So a pack costs what its clips cost, and has their results.
"""

import torch
from megatron.core.transformer.module import MegatronModule

from nemo_moviegen.video.parallel import start_gather_tokens, start_sum_to_owners

HEAD_GROUPS = 4
"""Pieces of the pipeline: 1/4 of the traffic has no attention to hide behind. More pieces hide more and leave
each kernel fewer heads to fill a GPU with (12 a rank in the 30B model at tensor parallel 4)."""


class LocalAttention(MegatronModule):
    """Drop-in for megatron's core attention; takes and returns [S/cp, B, ...] with N/tp heads of width H.

    Of a pack, megatron takes away the batch of one: [S/cp, ...].
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, **_):
        super().__init__(config)
        # Text keys and values are whole on every context rank already.
        self.gathers = attention_type == "self" and config.context_parallel_size > 1
        # Full recomputation keeps them for one layer at a time only: nothing to save.
        self.gathers_again = config.recompute_granularity == "selective"

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **_):
        """`attention_mask` is bool [B, L], True at real keys, or None where all are; `packed_seq_params` the
        `Pack` of the queries, whose B clips each have their text."""
        pack = packed_seq_params
        if pack is not None:
            # text of several clips has a batch still
            query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        if self.gathers:
            out = ContextAttention.apply(query, key, value, self.gathers_again, torch.is_grad_enabled(), pack)
        elif pack is None:
            out = _attend(query, key, value, attention_mask)
        elif attention_mask is None:
            out = torch.cat(_attend_within(query, key, value, pack))
        else:
            out = torch.cat(_attend_text(query, key, value, attention_mask, pack))
        return out.flatten(2)  # [S/cp, B, N/tp * H]


class ContextAttention(torch.autograd.Function):
    """Attention [S/cp, B, N/tp, H] of own queries to the keys and values of all context ranks.

    `gathers_again` frees the collected keys and values, cp times the rank's own, and collects them anew in
    the backward pass, as much behind the kernels as the first time. Of a `pack`, the queries of a clip attend
    to that clip.
    """

    @staticmethod
    def forward(ctx, query, key, value, gathers_again, needs_gradient, pack=None):
        outs, ctx.parts, ctx.pack = [], [], pack
        for own_query, whole in zip(_head_groups(query), _each_gathered(key, value, pack=pack), strict=True):
            # `data`: autograd must not take a buffer that is filled again for one that was overwritten
            leaves = [
                x.requires_grad_(needs_gradient) for x in (own_query.detach(), *whole.data.chunk(2, -1))
            ]
            with torch.set_grad_enabled(needs_gradient):
                # a graph of this part alone, for the kernels' own backward
                of_clips = [_attend(*leaves)] if pack is None else _attend_within(*leaves, pack)
            outs.append(of_clips[0].detach() if pack is None else torch.cat([x.detach() for x in of_clips]))
            if needs_gradient:
                ctx.parts.append((of_clips, leaves, whole))
                if gathers_again:
                    whole.untyped_storage().resize_(0)
        if needs_gradient and gathers_again:
            ctx.save_for_backward(key, value)
        return torch.cat(outs, dim=2)

    @staticmethod
    def backward(ctx, grad_out):
        outs, leaves, buffers = zip(*ctx.parts, strict=True)
        del ctx.parts  # a graph that is kept must not keep these: they serve once
        pack = ctx.pack
        filled = _each_gathered(*ctx.saved_tensors, buffers, pack) if ctx.saved_tensors else buffers
        grad_queries, sums = [], []
        for of_clips, inputs, grad_part, _ in zip(outs, leaves, _head_groups(grad_out), filled, strict=True):
            grad_of_clips = grad_part.split([out.shape[0] for out in of_clips])
            grad_query, *grad_pair = torch.autograd.grad(of_clips, inputs, grad_of_clips)
            grad_queries.append(grad_query)
            grad_whole = torch.cat(grad_pair, dim=-1)
            sums.append(start_sum_to_owners(grad_whole if pack is None else pack.by_rank(grad_whole)))
        grad_keys, grad_values = zip(*(under_way.wait().chunk(2, -1) for under_way in sums), strict=True)
        return *(torch.cat(x, dim=2) for x in (grad_queries, grad_keys, grad_values)), None, None, None


def _attend(query, key, value, attention_mask=None):
    """[S, B, N, H] -> the same shape, by whatever kernel torch has for device and dtype."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, N, S, H]
    mask = None if attention_mask is None else attention_mask[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.permute(2, 0, 1, 3)


def _attend_within(query, key, value, pack):
    """[S_i/cp, 1, N, H] of each clip, whose own queries attend to all its keys, which come in clip order."""
    queries = query.split(pack.context_lengths)
    pairs = zip(*(x.split(pack.lengths) for x in (key, value)), strict=True)
    return [_attend(own_query, *pair) for own_query, pair in zip(queries, pairs, strict=True)]


def _attend_text(query, key, value, attention_mask, pack):
    """[S_i/cp, 1, N, H] of each clip, whose own queries attend to its text: keys [L, clips, N, H]."""
    queries = query.split(pack.context_lengths)
    texts = zip(*(x.split(1, dim=1) for x in (key, value)), attention_mask.split(1), strict=True)
    return [_attend(own_query, *text) for own_query, text in zip(queries, texts, strict=True)]


def _head_groups(x_SBNH):
    return x_SBNH.tensor_split(min(HEAD_GROUPS, x_SBNH.shape[2]), dim=2)


def _each_gathered(key, value, buffers=None, pack=None):
    """Keys beside values of all context ranks, [S, B, N, 2H], one group of heads after the other.

    The next group is under way before one is given. `buffers` are those of an earlier round, to fill again.
    Those of a pack are put into clip order, for which they are copied: a clip's must lie together.
    """
    previous = None
    for index, pair in enumerate(zip(_head_groups(key), _head_groups(value), strict=True)):
        buffer = None
        if buffers is not None:
            buffer = buffers[index]
            buffer.untyped_storage().resize_(buffer.nbytes)
        under_way = start_gather_tokens(torch.cat(pair, dim=-1), buffer if pack is None else None)
        if previous is not None:
            yield _arrived(*previous, pack)
        previous = under_way, buffer
    yield _arrived(*previous, pack)


def _arrived(under_way, buffer, pack):
    gathered = under_way.wait()
    return gathered if pack is None else pack.by_clip(gathered, into=buffer)
