"""Invariant 1: two optimiser steps of any layout equal one rank's, in fp64 to 1e-10.

Loss, velocity, every gradient, the norm that clips and every parameter: see matrix.py for the rows. `BUGS`
are planted one by one, and the comparison must notice each: forward-only equality would miss most.
"""

import functools

import pytest
import torch

from parallel.bugs import BUGS
from parallel.matrix import MEASURES, ROWS, TOLERANCE, first_wrong, largest_errors, reference, weights
from parallel.steps import OPTIM


@pytest.fixture(scope="module", autouse=True)
def nemo():
    """Imported once, before the ranks fork."""
    import nemo_moviegen.training.module
    import nemo_moviegen.training.strategy

    return nemo_moviegen.training


@functools.cache
def found(ranks):
    """(errors of all rows on so many ranks, None), or what stopped them: it fails each row, and runs once."""
    try:
        return largest_errors({key: row for key, row in ROWS.items() if row.ranks == ranks}), None
    except AssertionError as error:
        return None, error


@pytest.fixture(scope="module")
def found_with_bugs():
    return largest_errors({name: row for name, (row, _) in BUGS.items()})


@pytest.mark.parametrize("batches", ["clips", "prompts", "uneven"])
def test_nothing_is_zero_that_could_hide_a_bug(batches):
    truth = reference(batches)
    assert min(velocity.abs().max() for velocity in truth.outputs.values()) > 0.1
    assert not [name for name, gradient in truth.gradients.items() if gradient.abs().max() < 1e-6]
    assert truth.norm > 10 * OPTIM.clip_grad
    # moved by two steps of at most 1e-3 each
    moved = [(truth.parameters[name] - start).abs().max() for name, start in weights().items()]
    assert min(moved) > 1e-3


def test_the_norm_that_clips_is_that_of_all_gradients():
    truth = reference("clips")
    squares = sum(gradient.square().sum() for gradient in truth.gradients.values())
    assert truth.norm == pytest.approx(float(squares.sqrt()), rel=1e-12)


@pytest.mark.parametrize("key", ROWS, ids=lambda key: f"{key[0]} ranks: {key[1]}, sharding {key[2]}")
def test_two_steps_equal_those_of_one_rank(key):
    errors, stopped = found(key[0])
    assert stopped is None, stopped
    wrong = {m: errors[key][m] for m in MEASURES if not errors[key][m][0] < TOLERANCE}
    assert not wrong


def test_images_among_clips_weigh_what_their_tokens_do():
    """The gradient of a step with both is the mean of the gradients of each, weighted by tokens."""
    clips, images, both = (reference(name) for name in ("two clips", "two images", "uneven"))
    # megatron multiplies by an fp32 reciprocal of the tokens, the same in every layout
    of_clips, of_images, of_both = (1 / (1 / torch.tensor(float(n))).double() for n in (48, 16, 64))
    for name, gradient in both.gradients.items():
        sums = clips.gradients[name] * of_clips + images.gradients[name] * of_images
        assert (gradient * of_both - sums).abs().max() < TOLERANCE * sums.abs().max()


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name, found_with_bugs):
    assert first_wrong(found_with_bugs[name]) == BUGS[name][1]
