"""Packs: clips of any shapes as one sequence train as the same clips in micro-batches of their own.

Two optimiser steps in fp64 to 1e-10 against one rank that takes the clips one by one: loss, velocity of every
clip, every gradient, the norm and the parameters. matrix.py has the layouts; here they recompute, and `BUGS`
are planted one by one.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.nn.functional
from megatron.core import parallel_state

from nemo_moviegen.layout import Layout
from nemo_moviegen.training import step
from nemo_moviegen.video import attention, layer, model, parallel
from nemo_moviegen.video.embeddings import FactorizedPositions
from parallel.matrix import MIXED_SHAPES, Row, first_wrong, largest_errors

ALONE, TP_SP, CP2, TP_SP_CP = Layout(), Layout(tensor=2), Layout(context=2), Layout(tensor=2, context=2)


def _row(ranks, layout, batches="a pack", plant=None, **changes):
    layout = replace(layout, **{"sharding": "none", **changes})
    return Row(ranks=ranks, layout=layout, batches=batches, reference="mixed", plant=plant)


ROWS = {
    f"{name}, recompute {recompute}": _row(ranks, layout, recompute=recompute)
    for name, ranks, layout in (("one rank", 1, ALONE), ("cp2", 2, CP2), ("tp2+sp", 2, TP_SP))
    for recompute in ("selective", "full")
}
ROWS["tp2+sp x cp2, recompute selective"] = _row(4, TP_SP_CP, recompute="selective", sharding="full")
ROWS["one rank, two packs"] = _row(1, ALONE, "two packs")


def a_kernel_that_knows_megatrons_fields_alone(patch, built, wrapped):
    """No bug: what Transformer Engine is told, and where it expects a clip's tokens, are enough to attend by.

    Its own kernels run on GPUs only.
    """
    forward = attention.LocalAttention.forward

    def from_fields(self, query, key, value, attention_mask, packed_seq_params, **kwargs):
        if attention_mask is not None:  # text
            return forward(self, query, key, value, attention_mask, packed_seq_params, **kwargs)
        assert packed_seq_params.qkv_format == "thd" and query.dim() == key.dim() == value.dim() == 3
        ranks, group = self.config.context_parallel_size, parallel_state.get_context_parallel_group()
        cuts = (packed_seq_params.cu_seqlens_kv // ranks).tolist()
        pairs = torch.distributed.nn.functional.all_gather(torch.stack((key, value)), group=group)
        outs = []
        for start, stop in pairwise(cuts):  # every rank has its share of every clip
            keys, values = torch.cat([pair[:, start:stop] for pair in pairs], dim=1)
            scores = torch.einsum("snh,tnh->nst", query[start:stop], keys) * query.shape[-1] ** -0.5
            outs.append(torch.einsum("nst,tnh->snh", scores.softmax(dim=-1), values))
        return torch.cat(outs).flatten(1)

    patch.setattr(attention.LocalAttention, "forward", from_fields)


ROWS |= {
    "one rank, a thd kernel": _row(1, ALONE, plant=a_kernel_that_knows_megatrons_fields_alone),
    "cp2, a thd kernel": _row(2, CP2, plant=a_kernel_that_knows_megatrons_fields_alone),
}


@pytest.fixture(scope="module")
def found():
    import nemo_moviegen.training.module  # noqa: F401  once, before the ranks fork

    return largest_errors(ROWS | {name: row for name, (row, _) in BUGS.items()})


@pytest.mark.parametrize("name", ROWS)
def test_two_steps_with_packs_equal_those_of_the_clips_one_by_one(name, found):
    assert not first_wrong(found[name])


def attention_over_the_whole_pack(patch, built, wrapped):
    """One kernel call: every clip sees every other."""
    patch.setattr(attention, "_attend_within", lambda query, key, value, pack: [_attend(query, key, value)])


def one_time_for_all(patch, built, wrapped):
    """The modulation of the first clip for all."""
    unpack = layer.unpack_conditioning

    def first(conditioning):
        modulation_6BD, text_LBD = unpack(conditioning)
        return modulation_6BD[:, :1].expand_as(modulation_6BD), text_LBD

    patch.setattr(layer, "unpack_conditioning", first)


def prompt_of_the_neighbour(patch, built, wrapped):
    attend = attention._attend_text
    patch.setattr(
        attention,
        "_attend_text",
        lambda query, key, value, mask, pack: attend(
            query, *(x.roll(1, dims=1) for x in (key, value)), mask.roll(1, dims=0), pack
        ),
    )


def positions_that_run_on(patch, built, wrapped):
    """Frames are counted through the pack and not from each clip's first."""
    indices, before = FactorizedPositions.token_indices, []

    def run_on(self, latent_shape):
        indices_S3 = indices(self, latent_shape)
        frames = sum(before) % 4
        before.append(latent_shape[0])
        if len(before) == len(MIXED_SHAPES):
            before.clear()
        return (indices_S3 + torch.tensor([frames, 0, 0])) % 4

    patch.setattr(FactorizedPositions, "token_indices", run_on)


