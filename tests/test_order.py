"""Batches as a function of the step: nothing skipped, nothing repeated, shapes in proportion."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.data.order import BatchOrder

SHAPES = [(1, 8, 8)] * 7 + [(2, 8, 8)] * 10 + [(4, 8, 8)] * 5 + [(2, 6, 12)] * 3


def test_image_steps_are_one_in_image_every():
    order = BatchOrder(SHAPES, 4, seed=0, image_every=11)
    assert [step for step in range(50) if order.kind(step) == "image"] == [10, 21, 32, 43]
    for step in range(50):
        rows, _ = order.batch(step)
        assert {SHAPES[row] for row in rows} == {order.shape(step)}
        assert (order.shape(step)[0] == 1) == (order.kind(step) == "image")


@pytest.mark.parametrize("batching", ["bucket", "balanced"])
def test_a_step_is_the_same_whenever_it_is_asked_for(batching):
    def order():
        return BatchOrder(SHAPES, 4, 0, 3, batching=batching, cost=(1, 0.1))

    asked = order()
    for step in (3, 19, 3, 35, 19, 4, 3, 20, 35, 51, 4, 0):  # 16 apart share a place
        assert asked.batch(step) == order().batch(step)
        assert asked.shape_counts(step) == order().shape_counts(step)
    with pytest.raises(ValueError, match="steps count from 0"):
        asked.batch(-1)


def test_zero_means_no_images_and_one_means_only_images():
    assert {BatchOrder(SHAPES, 4, 0, 0).kind(step) for step in range(30)} == {"video"}
    assert {BatchOrder(SHAPES, 4, 0, 1).kind(step) for step in range(30)} == {"image"}


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    global_batch=st.integers(1, 7),
    seed=st.integers(0, 5),
    image_every=st.sampled_from([0, 1, 2, 11]),
)
def test_each_row_comes_exactly_once_an_epoch_and_epochs_in_order(counts, global_batch, seed, image_every):
    shapes = [(1 + 2 * kind, 8, 8) for kind, count in enumerate(counts) for _ in range(count)]
    order = BatchOrder(shapes, global_batch, seed, image_every)
    streams = {}
    for step in range(120):
        rows, epochs = order.batch(step)
        assert len(rows) == len(epochs) == global_batch
        streams.setdefault(order.shape(step), []).extend(zip(rows, epochs, strict=True))
    for shape, stream in streams.items():
        members = [row for row, s in enumerate(shapes) if s == shape]
        for start in range(0, len(stream) - len(members) + 1, len(members)):
            epoch = stream[start : start + len(members)]
            assert sorted(row for row, _ in epoch) == members
            assert {number for _, number in epoch} == {start // len(members)}


def test_a_step_can_be_asked_for_alone_in_any_order():
    forward = [BatchOrder(SHAPES, 4, 3, 5).batch(step) for step in range(60)]
    one = BatchOrder(SHAPES, 4, 3, 5)
    assert [one.batch(step) for step in reversed(range(60))] == forward[::-1]
    assert BatchOrder(SHAPES, 4, 3, 5).batch(1_000_000_007) == one.batch(1_000_000_007)


def test_shapes_take_turns_in_proportion_to_their_samples():
    order = BatchOrder(SHAPES, 4, seed=1, image_every=0)
    # 10 + 5 + 3 clips: every window of 18 steps that starts at a multiple of 18 has exactly that many of each
    for start in (0, 18, 180):
        turns = Counter(order.shape(step) for step in range(start, start + 18))
        assert turns == {(2, 8, 8): 10, (4, 8, 8): 5, (2, 6, 12): 3}


def test_the_seed_and_the_epoch_change_the_shuffle():
    def epoch(seed, number):
        order = BatchOrder([(2, 8, 8)] * 12, 12, seed, 0)
        return order.batch(number)[0]

    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_the_batches_do_not_depend_on_how_rows_of_other_shapes_lie_between():
    mixed = [shape for pair in zip([(2, 8, 8)] * 6, [(1, 8, 8)] * 6, strict=True) for shape in pair]
    apart = [(2, 8, 8)] * 6 + [(1, 8, 8)] * 6
    for step in range(20):
        rows_mixed = BatchOrder(mixed, 4, 0, 3).batch(step)[0]
        rows_apart = BatchOrder(apart, 4, 0, 3).batch(step)[0]
        assert [row // 2 for row in rows_mixed] == [row % 6 for row in rows_apart]


def test_a_missing_kind_is_refused_with_the_command_that_makes_it():
    with pytest.raises(
        ValueError, match=r"image_every is 11, but none of the 3 samples are one-frame.*moviegen encode"
    ):
        BatchOrder([(2, 8, 8)] * 3, 4, 0, 11)
    with pytest.raises(ValueError, match=r"none of the 3 samples are latents longer.*image_every=1"):
        BatchOrder([(1, 8, 8)] * 3, 4, 0, 11)
    BatchOrder([(1, 8, 8)] * 3, 4, 0, 1)
    BatchOrder([(2, 8, 8)] * 3, 4, 0, 0)


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="global_batch 0"):
        BatchOrder(SHAPES, 0, 0, 11)
    with pytest.raises(ValueError, match="step -1"):
        BatchOrder(SHAPES, 4, 0, 11).batch(-1)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    num_images=st.integers(1, 40),
    micro_batch=st.integers(1, 3),
    pieces=st.sampled_from([2, 4]),
    more=st.integers(1, 5),
    batching=st.sampled_from(["bucket", "balanced"]),
)
def test_an_image_step_takes_image_batch_images_in_as_many_micro_batches(
    num_images, micro_batch, pieces, more, batching
):
    shapes = [(1, 8, 8)] * num_images + [(2, 8, 8)] * 10
    num_clips = micro_batch * pieces
    settings = {"micro_batch": micro_batch, "batching": batching, "cost": (1, 0)}
    order = BatchOrder(shapes, num_clips, 0, 3, image_batch=more * num_clips, **settings)
    plain = BatchOrder(shapes, num_clips, 0, 3, **settings)
    images = []
    for step in range(30):
        rows, epochs = order.batch(step)
        copies = [order.micro_batches(step, copy, 2) for copy in range(2)]
        assert [len(copy) for copy in copies] == [pieces // 2] * 2
        own = [sample for copy in copies for batch in copy for sample in zip(*batch, strict=True)]
        assert sorted(own) == sorted(zip(rows, epochs, strict=True))
        if order.kind(step) == "image":
            assert {len(rows) for copy in copies for rows, _ in copy} == {more * micro_batch}
            assert order.num_tokens(step) == 64 * more * num_clips
            images += zip(epochs, rows, strict=True)
        else:
            assert order.batch(step) == plain.batch(step)
    whole = len(images) // num_images * num_images
    assert sorted(images[:whole]) == [(e, r) for e in range(whole // num_images) for r in range(num_images)]


def test_the_images_of_a_step_are_the_same_on_any_number_of_copies_and_after_a_resume():
    def samples(step, num_copies, order):
        return [
            row
            for copy in range(num_copies)
            for rows, _ in order.micro_batches(step, copy, num_copies)
            for row in rows
        ]

    order = BatchOrder(SHAPES, 8, seed=0, image_every=2, image_batch=24)
    for step in range(1, 40, 2):
        fresh = BatchOrder(SHAPES, 8, seed=0, image_every=2, image_batch=24)
        assert samples(step, 1, order) == samples(step, 8, fresh) == order.batch(step)[0]


def test_an_image_batch_that_is_no_multiple_of_the_clips_is_refused():
    with pytest.raises(ValueError, match="image_batch 6 is no multiple of global_batch 4"):
        BatchOrder(SHAPES, 4, 0, 11, image_batch=6)


def test_shapes_of_a_kind_no_step_takes_may_be_too_large_for_the_model():
    """As for the first stage of Table 3, whose tables hold one frame, on a folder with images and clips."""

    def num_tokens(shape):
        if shape[0] > 1:
            raise ValueError("one frame only")
        return 16

    order = BatchOrder(SHAPES, 4, 0, 1, num_tokens=num_tokens)
    assert order.num_tokens(0) == 64
    with pytest.raises(ValueError, match="one frame only"):
        BatchOrder(SHAPES, 4, 0, 2, num_tokens=num_tokens)
