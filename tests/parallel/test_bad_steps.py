"""Steps with a NaN or a spike on gloo ranks: skipped by all, as if the optimiser step did not exist."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.recipe import Layout
from nemo_moviegen.spikes import Guard
from parallel.guarded import guarded, keep_end
from parallel.runs import recipe, train_on_ranks

GUARD = Guard(check_every=1, window=4, min_steps=2, rollback_after=2, max_rollbacks=1)
DP = Layout(sharding="none")


pytestmark = pytest.mark.usefixtures("nemo")


def lines(run, file):
    return [json.loads(line) for line in Path(run.output, file).read_text().splitlines()]


def losses(run):
    return [line["train/loss"] for line in lines(run, "metrics.jsonl")]


def batch_ids(run, step):
    reader = LatentReader(run.data.folder)
    order = BatchOrder(reader.latent_shapes, run.global_batch, run.seed, run.data.image_every)
    return [reader.sample_ids[row] for row in order.batch(step - 1)[0]]


@pytest.mark.parametrize(
    "layout, precision",
    [(Layout(), "fp32"), (Layout(sharding="full"), "fp64"), (Layout(tensor=2, sharding="none"), "fp64")],
    ids=["dp2 optimizer", "dp2 full", "tp2+sp"],
)
def test_a_spike_and_a_nan_of_one_copy_cost_all_ranks_those_steps_and_nothing_else(
    layout, precision, tmp_path, latents
):
    """Weights, moments and step counts to the bit, against a run whose optimiser leaves those steps out."""
    guard = replace(GUARD, rollback_after=3)
    bad = recipe(tmp_path / "bad", latents, layout=layout, precision=precision, guard=guard)
    without = replace(bad, output=str(tmp_path / "without"))
    train_on_ranks(bad, 2, before=guarded(scale_latents({4: 1e4, 5: math.nan}), keep_end))
    train_on_ranks(without, 2, before=guarded(leave_out_the_optimiser(4, 5), keep_end))
    for rank in range(2):
        end, expected = (torch.load(f"{run.output}/end{rank}.pt") for run in (bad, without))
        assert end.keys() == expected.keys() and len(end) > 20
        for name, value in end.items():
            assert torch.equal(value, expected[name]), name
    good = (0, 1, 2, 5)
    assert [losses(bad)[i] for i in good] == [losses(without)[i] for i in good]
    assert all(math.isfinite(losses(bad)[i]) for i in good) and len(losses(bad)) == 6
    spike, nan = lines(bad, "skipped.jsonl")
    assert spike["step"] == 4 and spike["sample_ids"] == batch_ids(bad, 4)
    assert spike["loss"] == losses(bad)[3] and f"loss {spike['loss']:.4g} is a spike" in spike["reason"]
    assert nan["step"] == 5 and nan["sample_ids"] == batch_ids(bad, 5)
    assert nan["reason"] == "loss is nan" and math.isnan(nan["grad_norm"])


def test_several_bad_steps_in_a_row_go_back_to_the_last_checkpoint_and_training_goes_on(tmp_path, latents):
    """Steps 7 and 8 are those of a run that has not learned since the checkpoint of step 3."""
    run = recipe(tmp_path / "run", latents, layout=DP, guard=GUARD, num_steps=8)
    train_on_ranks(run, 2, before=guarded(scale_latents({5: math.nan, 6: math.nan})))
    skipped = lines(run, "skipped.jsonl")
    assert [line["step"] for line in skipped] == [5, 6, 6]
    assert skipped[2] == {"step": 6, "rolled_back_to": "step=3"}
    stood = replace(run, output=str(tmp_path / "stood"))
    train_on_ranks(stood, 2, before=guarded(leave_out_the_optimiser(4, 5, 6)))
    assert losses(run)[6:] == losses(stood)[6:] and all(map(math.isfinite, losses(run)[6:]))
    assert losses(run)[4] != losses(stood)[4]
    assert [line["train/learning_rate"] for line in lines(run, "metrics.jsonl")] == [1.5e-3] + 7 * [3e-3]


def test_a_run_that_no_rollback_helps_ends_and_says_what_was_bad(tmp_path, latents):
    run = recipe(tmp_path, latents, layout=DP, guard=GUARD, save_every=2)
    bad = scale_latents(dict.fromkeys((3, 4, 5, 6), math.nan))
    with pytest.raises(AssertionError, match=r"up to step 6 .*its loss is nan; 1 rollbacks .* did not help"):
        train_on_ranks(run, 2, before=guarded(bad))
    assert [line["step"] for line in lines(run, "skipped.jsonl")] == [3, 4, 4, 5, 6]


def test_a_resumed_run_judges_like_the_uninterrupted_one(tmp_path, latents):
    """The window before the resume makes step 7 a spike; what was skipped past it is told once."""
    guard = Guard(check_every=1, window=8, min_steps=3)
    whole = recipe(tmp_path / "whole", latents, layout=DP, guard=guard, num_steps=8)
    resumed = replace(whole, output=str(tmp_path / "resumed"))
    bad = scale_latents({4: math.nan, 7: 1e4})
    train_on_ranks(whole, 2, before=guarded(bad))
    train_on_ranks(replace(resumed, num_steps=4), 2, before=guarded(bad))
    shutil.rmtree(Path(resumed.output, "checkpoints", "step=4"))  # as if killed before it was whole
    train_on_ranks(resumed, 2, before=guarded(bad))
    told, expected = (Path(run.output, "skipped.jsonl").read_text() for run in (resumed, whole))
    assert told == expected and [line["step"] for line in lines(whole, "skipped.jsonl")] == [4, 7]
    assert losses(resumed)[4:] == losses(whole)[4:]


def scale_latents(factors):
    """Multiply the latents of the last copy's ranks by {step: factor}; the first step is 1."""

    def plant(trainer, data):
        from megatron.core import parallel_state

        from nemo_moviegen.training.module import FlowMatchingModule

        data_step = FlowMatchingModule.data_step

        def scaled(self, dataloader_iter):
            batch = data_step(self, dataloader_iter)
            copies = parallel_state.get_data_parallel_world_size()
            factor = factors.get(trainer.global_step + 1, 1.0)
            if parallel_state.get_data_parallel_rank() == copies - 1:
                batch = replace(batch, latent_BTCHW=batch.latent_BTCHW * factor)
            return batch

        FlowMatchingModule.data_step = scaled

    return plant


def leave_out_the_optimiser(*steps):
    """Of a run without faults: its guard still judges those steps, then nothing applies them."""

    def plant(trainer, data):
        from megatron.core.optimizer import ChainedOptimizer
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        for kind in (ChainedOptimizer, DistributedOptimizer):  # the latter alone with Megatron FSDP
            apply = kind.step_with_ready_grads
            kind.step_with_ready_grads = lambda self, apply=apply: (
                None if trainer.global_step + 1 in steps else apply(self)
            )

    return plant
