"""Invariant 1: loss, output and every gradient of any layout equal the one-rank run, in fp64 to 1e-10.

`BUGS` are planted one by one, and the comparison must notice each: forward-only equality would miss most.
"""

from functools import partial

import pytest
import tiny
from ranks import run_on_ranks

from nemo_moviegen.recipe import Layout
from parallel import bugs
from parallel.layouts import run_step, save_one_rank_weights

TOLERANCE = 1e-10  # fp64 leaves thirteen digits between rounding and a bug

LAYOUTS = {
    "tp2": (Layout(tensor=2, sequence=False), 2),
    "tp2+sp": (Layout(tensor=2), 2),
    "cp2": (Layout(context=2), 2),
    "dp2 distributed optimiser": (Layout(), 2),
    "dp2 plain": (Layout(sharding="none"), 2),
    "tp2+sp x cp2": (Layout(tensor=2, context=2), 4),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    run_on_ranks(save_one_rank_weights, folder, world_size=1)
    return folder


@pytest.fixture(scope="module")
def reference(weights):
    return run_on_ranks(run_step, Layout(), weights, tiny.batch(), 4, world_size=1)[0]


def assert_same(result, reference):
    loss, velocity, gradients = result
    true_loss, true_velocity, true_gradients = reference
    assert abs(loss - true_loss) < TOLERANCE
    assert (velocity - true_velocity).abs().max() < TOLERANCE
    assert gradients.keys() == true_gradients.keys()
    errors = {
        name: float((gradients[name] - truth).abs().max() / truth.abs().max())
        for name, truth in true_gradients.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, f"relative gradient errors {wrong}"


def test_the_reference_has_no_zero_gradient_that_could_hide_a_bug(reference):
    _, velocity, gradients = reference
    assert velocity.abs().max() > 0.1
    assert not [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-6]


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_output_and_every_gradient_equal_one_rank(name, weights, reference):
    layout, num_ranks = LAYOUTS[name]
    micro_batch = 4 // layout.data_parallel(num_ranks)
    for result in run_on_ranks(run_step, layout, weights, tiny.batch(), micro_batch, world_size=num_ranks):
        assert_same(result, reference)


def test_four_micro_batches_of_one_equal_one_of_four(weights, reference):
    assert_same(run_on_ranks(run_step, Layout(), weights, tiny.batch(), 1, world_size=1)[0], reference)


@pytest.mark.parametrize(
    "layout, num_ranks", [(Layout(), 1), (Layout(tensor=2), 2)], ids=["one rank", "tp2+sp"]
)
def test_recomputing_the_layers_changes_nothing(layout, num_ranks, weights, reference):
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for result in run_on_ranks(
        partial(run_step, **recompute), layout, weights, tiny.batch(), 4, world_size=num_ranks
    ):
        assert_same(result, reference)


@pytest.mark.parametrize("name", bugs.BUGS)
def test_a_planted_bug_is_noticed(name, weights, reference):
    plant, layout, num_ranks, seen_in_loss = bugs.BUGS[name]
    micro_batch = 4 // layout.data_parallel(num_ranks)
    result = run_on_ranks(
        partial(run_step, plant=plant), layout, weights, tiny.batch(), micro_batch, world_size=num_ranks
    )[0]
    with pytest.raises(AssertionError):
        assert_same(result, reference)
    assert (abs(result[0] - reference[0]) > TOLERANCE) == seen_in_loss
