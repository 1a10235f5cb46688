"""Context parallelism: one answer with any recomputation, and its collectives noticed when wrong.

Invariant 1 again, for what is cut by context: fp64, 1e-10, loss, output and every gradient.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from megatron.core import parallel_state
from ranks import run_on_ranks

from nemo_moviegen.layout import CHOICES, Layout
from nemo_moviegen.video import attention
from parallel.layouts import run_step, save_one_rank_weights
from parallel.test_matches_one_rank import assert_same

SIZE = replace(tiny.SIZE, width=48, num_heads=6)  # six heads make unequal groups of two and one
LAYOUTS = {
    "cp2": (Layout(context=2), 2),
    "cp4": (Layout(context=4), 4),
    "tp2+sp x cp2": (Layout(tensor=2, context=2), 4),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    run_on_ranks(save_one_rank_weights, folder, SIZE, world_size=1)
    return folder


@pytest.fixture(scope="module")
def reference(weights):
    return run_on_ranks(run_step, Layout(), weights, tiny.batch(), 4, SIZE, world_size=1)[0]


@pytest.mark.parametrize("recompute", CHOICES["recompute"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_output_and_every_gradient_equal_one_rank(name, recompute, weights, reference):
    layout, num_ranks = LAYOUTS[name]
    layout = replace(layout, recompute=recompute)
    for result in run_on_ranks(run_step, layout, weights, tiny.batch(), 4, SIZE, world_size=num_ranks):
        assert_same(result, reference)


@pytest.mark.parametrize("recompute", CHOICES["recompute"])
def test_recomputing_on_one_rank_changes_nothing(recompute, weights, reference):
    layout = Layout(recompute=recompute)
    assert_same(run_on_ranks(run_step, layout, weights, tiny.batch(), 4, SIZE, world_size=1)[0], reference)


def own_gradient_alone(_):
    """No reduce-scatter: each rank keeps what its own queries send its keys and values."""

    def keep_own(whole):
        group = parallel_state.get_context_parallel_group()
        return SimpleNamespace(wait=lambda: whole.chunk(group.size())[group.rank()])

    attention.start_sum_to_owners = keep_own


def ranks_in_reverse(_):
    """Keys and values in the order of the ranks reversed: attention does not care, their gradient does."""
    start = attention.start_gather_tokens

    def reversed_gather(own, into=None):
        under_way, size = start(own, into), parallel_state.get_context_parallel_world_size()
        return SimpleNamespace(wait=lambda: torch.cat(under_way.wait().chunk(size)[::-1]))

    attention.start_gather_tokens = reversed_gather


def values_of_another_rank(_):
    """Each rank's keys with the values of its neighbour."""
    start = attention.start_gather_tokens

    def shifted(own, into=None):
        under_way = start(own, into)

        def wait():
            keys, values = under_way.wait().chunk(2, -1)
            return torch.cat((keys, values.roll(own.shape[0], 0)), -1)

        return SimpleNamespace(wait=wait)

    attention.start_gather_tokens = shifted


def other_heads_in_the_backward_pass(_):
    """The second gather brings the keys and values of the wrong heads."""
    start = attention.start_gather_tokens
    attention.start_gather_tokens = lambda own, into=None: start(
        own if into is None else own.roll(1, dims=2), into
    )


BUGS = {  # what is planted, layout.recompute, whether the loss shows it
    "reduce-scatter left out": (own_gradient_alone, "none", False),
    "reduce-scatter left out, gathered again": (own_gradient_alone, "selective", False),
    "wrong order of the ranks": (ranks_in_reverse, "none", False),
    "values of another rank": (values_of_another_rank, "none", True),
    "gathered again: wrong heads": (other_heads_in_the_backward_pass, "selective", False),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name, weights, reference):
    plant, recompute, seen_in_loss = BUGS[name]
    layout = Layout(context=2, recompute=recompute)
    step = partial(run_step, plant=plant)
    result = run_on_ranks(step, layout, weights, tiny.batch(), 4, SIZE, world_size=2)[0]
    with pytest.raises(AssertionError):
        assert_same(result, reference)
    assert (abs(result[0] - reference[0]) > 1e-10) == seen_in_loss
