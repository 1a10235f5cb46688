"""Orders that are computed, not stored: every item once, and every order as often as any other."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.data.shuffle import key_of, keys_of_epochs, shuffled


@settings(derandomize=True, deadline=None, max_examples=200)
@given(count=st.integers(1, 1000), seed=st.integers(0, 1000), epoch=st.integers(0, 10**12))
def test_the_ranks_of_an_order_give_every_item_once(count, seed, epoch):
    keys = keys_of_epochs(key_of(seed), np.full(count, epoch))
    assert sorted(shuffled(np.arange(count), count, keys)) == list(range(count))


def test_ranks_of_several_orders_asked_for_together_are_those_of_each():
    counts, epochs = np.array([1, 7, 7, 1000, 1 << 40]), np.array([0, 1, 2, 3, 4])
    keys, ranks = keys_of_epochs(key_of(0), epochs), np.array([0, 6, 6, 999, 1 << 39])
    together = shuffled(ranks, counts, keys)
    alone = [shuffled(ranks[i : i + 1], counts[i], keys[i])[0] for i in range(5)]
    assert together.tolist() == alone
    assert (together < counts).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_of_a_few_items_comes_as_often_as_any_other(count):
    num_orders, draws = int(np.prod(np.arange(1, count + 1))), 24_000
    keys = keys_of_epochs(key_of("orders"), np.arange(draws))
    items = np.stack([shuffled(np.full(draws, rank), count, keys) for rank in range(count)], axis=1)
    times = Counter(map(tuple, items.tolist()))
    assert len(times) == num_orders
    expected = draws / num_orders
    chi_squared = sum((n - expected) ** 2 / expected for n in times.values())
    freedom = num_orders - 1
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom)  # mean and 4 deviations of chi squared


def test_items_far_apart_and_neighbours_are_mixed():
    items = shuffled(np.arange(10_000), 10_000, keys_of_epochs(key_of(1), [0]))
    # of a random order: a mean distance of neighbours of N / 3, and no correlation of item and rank
    assert np.mean([abs(a - b) for a, b in pairwise(items.tolist())]) == pytest.approx(3333, rel=0.03)
    assert abs(np.corrcoef(items, np.arange(10_000))[0, 1]) < 0.04


def test_orders_never_change():
    # a run resumed with a newer version goes on where it stopped
    keys = keys_of_epochs(key_of(0, (2, 8, 8)), [3])
    assert shuffled(np.arange(8), 8, keys).tolist() == [6, 7, 5, 0, 4, 2, 1, 3]
