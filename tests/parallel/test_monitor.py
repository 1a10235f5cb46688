"""Ranks that drift apart on gloo: the monitor stops all of them and says what, where and when."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen import flow
from nemo_moviegen.recipe import Layout
from nemo_moviegen.spikes import Guard
from nemo_moviegen.training.monitor import Parameter, RankReport, checksum, violations
from parallel.guarded import guarded
from parallel.runs import recipe, train_on_ranks

GUARD = Guard(check_every=2)
NORM, SHARDED = "decoder.final_layernorm.weight", "decoder.layers.1.mlp.linear_fc2.weight"
exact = settings(derandomize=True, deadline=None, max_examples=50)


pytestmark = pytest.mark.usefixtures("nemo")


@exact
@given(st.data(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16)), st.integers(1, 40))
def test_one_flipped_bit_or_two_swapped_elements_change_the_checksum(data, dtype, size):
    generator = torch.Generator().manual_seed(size)
    whole = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    bits = whole.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    flipped = bits.clone()
    flipped[place] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63)).to(bits.dtype)
    assert checksum(flipped.view(dtype)) != checksum(whole)
    other = data.draw(st.integers(0, size - 1))
    swapped = whole.clone()
    swapped[[place, other]] = whole[[other, place]]
    assert (checksum(swapped) == checksum(whole)) == bool(whole[place] == whole[other])


def test_a_checksum_takes_parts_like_the_whole_and_sees_signs(monkeypatch):
    from nemo_moviegen.training import monitor

    tensor = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = checksum(tensor)
    assert checksum(-tensor[:100]) != checksum(tensor[:100])
    monkeypatch.setitem(monitor._CHUNK, "cpu", 7)
    assert checksum(tensor) == whole == checksum(tensor.reshape(1, 101))
    assert checksum(tensor[:0]) == 0  # a rank's piece under FSDP may be empty


def reports(tensor=1, context=1, data=1):
    """Of a healthy step: one parameter everywhere, one tensor ranks share out, one data ranks share out."""
    return [
        RankReport(
            rank=(d * context + c) * tensor + t,
            tensor=t,
            context=c,
            data=d,
            checksums=[7, 100 + t, 200 + 10 * d + c, 300 + t + 10 * d + 20 * c],
            samples=((2 * d, 0), (2 * d + 1, 0)),
            noise=d,
            has_stand_ins=False,
            loss=1.0,
            grad_norm=2.0,
            was_applied=True,
            skipped=0,
        )
        for d in range(data)
        for c in range(context)
        for t in range(tensor)
    ]


PARAMETERS = [
    Parameter(name="everywhere", tensor_pieces=False, data_pieces=False),
    Parameter(name="over tensor", tensor_pieces=True, data_pieces=False),
    Parameter(name="over data", tensor_pieces=False, data_pieces=True),
    Parameter(name="over both", tensor_pieces=True, data_pieces=True),
]


@pytest.mark.parametrize(
    "rank, change, sentence",
    [
        (5, {"checksums": [8, 101, 210, 311]}, "parameter everywhere: rank 5 (tensor 1, context 0, data 1)"),
        (5, {"checksums": [7, 100, 210, 311]}, "parameter over tensor: rank 5 (tensor 1, context 0, data 1)"),
        (5, {"checksums": [7, 101, 211, 311]}, "parameter over data: rank 5 (tensor 1, context 0, data 1)"),
        (5, {"checksums": [7, 101, 210, 0]}, None),
        (3, {"samples": ((0, 0), (1, 1))}, "batch (sample id, epoch): rank 3 (tensor 1, context 1, data 0)"),
        (3, {"noise": 9}, "noise of the batch: rank 3 (tensor 1, context 1, data 0)"),
        (2, {"skipped": 1}, "loss, gradient norm, steps skipped: rank 2 (tensor 0, context 1, data 0)"),
        (2, {"loss": math.nan}, "loss, gradient norm, steps skipped: rank 2 (tensor 0, context 1, data 0)"),
    ],
)
def test_eight_ranks_name_the_one_that_differs_and_where_it_stands(rank, change, sentence):
    healthy = reports(2, 2, 2)
    assert violations(healthy, PARAMETERS) == []
    found = violations([replace(r, **change) if r.rank == rank else r for r in healthy], PARAMETERS)
    if sentence is None:  # nobody else has that piece
        assert found == []
    else:
        (only,) = found
        assert only.startswith(sentence) and "differs from rank" in only


def test_samples_of_two_copies_are_named_unless_a_stand_in_explains_them():
    one, two = reports(data=2)
    twice = [one, replace(two, samples=((0, 0), (3, 0)))]
    (found,) = violations(twice, PARAMETERS)
    assert found.startswith("sample 0 (epoch 0) is in more than one copy's batch: rank 0 (tensor 0")
    assert "and rank 1 (tensor 0, context 0, data 1)" in found
    assert violations([one, replace(two, samples=((0, 1), (3, 0)))], PARAMETERS) == []  # the next epoch's
    assert violations([replace(r, has_stand_ins=True) for r in twice], PARAMETERS) == []
    same = [replace(one, has_stand_ins=True), replace(two, samples=one.samples)]
    assert len(violations(same, PARAMETERS)) == 2


def test_a_gradient_norm_that_is_not_finite_must_not_be_applied():
    bad = [replace(r, grad_norm=math.inf, was_applied=False, skipped=1) for r in reports(data=2)]
    assert violations(bad, PARAMETERS) == []
    found = violations([replace(r, was_applied=True) for r in bad], PARAMETERS)
    assert found[0].startswith("gradient norm inf was applied on rank 0")


@pytest.mark.parametrize(
    "layout, precision, places",
    [
        (Layout(sharding="none"), "fp64", ("tensor 0, context 0, data 1", "tensor 0, context 0, data 0")),
        (Layout(), "fp32", ("tensor 0, context 0, data 1", "tensor 0, context 0, data 0")),
        (
            Layout(tensor=2, sharding="full"),
            "fp64",
            ("tensor 1, context 0, data 0", "tensor 0, context 0, data 0"),
        ),
    ],
    ids=["dp2", "dp2 optimizer", "tp2 full"],
)
def test_one_ulp_in_one_weight_of_one_rank_stops_both(layout, precision, places, tmp_path, latents):
    run = recipe(tmp_path, latents, layout=layout, precision=precision, guard=GUARD)
    for said in stopped(run, 2, nudge(NORM, rank=1, step=4, late=layout.sharding == "optimizer")):
        assert said.startswith("step 4: ranks that must agree do not\n")
        assert f"parameter {NORM}: rank 1 ({places[0]}) differs from rank 0 ({places[1]})\n" in said
        assert said.count("parameter") == 1 and "goes on from its last checkpoint" in said


def test_tensor_ranks_compare_what_they_share_and_copies_compare_each_shard(tmp_path, latents):
    """Four ranks: a replicated weight of tensor rank 1, then a shard that only ranks 1 and 3 hold."""
    run = recipe(tmp_path, latents, layout=Layout(tensor=2, sharding="none"), guard=GUARD, num_steps=2)
    for name, side in ((NORM, "rank 0 (tensor 0, context 0, data 0), rank 1 "), (SHARDED, "rank 1 ")):
        for said in stopped(run, 4, nudge(name, rank=3, step=2)):
            place = re.escape("rank 3 (tensor 1, context 0, data 1) differs from " + side)
            assert re.search(f"parameter {name}: {place}", said), said


@pytest.mark.parametrize(
    "layout, plant, sentence",
    [
        (Layout(context=2, sharding="none"), "noise", "noise of the batch: rank 1 (tensor 0, context 1, "),
        (
            Layout(context=2),
            "noise",
            "noise of the batch: rank 1 (tensor 0, context 1, data 0) differs from ",
        ),
        (Layout(tensor=2, sharding="none"), "batch", "batch (sample id, epoch): rank 1 (tensor 1, context"),
        (Layout(tensor=2), "batch", "batch (sample id, epoch): rank 1 (tensor 1, context 0, data 0) [("),
        (Layout(sharding="none"), "copy", "(epoch 0) is in more than one copy's batch: rank 0 "),
    ],
    ids=["noise cp2", "noise cp2 optimizer", "batch tp2", "batch tp2 optimizer", "one batch for two copies"],
)
def test_ranks_that_take_the_wrong_noise_or_samples_stop(layout, plant, sentence, tmp_path, latents):
    precision = "fp64" if layout.sharding == "none" else "fp32"
    run = recipe(tmp_path, latents, layout=layout, precision=precision, guard=GUARD)
    plants = {
        "noise": noise_of_the_rank,
        "batch": other_samples,
        "copy": batches_of_copy_0,
    }
    for said in stopped(run, 2, plants[plant]):
        assert said.startswith("step 2: ") and sentence in said, said


def stopped(run, num_ranks, plant):
    """What the monitor raised on each rank; fails unless every rank raised."""
    folder = Path(run.output)

    def note_what_is_raised(trainer, data):
        from nemo_moviegen.training import monitor

        compare = monitor.compare

        def noting(*args):
            try:
                compare(*args)
            except RuntimeError as error:
                (folder / f"raised{dist.get_rank()}").write_text(str(error))
                dist.barrier()  # only passes where every rank is here
                raise

        monitor.compare = noting

    with pytest.raises(AssertionError, match="ranks that must agree do not"):
        train_on_ranks(run, num_ranks, before=guarded(note_what_is_raised, plant))
    return [(folder / f"raised{rank}").read_text() for rank in range(num_ranks)]


def nudge(name, rank, step, late=False):
    """One element of a weight of one rank to the next number, after the optimiser's step; or, where weights
    travel late and would heal it, after the forward passes."""

    def plant(trainer, data):
        import lightning.pytorch as pl

        class Nudge(pl.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                self.trainer, self.module = trainer, module

            def on_megatron_reduce_microbatches_end(self, reduced):
                if late and self.trainer.global_step + 1 == step:
                    self.nudge(self.module)

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if not late and trainer.global_step == step:
                    self.nudge(module)

            def nudge(self, module):
                if dist.get_rank() == rank:
                    (weight,) = (p for n, p in module.named_parameters() if n.endswith(name))
                    weight = getattr(weight, "_local_tensor", weight)  # FSDP's piece
                    bits = weight.data.view({8: torch.int64, 4: torch.int32}[weight.element_size()])
                    bits.view(-1)[-1] += 1

        trainer.callbacks.insert(0, Nudge())

    return plant


def noise_of_the_rank(trainer, data):
    draw = flow.draw_noise
    flow.draw_noise = lambda shape, seed, *args: draw(shape, seed + dist.get_rank(), *args)


def other_samples(trainer, data):
    """Of the same shape: where prompts of other lengths come too, megatron's own collectives break first."""
    from nemo_moviegen.training.module import FlowMatchingModule

    data_step = FlowMatchingModule.data_step

    def other(self, dataloader_iter):
        batch = data_step(self, dataloader_iter)
        return replace(batch, sample_ids=batch.sample_ids + dist.get_rank())

    FlowMatchingModule.data_step = other


def batches_of_copy_0(trainer, data):
    from nemo_moviegen.training.data import MicroBatches

    build = MicroBatches.__init__

    def first_copy(self, reader, order, recipe, copy, *args, **kwargs):
        build(self, reader, order, recipe, 0, *args, **kwargs)

    MicroBatches.__init__ = first_copy
