"""Any seed, shapes and copies: a run killed anywhere and resumed on others skips and repeats nothing."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.data.order import BatchOrder

COST = (7, 0.01)
many = settings(derandomize=True, deadline=None, max_examples=50)


@st.composite
def orders(draw, batching=None):
    """Arguments of a BatchOrder of few rows: runs of some tens of steps see several epochs."""
    sides = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4]))
    counts = draw(st.dictionaries(sides, st.integers(1, 11), min_size=1, max_size=5))
    counts.setdefault((3, 2, 2), 2)  # a clip and an image there must be
    counts.setdefault((1, 2, 2), 3)
    shapes = draw(st.permutations([shape for shape, count in counts.items() for _ in range(count)]))
    batching = batching or draw(st.sampled_from(["bucket", "balanced", "packed"]))
    micro_batch = 1 if batching == "packed" else draw(st.sampled_from([1, 2, 3]))
    longest = max(math.prod(shape) for shape in shapes)
    return {
        "latent_shapes": shapes,
        "global_batch": micro_batch * 24
        if batching != "packed"
        else 24,  # splits over 1, 2, 3, 4, 6, 8 copies
        "seed": draw(st.integers(0, 9)),
        "image_every": draw(st.sampled_from([0, 2, 5])),
        "micro_batch": micro_batch,
        "batching": batching,
        "cost": COST,
        "max_tokens": draw(st.integers(longest, 3 * longest)) if batching == "packed" else 0,
    }


COPIES = st.sampled_from([1, 2, 3, 4, 6, 8])


def seen(order, steps, num_copies):
    """[(row, epoch)] that copies, each with an order of its own, see at each step."""
    return [
        [
            pair
            for copy in range(num_copies)
            for rows, epochs in order.micro_batches(step, copy, num_copies)
            for pair in zip(rows, epochs, strict=True)
        ]
        for step in steps
    ]


@many
@given(arguments=orders(), copies=COPIES, others=COPIES, killed=st.integers(0, 12))
def test_a_run_resumed_on_other_copies_sees_exactly_the_remaining_samples(arguments, copies, others, killed):
    uninterrupted = seen(BatchOrder(**arguments), range(12), copies)
    before = seen(BatchOrder(**arguments), range(killed), copies)
    after = seen(BatchOrder(**arguments), range(killed, 12), others)
    assert [sorted(step) for step in before + after] == [sorted(step) for step in uninterrupted]


@many
@given(arguments=orders())
def test_no_row_comes_twice_in_an_epoch_and_none_is_skipped(arguments):
    shapes, batching = arguments["latent_shapes"], arguments["batching"]
    pairs = [pair for step in seen(BatchOrder(**arguments), range(12), 1) for pair in step]
    assert len(set(pairs)) == len(pairs)
    # Rows of a shape are one stream; packs take all clips to the end of the epoch before the next starts
    stream = {row: "clips" if batching == "packed" and s[0] > 1 else s for row, s in enumerate(shapes)}
    last = {}
    for row, epoch in pairs:
        last[stream[row]] = max(epoch, last.get(stream[row], 0))
    finished = {(row, epoch) for row in stream for epoch in range(last.get(stream[row], 0))}
    assert finished <= set(pairs)
    assert max(last.values()) >= 1  # several epochs were seen


@many
@given(arguments=orders(), copies=COPIES, step=st.integers(0, 1000))
def test_copies_share_a_step_without_overlap_in_as_many_micro_batches(arguments, copies, step):
    order = BatchOrder(**arguments)
    shares = [order.micro_batches(step, copy, copies) for copy in range(copies)]
    assert {len(share) for share in shares} == {24 // copies}
    rows, epochs = order.batch(step)
    taken = [pair for share in shares for parts in share for pair in zip(*parts, strict=True)]
    assert Counter(taken) == Counter(zip(rows, epochs, strict=True))


@many
@given(arguments=orders(), copies=COPIES, step=st.integers(0, 1000))
def test_a_micro_batch_has_one_shape_or_fits_the_packs_budget(arguments, copies, step):
    order, shapes = BatchOrder(**arguments), arguments["latent_shapes"]
    for copy in range(copies):
        for rows, _ in order.micro_batches(step, copy, copies):
            found = [shapes[row] for row in rows]
            assert {shape[0] == 1 for shape in found} == {order.kind(step) == "image"}
            if arguments["batching"] == "packed" and order.kind(step) == "video":
                assert 0 < sum(map(math.prod, found)) <= arguments["max_tokens"]
            else:
                assert len(set(found)) == 1 and len(found) == arguments["micro_batch"]


@many
@given(arguments=orders(), steps=st.permutations(range(20)))
def test_a_step_can_be_asked_for_alone(arguments, steps):
    one = BatchOrder(**arguments)
    assert {step: one.batch(step) for step in steps} == {
        step: BatchOrder(**arguments).batch(step) for step in range(20)
    }


@many
@given(arguments=orders(batching="balanced"), copies=COPIES, step=st.integers(0, 1000))
def test_balanced_copies_differ_by_no_more_than_the_samples_of_one_round(arguments, copies, step):
    order, shapes = BatchOrder(**arguments), arguments["latent_shapes"]

    def cost(rows):
        return sum(COST[0] * math.prod(shapes[row]) + COST[1] * math.prod(shapes[row]) ** 2 for row in rows)

    costs = np.array(
        [[cost(rows) for rows, _ in order.micro_batches(step, copy, copies)] for copy in range(copies)]
    )
    if order.kind(step) == "video":
        # the dearest of a round goes to who has least, so what was uneven before never grows
        assert np.ptp(costs.sum(1)) <= np.ptp(costs, axis=0).max() + 1e-6
        assert (costs[:, :-1].min(0) >= costs[:, 1:].max(0) - 1e-6).all()  # rounds of neighbours in cost
    at_end, in_rounds = order.imbalance(step, copies)
    assert at_end == pytest.approx(costs.sum(1).max() / costs.sum(1).mean() - 1)
    assert in_rounds == pytest.approx(costs.max(0).sum() / costs.sum(1).mean() - 1)


CLIPS = [(2, 8, 8)] * 500 + [(3, 8, 8)] * 300 + [(4, 8, 8)] * 150 + [(4, 6, 12)] * 50


def an_order(batching, global_batch=20, **arguments):
    return BatchOrder(CLIPS, global_batch, 3, 0, batching=batching, cost=COST, **arguments)


@pytest.mark.parametrize("start", [0, 7, 10**16])
def test_a_balanced_step_mixes_all_shapes_in_proportion(start):
    order = an_order("balanced", 100)
    for step in range(start, start + 10):
        rows, epochs = order.batch(step)
        assert all(abs(epoch - step * 100 // len(CLIPS)) <= 1 for epoch in epochs)
        found = Counter(CLIPS[row] for row in rows)
        for shape, expected in {(2, 8, 8): 50, (3, 8, 8): 30, (4, 8, 8): 15, (4, 6, 12): 5}.items():
            assert abs(found[shape] - expected) <= 2


@pytest.mark.parametrize(("batching", "steps"), [("bucket", 1000), ("balanced", 50), ("packed", None)])
def test_every_row_comes_as_often_as_any_other_so_that_sources_keep_their_volume(batching, steps):
    order = an_order(batching, max_tokens=600)
    steps = steps or order.plan.num_packs  # as many epochs as a step has packs
    times = Counter(row for step in range(steps) for row in order.batch(step)[0])
    assert len(times) == len(CLIPS) and len(set(times.values())) == 1


@pytest.mark.parametrize("batching", ["bucket", "balanced", "packed"])
def test_any_stretch_of_steps_has_the_sources_in_proportion_like_a_random_draw(batching):
    # a source without rows of one shape, and one of rows of all shapes side by side
    sources = np.array(["film"] * 100 + ["web"] * 600 + ["stock"] * 300)
    order = an_order(batching, max_tokens=600)
    steps = [sources[order.batch(step)[0]] for step in range(400)]
    for length in (20, 50, 200):
        for start in range(0, 400 - length, 37):
            drawn = np.concatenate(steps[start : start + length])
            for source, share in {"film": 0.1, "web": 0.6, "stock": 0.3}.items():
                # 5 deviations of a draw, and a turn more or less of each shape
                slack = 5 * math.sqrt(len(drawn) * share * (1 - share))
                slack += 4 * 20 if batching == "bucket" else 4
                assert abs((drawn == source).sum() - len(drawn) * share) <= slack


def test_padding_is_told_for_this_batching_and_for_padding_to_the_longest():
    tokens = [math.prod(shape) for shape in CLIPS]
    naive = 1 - sum(tokens) / (len(tokens) * max(tokens))
    assert an_order("bucket").padding() == pytest.approx({"batching": 0, "to_longest": naive})
    assert an_order("balanced").padding()["batching"] == 0
    order = an_order("packed", max_tokens=600)
    slots = [
        sum(tokens[row] for row in order.micro_batches(step, 0, 20)[0][0])
        for step in range(order.plan.num_packs)
    ]
    in_an_epoch = sum(map(order.num_tokens, range(order.plan.num_packs))) / 20
    assert in_an_epoch == sum(tokens) and max(slots) <= 600
    assert order.padding()["batching"] == pytest.approx(1 - sum(tokens) / (order.plan.num_packs * 600))


def test_packs_are_by_default_as_long_as_the_longest_clip():
    assert an_order("packed").plan.max_tokens == 4 * 6 * 12
    with pytest.raises(
        ValueError, match="a pack of 200 tokens has no room for the longest clip of 288: raise"
    ):
        an_order("packed", max_tokens=200)


def test_the_operator_is_told_where_copies_wait():
    assert an_order("bucket").advice(20) == ""
    told = an_order("balanced").advice(20)
    assert "balanced with 1 micro-batches a copy" in told and "data.batching=bucket" in told
    assert an_order("balanced", 400).advice(20) == ""


def test_shapes_of_a_mixed_step_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"step 0 mixes \d latent shapes, as data.batching=balanced"):
        an_order("balanced").shape(0)
    with pytest.raises(ValueError, match="a pack is a micro-batch by itself: set micro_batch=1"):
        an_order("packed", micro_batch=2)
    with pytest.raises(ValueError, match=r"global_batch 20 is no multiple of micro_batch 3"):
        an_order("balanced", micro_batch=3)
    with pytest.raises(
        ValueError, match=r"micro-batches of 2 does not split over 3 copies .* a multiple of 6"
    ):
        an_order("balanced", micro_batch=2).micro_batches(0, 0, 3)
    with pytest.raises(ValueError, match="'mixed'; use bucket, balanced or packed"):
        an_order("mixed")
    with pytest.raises(ValueError, match=r"give flops\.token_cost"):
        BatchOrder(CLIPS, 4, 0, 0, batching="packed")
