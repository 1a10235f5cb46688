"""Items made ahead by a thread: the same items, the same errors, no more than agreed, nothing left."""

import threading
import time

import pytest

from nemo_moviegen.data.ahead import ahead

PATIENCE_SECONDS = 5


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_their_order_and_end(depth):
    assert list(ahead(range(50), depth)) == list(range(50))


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_after_the_items_before_it(depth):
    def items():
        yield 1
        yield 2
        raise ValueError("no third")

    seen = []
    with pytest.raises(ValueError, match="no third"):
        for item in ahead(items(), depth):
            seen.append(item)
    assert seen == [1, 2]


def test_no_more_than_the_depth_and_one_under_way_are_made_before_they_are_used():
    made = []
    items = ahead((made.append(n) or n for n in range(100)), 2)
    next(items)
    wait_until(lambda: len(made) >= 4)
    time.sleep(0.05)  # time enough to make many more, were there no bound
    assert len(made) == 4  # one in use, two waiting, one for which there is no room yet
    items.close()


def test_a_loop_that_stops_early_ends_the_thread_and_closes_the_items():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    for _ in ahead(items(), 2):
        break
    wait_until(closed.is_set)
    wait_until(lambda: threading.active_count() == before)


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="depth -1"):
        ahead([], -1)


def wait_until(condition):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()
