"""Windows that cover a length, and the weights that blend them (windows.py)."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.windows import blend_weights, windows

CASES = settings(derandomize=True, deadline=None, max_examples=50)
ROUNDING = 1e-15  # 1 - j / N and j / N


@st.composite
def coverings(draw):
    """(length, size, overlap): any length, an overlap of up to half a window."""
    size = draw(st.integers(1, 40))
    return draw(st.integers(1, 200)), size, draw(st.integers(0, size // 2))


@CASES
@given(coverings())
def test_windows_cover_the_length_each_an_overlap_into_the_one_before(covering):
    """Seen to catch: a start of `size` in place of `size - overlap`."""
    length, size, overlap = covering
    spans = windows(length, size, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end - start == overlap
    assert all(end - start == size for start, end in spans[:-1])


@CASES
@given(coverings())
def test_the_last_window_reaches_past_its_overlap(covering):
    """No window holds only what the one before holds. Seen to catch: windows up to `length + overlap`."""
    spans = windows(*covering)
    for (_, end), (_, next_end) in itertools.pairwise(spans):
        assert next_end > end
    assert spans[-1][1] - spans[-1][0] <= covering[1]


@CASES
@given(coverings())
def test_weights_sum_to_one_at_every_place(covering):
    """Seen to catch: (j + 1) / N for the later window and 1 - j / N for the earlier."""
    length = covering[0]
    spans, totals, seen = windows(*covering), [0.0] * length, [0] * length
    for (start, end), weights in zip(spans, blend_weights(spans), strict=True):
        assert len(weights) == end - start
        for place, weight in zip(range(start, end), weights, strict=True):
            assert 0 <= weight <= 1
            totals[place] += weight
            seen[place] += 1
    assert totals == pytest.approx([1.0] * length, abs=ROUNDING)
    assert set(seen) <= {1, 2}, "three windows meet"


@CASES
@given(coverings())
def test_place_j_of_an_overlap_of_n_has_j_over_n_of_the_later_window(covering):
    """Seen to catch: the two windows' weights exchanged, as the paper's index has them."""
    length, size, overlap = covering
    spans = windows(length, size, overlap)
    weights = blend_weights(spans)
    for later in weights[1:]:
        assert later[:overlap] == [j / overlap for j in range(overlap)]
    for number, weight in enumerate(weights):
        first = overlap if number else 0
        last = len(weight) - (overlap if number + 1 < len(weights) else 0)
        assert weight[first:last] == [1.0] * (last - first)


@given(st.integers(1, 40), st.integers(0, 40))
@CASES
def test_one_window_is_the_whole_with_a_weight_of_one(length, longer):
    """Seen to catch: a size of 0 cut into windows."""
    size = length + longer
    for spans in (windows(length, size, size // 2), windows(length, 0, 16)):
        assert spans == [(0, length)]
        assert blend_weights(spans) == [[1.0] * length]


def test_the_overlap_drawn_in_the_module():
    """Seen to catch: the two windows' weights exchanged."""
    spans = windows(12, 8, 4)
    assert spans == [(0, 8), (4, 12)]
    assert blend_weights(spans) == [
        [1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        [0, 0.25, 0.5, 0.75, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("length", "size", "overlap", "says"),
    [
        (0, 4, 2, "a length of 0 has no windows; give 1 or more"),
        (-1, 0, 0, "a length of -1 has no windows"),
        (9, 4, 3, "must be 0 to half of the window, so use at most 2, or larger windows"),
        (9, 5, 3, "use at most 2,"),
        (9, 4, -1, "windows of 4 with an overlap of -1"),
        (9, -4, 0, "use at most 0,"),
    ],
)
def test_windows_that_do_not_cover_or_meet_in_threes_are_refused(length, size, overlap, says):
    """Seen to catch: an overlap compared with the whole window."""
    with pytest.raises(ValueError, match=says):
        windows(length, size, overlap)