def mean_over_clips(patch, built, wrapped):
    """Every clip weighs the same, however many tokens it has."""
    errors_of = step.token_errors

    def weighed(velocity, target, config):
        errors = errors_of(velocity, target, config)
        lengths = [config.size.num_tokens(shape) for shape in model.latent_shapes(target)]
        mean = len(errors) / len(lengths)
        return torch.cat([e * mean / len(e) for e in errors.split(lengths)])

    patch.setattr(step, "token_errors", weighed)


def vectors_of_the_first_sequence_rank(patch, built, wrapped):
    """Where clips begin and end in the first piece of the sequence, on all ranks."""
    build = model.pack_of

    def first_piece(lengths, config, device="cpu"):
        pack = build(lengths, config, device)
        own, left = [], sum(pack.own_lengths)
        for length in pack.context_lengths:
            own.append(min(length, left))
            left -= own[-1]
        return replace(pack, own_lengths=tuple(own))

    patch.setattr(model, "pack_of", first_piece)


def gradient_of_own_queries_alone(patch, built, wrapped):
    """Keys and values keep what the queries of their own context rank send them."""

    def keep_own(whole):
        group = parallel_state.get_context_parallel_group()
        return SimpleNamespace(wait=lambda: whole.chunk(group.size())[group.rank()])

    patch.setattr(attention, "start_sum_to_owners", keep_own)


def gathered_in_rank_order(patch, built, wrapped):
    """Keys and values as they arrive, taken for whole clips one after the other."""
    patch.setattr(attention, "_arrived", lambda under_way, buffer, pack: under_way.wait())


def gathered_again_in_rank_order(patch, built, wrapped):
    arrived = attention._arrived

    def second_as_it_came(under_way, buffer, pack):
        return arrived(under_way, buffer, pack) if buffer is None else buffer.copy_(under_way.wait())

    patch.setattr(attention, "_arrived", second_as_it_came)


def gradient_in_clip_order(patch, built, wrapped):
    """The gradient of keys and values goes to the context ranks as if each had whole clips."""
    by_rank = parallel.Pack.by_rank
    patch.setattr(parallel.Pack, "by_rank", lambda pack, x: x if x.dim() == 4 else by_rank(pack, x))


_attend = attention._attend
BUGS = {  # name: (where it hides, what shows it first)
    "attention over the whole pack": (_row(1, ALONE, plant=attention_over_the_whole_pack), "loss"),
    "attention over the whole pack, cp2": (_row(2, CP2, plant=attention_over_the_whole_pack), "loss"),
    "one time for all clips": (_row(1, ALONE, plant=one_time_for_all), "loss"),
    "prompt of the neighbour": (_row(1, ALONE, plant=prompt_of_the_neighbour), "loss"),
    "positions run on": (_row(1, ALONE, plant=positions_that_run_on), "loss"),
    "loss averaged over clips": (_row(1, ALONE, plant=mean_over_clips), "loss"),
    "vectors of the first sequence rank": (
        _row(2, TP_SP, plant=vectors_of_the_first_sequence_rank),
        "loss",
    ),
    "key gradient of own queries alone": (_row(2, CP2, plant=gradient_of_own_queries_alone), "gradients"),
    "gathered in rank order": (_row(2, CP2, plant=gathered_in_rank_order), "loss"),
    "gathered again in rank order": (
        _row(2, CP2, plant=gathered_again_in_rank_order, recompute="selective"),
        "gradients",
    ),
    "key gradient in clip order": (_row(2, CP2, plant=gradient_in_clip_order), "gradients"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name, found):
    assert first_wrong(found[name]) == BUGS[name][1]
