"""Which steps are bad (spikes.py): hypothesis finds the series, the sentences say what must hold for all."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel.runs import recipe

from nemo_moviegen.recipe import read_recipe, recipe_yaml
from nemo_moviegen.settings import override
from nemo_moviegen.spikes import Guard, SpikeDetector

GUARD = Guard(window=16, min_steps=8)
numbers = st.floats(1e-3, 1e3)
kinds = st.sampled_from(("image", "video"))
not_finite = st.sampled_from((math.nan, math.inf, -math.inf))
any_number = st.one_of(numbers, not_finite)
exact = settings(derandomize=True, deadline=None, max_examples=50)


def judged(detector, steps):
    return [detector.judge(*step) for step in steps]


@exact
@given(numbers, numbers, st.integers(1, 60))
def test_a_constant_series_has_no_spike(loss, grad_norm, length):
    assert not any(judged(SpikeDetector(GUARD), [("video", loss, grad_norm)] * length))


@exact
@given(st.lists(st.tuples(numbers, numbers), min_size=8, max_size=40), st.booleans())
def test_a_hundred_times_the_largest_value_is_always_a_spike(series, in_the_loss):
    """The largest that was judged good: a spike does not join the window."""
    detector = SpikeDetector(GUARD)
    good = [(loss, norm) for loss, norm in series if not detector.judge("video", loss, norm)]
    (low, high), (low_norm, high_norm) = ((min(v), max(v)) for v in zip(*good, strict=True))
    bad = (100 * high, low_norm) if in_the_loss else (low, 100 * high_norm)
    assert detector.judge("video", *bad).startswith("loss" if in_the_loss else "grad_norm")
    assert detector.skipped == len(series) - len(good) + 1


@exact
@given(st.lists(st.tuples(numbers, numbers), max_size=12), not_finite, st.booleans())
def test_a_number_that_is_not_finite_is_bad_at_any_time_and_leaves_the_windows(series, value, in_the_loss):
    detector = SpikeDetector(GUARD)
    judged(detector, [("video", *pair) for pair in series])
    windows = detector.state()["windows"]
    bad = (value, 1.0) if in_the_loss else (1.0, value)
    assert detector.judge("video", *bad) == f"{'loss' if in_the_loss else 'grad_norm'} is {value}"
    assert {key: w for key, w in detector.state()["windows"].items() if w} == windows


def test_nothing_is_a_spike_before_min_steps_good_ones_of_its_kind():
    detector = SpikeDetector(GUARD)
    assert not any(judged(detector, [("video", 1.0, 1.0)] * 7 + [("video", 1e6, 1.0)]))
    assert not any(judged(detector, [("image", 1.0, 1.0)] * 7 + [("image", 1.0, 1e6)]))
    assert detector.judge("video", 1e9, 1.0)


def test_images_are_compared_with_images():
    """Their loss lies elsewhere: a level that is a spike among clips is none among images."""
    detector = SpikeDetector(GUARD)
    steps = 10 * [("video", 1.0, 1.0), ("image", 50.0, 50.0)]
    assert not any(judged(detector, steps))
    assert detector.judge("video", 50.0, 1.0) and not detector.judge("image", 50.0, 50.0)


def test_the_threshold_is_the_median_plus_so_many_deviations():
    """Median 1.1 and deviation 0.1 by hand: 20 of them make 3.1."""
    series = [("video", loss, 1.0) for loss in (0.9, 1.0, 1.1, 1.1, 1.2, 1.3, 1.0, 1.2)]
    below, above = SpikeDetector(GUARD), SpikeDetector(GUARD)
    assert not any(judged(below, series)) and not any(judged(above, series))
    assert not below.judge("video", 3.0999, 1.0)
    assert above.judge("video", 3.1001, 1.0).startswith("loss 3.1 is a spike: the median of the last 8 good")


def test_a_level_below_twice_the_median_is_no_spike_however_quiet_the_series():
    detector = SpikeDetector(GUARD)
    assert not any(judged(detector, [("video", 1.0, 1.0)] * 16 + [("video", 1.99, 1.99)]))
    assert detector.judge("video", 2.01, 1.0)


@exact
@given(
    st.lists(st.tuples(kinds, any_number, any_number), max_size=60),
    st.lists(st.tuples(kinds, any_number, any_number), max_size=30),
)
def test_a_detector_that_was_saved_and_loaded_judges_as_the_one_that_went_on(before, after):
    """Through JSON, as a checkpoint keeps it."""
    whole, first = SpikeDetector(GUARD), SpikeDetector(GUARD)
    judged(whole, before)
    judged(first, before)
    resumed = SpikeDetector(GUARD)
    resumed.load_state(json.loads(json.dumps(first.state())))
    for step in after:
        assert resumed.judge(*step) == whole.judge(*step)
        assert resumed.wants_rollback() == whole.wants_rollback()
        if whole.wants_rollback():
            resumed.rolled_back()
            whole.rolled_back()
    assert resumed.state() == whole.state()
    resumed.load_state({})  # of a checkpoint from before there was a guard
    assert resumed.state() == {"windows": {}, "counts": [0, 0, 0, 0]}


def test_so_many_bad_steps_in_a_row_want_a_rollback_and_good_ones_forget_the_old_ones():
    detector = SpikeDetector(Guard(window=4, min_steps=2, rollback_after=3))
    bad, good = ("video", math.nan, 1.0), ("image", 1.0, 1.0)
    judged(detector, [bad, bad, good, bad, bad])
    assert not detector.wants_rollback()
    judged(detector, [bad])
    assert detector.wants_rollback()
    detector.rolled_back()
    assert not detector.wants_rollback() and detector.rollbacks == 1
    judged(detector, [good] * 3 + [bad])
    assert detector.rollbacks == 1
    judged(detector, [good])
    assert detector.rollbacks == 0 and detector.skipped == 6


def test_a_recipe_keeps_its_guard_and_says_what_does_not_fit(tmp_path):
    run = override(recipe(tmp_path, tmp_path), ["guard.check_every=7", "guard.spike_mads=.inf"])
    assert run.guard == Guard(check_every=7, spike_mads=math.inf)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(run))
    assert read_recipe(tmp_path / "recipe.yaml") == run
    for fields, message in (
        ({"check_every": -1}, "check_every is -1; use 0 or more"),
        ({"rollback_after": 0}, "rollback_after is 0; use 1 or more"),
        ({"min_steps": 200}, "min_steps 200 and guard.window 128"),
        ({"spike_mads": 0.0}, "use a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Guard(**fields)
