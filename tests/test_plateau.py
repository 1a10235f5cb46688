"""When the learning rate falls by the validation loss: properties of the state machine, without a run."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.optim import Plateau, PlateauDetector

LOSSES = st.lists(st.sampled_from([1.0, 1.001, 0.995, 0.5, math.nan, math.inf]), min_size=0, max_size=40)
"""Few values: of many, hardly two are alike, and a detector is rarely saved within a cooldown."""
PLATEAUS = st.builds(
    Plateau,
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.01, 0.2]),
    cooldown=st.integers(0, 3),
    floor=st.sampled_from([0.01, 0.3, 1.0]),
)
few = settings(derandomize=True, deadline=None, max_examples=200)


def factors(plateau, losses):
    detector = PlateauDetector(plateau)
    return [(detector.observe(loss), detector.factor)[1] for loss in losses]


def test_a_stalled_loss_halves_the_rate_after_patience_measurements_and_again_after_the_cooldown():
    plateau = Plateau(patience=3, cooldown=2, floor=0.1)
    assert factors(plateau, [1.0] * 4) == [1, 1, 1, 0.5]  # the first is an improvement on nothing
    assert factors(plateau, [1.0] * 9)[4:] == [0.5, 0.5, 0.5, 0.5, 0.25]


def test_an_improvement_starts_the_count_again_and_one_below_the_threshold_is_none():
    plateau = Plateau(patience=2, threshold=0.1, cooldown=0)
    assert factors(plateau, [1.0, 1.0, 0.8, 0.8, 0.8]) == [1, 1, 1, 1, 0.5]
    assert factors(plateau, [1.0, 0.95, 0.92]) == [1, 1, 0.5]


def test_slow_progress_counts_against_the_best_not_the_last():
    """Each is 1% below the one before, and the third 2% below the best: that is enough."""
    assert factors(Plateau(patience=3, threshold=0.015, cooldown=0), [1.0, 0.99, 0.98, 0.97]) == [1] * 4


def test_a_loss_that_is_no_number_is_no_improvement():
    assert factors(Plateau(patience=2, cooldown=0), [1.0, math.nan, math.inf]) == [1, 1, 0.5]
    assert factors(Plateau(patience=2, cooldown=0), [math.nan, math.nan]) == [1, 0.5]


@few
@given(PLATEAUS, LOSSES)
def test_the_rate_never_rises_and_never_leaves_its_floor(plateau, losses):
    seen = [1.0, *factors(plateau, losses)]
    assert all(after <= before for before, after in pairwise(seen))
    assert min(seen) >= plateau.floor


@few
@given(PLATEAUS, LOSSES)
def test_lowerings_are_patience_and_cooldown_apart(plateau, losses):
    detector = PlateauDetector(plateau)
    lowered = [number for number, loss in enumerate(losses) if detector.observe(loss)]
    assert all(number >= plateau.patience - 1 for number in lowered)
    gaps = [after - before for before, after in pairwise(lowered)]
    assert all(gap >= plateau.patience + plateau.cooldown for gap in gaps)


@few
@given(PLATEAUS, st.integers(1, 60))
def test_a_loss_that_keeps_falling_never_lowers_the_rate(plateau, length):
    share = 1 - max(plateau.threshold, 1e-3) * 1.01
    assert set(factors(plateau, [share**number for number in range(length)])) == {1.0}


@few
@given(PLATEAUS, LOSSES, st.floats(0.1, 8))
def test_the_unit_of_the_loss_does_not_matter(plateau, losses, power):
    unit = 2.0 ** round(power)  # exact in floating point
    assert factors(plateau, losses) == factors(plateau, [unit * loss for loss in losses])


@few
@given(PLATEAUS, LOSSES, st.integers(0, 40))
def test_a_detector_that_was_saved_anywhere_goes_on_as_the_other(plateau, losses, place):
    one, before, after = (PlateauDetector(plateau) for _ in range(3))
    for loss in losses[:place]:
        assert one.observe(loss) == before.observe(loss)
    after.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    for loss in losses[place:]:
        assert (one.observe(loss), one.factor) == (after.observe(loss), after.factor)
    assert one.state() == after.state()


def test_a_checkpoint_from_before_the_plateau_starts_afresh():
    detector = PlateauDetector(Plateau())
    detector.load_state({})
    assert (detector.factor, detector.best) == (1.0, math.inf)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"optim\.plateau\.factor is 0"):
        Plateau(factor=0)
