"""Steps with a NaN or a spike on gloo ranks: skipped by all, as if the optimiser step did not exist."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.recipe import Layout
from nemo_moviegen.spikes import Guard
from parallel.guarded import guarded, keep_end, keep_start, to_the_start
from parallel.runs import recipe, train_on_ranks, write_latents

GUARD = Guard(check_every=1, window=4, min_steps=2, rollback_after=2, max_rollbacks=1)
DP = Layout(sharding="none")


@pytest.fixture(scope="module", autouse=True)
def nemo():
    """Imported once, before the ranks fork."""
    import nemo.lightning

    import nemo_moviegen.training.module  # noqa: F401

    return nemo.lightning


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return folder


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
    [(Layout(), "fp32"), (Layout(tensor=2, sharding="none"), "fp64")],
    ids=["dp2 optimizer", "tp2+sp"],
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


def test_several_bad_steps_in_a_row_roll_back_once_and_training_goes_on(tmp_path, latents):
    """The last checkpoint's weights, and the learning rate, the step and the data of the step itself."""
    run = recipe(tmp_path / "run", latents, layout=DP, guard=GUARD)
    bad = scale_latents({3: math.nan, 4: math.nan})
    train_on_ranks(run, 2, before=guarded(bad, keep_start, rollback=to_the_start(run.output)))
    skipped = lines(run, "skipped.jsonl")
    assert [line["step"] for line in skipped] == [3, 4, 4]
    assert skipped[2] == {"step": 4, "rolled_back_to": "start"}
    assert Path(run.output, "rollbacks0").read_text() == Path(run.output, "rollbacks1").read_text() == "4 "
    fresh = replace(run, output=str(tmp_path / "fresh"))
    train_on_ranks(fresh, 2, before=guarded(leave_out_the_optimiser(1, 2, 3, 4)))
    assert losses(run)[4] == losses(fresh)[4]
    assert len(losses(run)) == 6 and math.isfinite(losses(run)[5])
    assert [line["train/learning_rate"] for line in lines(run, "metrics.jsonl")] == [1.5e-3] + 5 * [3e-3]


def test_a_run_that_no_rollback_helps_ends_and_says_what_was_bad(tmp_path, latents):
    run = recipe(tmp_path, latents, layout=DP, guard=GUARD)
    bad = scale_latents(dict.fromkeys((3, 4, 5, 6), math.nan))
    with pytest.raises(AssertionError, match=r"up to step 6 .*its loss is nan; 1 rollbacks .* did not help"):
        train_on_ranks(run, 2, before=guarded(bad, keep_start, rollback=to_the_start(run.output)))
    assert [line["step"] for line in lines(run, "skipped.jsonl")] == [3, 4, 4, 5, 6]


def test_a_run_without_a_checkpoint_to_go_back_to_ends_and_says_so(tmp_path, latents):
    run = recipe(tmp_path, latents, layout=DP, guard=GUARD)
    bad = scale_latents({1: math.nan, 2: math.nan})
    with pytest.raises(AssertionError, match=r"2 steps in a row up to step 2 .* there is no checkpoint yet"):
        train_on_ranks(run, 2, before=guarded(bad))


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

        apply = ChainedOptimizer.step_with_ready_grads
        ChainedOptimizer.step_with_ready_grads = lambda self: (
            None if trainer.global_step + 1 in steps else apply(self)
        )

    return plant
