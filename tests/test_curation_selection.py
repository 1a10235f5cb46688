"""Choosing among scored clips: filters in order, twins, clusters, mix; on tables, without a video."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from nemo_moviegen.curation import store
from nemo_moviegen.curation.alike import balanced, clusters, distinct
from nemo_moviegen.curation.captions import Caption
from nemo_moviegen.curation.funnel import funnel_of
from nemo_moviegen.curation.recipe import CurationRecipe, Filter, Sampling, Scorer, override
from nemo_moviegen.curation.select import chance, select
from nemo_moviegen.curation.videos import Listing

HIGH_RES = recipes.get_curation("curation.high_res")
GOOD = {
    "duration_seconds": 30.0,
    "width_px": 1280.0,
    "height_px": 800.0,
    "min_side_px": 800.0,
    "aspect": 1.6,
    "is_hdr": 0.0,
    "start_seconds": 2.0,
    "end_seconds": 17.0,
    "clip_seconds": 15.0,
    "shots_per_second": 0.1,
    "text_score": 0.1,
    "border_share": 0.0,
    "aesthetics": 6.0,
    "quality": 6.0,
    "motion_score": 5.0,
    "motion_vectors": 3.0,
}
"""Scores of a clip that passes Table 38."""


def table_of(rows, recipe=HIGH_RES, seed=0):
    """A table of scores: GOOD with changes; embeddings are unrelated where a row brings none."""
    rng = np.random.default_rng(seed)
    full = []
    for number, row in enumerate(rows):
        base = {"video": f"{number:05d}.mp4", "reason": "", "kind": "video", "camera": ""}
        full.append(base | GOOD | {"embedding": rng.normal(size=32).tolist()} | row)
    return pa.Table.from_pylist(full, schema=store.schema(recipe))


def chosen(rows, recipe=HIGH_RES, captions=None):
    read = (captions or {}).get
    return select(table_of(rows, recipe), recipe, lambda name: read(name, Caption(caption="a film")))


def funnel(selection, table, recipe=HIGH_RES):
    return funnel_of(Listing("in"), table, selection, {}, recipe, 0)["steps"]


@pytest.mark.parametrize(
    ("step", "change"),
    [
        ("duration", {"duration_seconds": 3.99}),
        ("duration", {"duration_seconds": 120.1}),
        ("resolution", {"min_side_px": 767.0}),
        ("aspect", {"aspect": 0.999}),
        ("range", {"is_hdr": 1.0}),
        ("text", {"text_score": 0.6}),
        ("border", {"border_share": 0.03}),
        ("scene", {"clip_seconds": 11.9}),
        ("aesthetics", {"aesthetics": 3.99}),
        ("still", {"motion_score": 2.0}),
        ("motion", {"motion_vectors": 0.5}),
        ("motion", {"motion_vectors": 7.0}),
        ("jitter", {"shots_per_second": 0.85}),
        ("aesthetics", {"aesthetics": float("nan")}),  # a scorer that could not tell
    ],
)
def test_table_38_drops_a_clip_at_its_limit_and_keeps_one_inside(step, change):
    selection = chosen([{}, change], replace(HIGH_RES, keep_share=1.0))
    assert selection.dropped_by_N[0] == -1
    assert selection.steps[selection.dropped_by_N[1]].name == step


def test_limits_of_table_38_that_are_inside():
    inside = [{"duration_seconds": 4.0}, {"duration_seconds": 120.0}, {"min_side_px": 768.0}, {"aspect": 1.0}]
    inside += [{"clip_seconds": 12.0}, {"clip_seconds": 16.0}, {"aesthetics": 4.0}]
    assert len(chosen(inside, replace(HIGH_RES, keep_share=1.0)).kept) == len(inside)


def test_what_was_not_scored_is_dropped_by_what_kept_it_from_being_scored():
    """A video without a long scene has no text score: the step `scene` drops it, not `text`."""
    unscored = dict.fromkeys([s.column for s in HIGH_RES.scorers]) | {
        "start_seconds": None,
        "end_seconds": None,
    }
    no_scene = unscored | {"clip_seconds": float("nan"), "embedding": None}
    small = no_scene | {"min_side_px": 100.0, "clip_seconds": None, "shots_per_second": None}
    selection = chosen([no_scene, small])
    assert [selection.steps[n].name for n in selection.dropped_by_N] == ["scene", "resolution"]
    lenient = replace(
        HIGH_RES, filters=tuple(f for f in HIGH_RES.filters if f.name not in ("scene", "resolution"))
    )
    selection = chosen([no_scene, small], lenient)
    assert [selection.steps[n].name for n in selection.dropped_by_N] == ["clip", "jitter"]


def test_an_image_passes_what_is_for_videos_only():
    image = {"kind": "image", "clip_seconds": 0.0, "motion_score": 0.0, "motion_vectors": 0.0}
    image |= {"start_seconds": 0.0, "end_seconds": 0.0, "duration_seconds": 0.04, "shots_per_second": np.nan}
    recipe = replace(HIGH_RES, keep_share=1.0)
    assert len(chosen([image], recipe).kept) == 1
    selection = chosen([image | {"text_score": 0.9}], recipe)
    assert selection.steps[selection.dropped_by_N[0]].name == "text"


SCORE = st.sampled_from([-1.0, 0.0, 0.5, 0.6, 0.85, 2.0, 4.0, 7.0, 12.0, 16.0, 120.0, 768.0, 2000.0, np.nan])


@given(
    rows=st.lists(
        st.fixed_dictionaries({}, optional={name: SCORE for name in GOOD if "seconds" not in name})
    ),
    names=st.permutations([f.name for f in HIGH_RES.filters]),
    share=st.sampled_from([0.3, 0.82, 1.0]),
    landscape=st.sampled_from([0.0, 0.6, 0.8, 1.0]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_funnel_never_widens_and_every_row_has_one_fate(rows, names, share, landscape):
    order = {f.name: f for f in HIGH_RES.filters}
    recipe = replace(
        HIGH_RES, filters=tuple(order[n] for n in names), keep_share=share, landscape_share=landscape
    )
    table = table_of(rows, recipe)
    selection = select(table, recipe, lambda name: Caption(caption="a film"))
    steps = funnel(selection, table, recipe)
    for key in ("rows", "videos", "clip_seconds", "percent"):
        counts = [step[key] for step in steps]
        assert counts == sorted(counts, reverse=True)
    assert steps[0]["rows"] == len(rows) and steps[-1]["rows"] == len(selection.kept)
    dropped = sum(steps[i]["rows"] - steps[i + 1]["rows"] for i in range(len(steps) - 1))
    assert dropped + len(selection.kept) == len(rows)


@given(st.permutations(range(12)))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_of_twins_exactly_the_best_stays_whatever_their_order(order):
    """Four films in three copies each; the copy of the most pixels stays, of equals the better picture."""
    rng = np.random.default_rng(1)
    films = rng.normal(size=(4, 32))
    rows = []
    for number in order:
        film, copy = divmod(number, 3)
        noise = rng.normal(scale=0.02, size=32)
        rows.append(
            {
                "embedding": (films[film] + noise).tolist(),
                "min_side_px": [1080.0, 1080.0, 800.0][copy],
                "quality": [5.0, 7.0, 9.0][copy],
            }
        )
    selection = chosen(rows, replace(HIGH_RES, keep_share=1.0))
    assert {order[row] for row in selection.kept} == {1, 4, 7, 10}
    assert len(selection.kept) == 4


def test_two_films_just_below_the_limit_both_stay():
    first, other = np.zeros(32), np.zeros(32)
    first[0], other[:2] = 1, [0.989, np.sqrt(1 - 0.989**2)]
    rows = [{"embedding": first.tolist()}, {"embedding": other.tolist()}]
    recipe = replace(HIGH_RES, keep_share=1.0)
    assert len(chosen(rows, recipe).kept) == 2
    assert len(chosen(rows, override(recipe, ["dedup_cosine=0.988"])).kept) == 1


@pytest.mark.parametrize("exact_up_to", [10**6, 0])
def test_no_two_that_stay_are_twins_and_each_dropped_one_has_a_twin_that_stays(exact_up_to):
    """Over block borders; and where twins are sought in cells, which misses some but drops none falsely."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 16)).astype(np.float32)
    copies = vectors[rng.integers(0, 700, 2300)] + rng.normal(scale=0.01, size=(2300, 16))
    vectors = np.concatenate([vectors, copies]).astype(np.float32)
    stays = distinct(vectors, rng.permutation(3000), 0.99, exact_up_to)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = unit[stays] @ unit[stays].T - np.eye(stays.sum())
    assert ((unit[~stays] @ unit[stays].T).max(axis=1) >= 0.99).all()
    if exact_up_to:
        assert kept.max() < 0.99 and stays.sum() == 700
    else:
        assert 700 <= stays.sum() <= 735  # 1.5% of the twins missed at most


def test_plain_frames_are_nobodys_twins():
    assert distinct(np.zeros((5, 8)), np.arange(5), 0.99).all()


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.floats(0.05, 1.0))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_clusters_keep_by_the_root_of_their_size(sizes, share):
    """App. B: probability 1/sqrt(n), so a cluster of n keeps k sqrt(n), and all together `share`."""
    label_N = np.repeat(np.arange(len(sizes)) * 7, sizes)
    chance_N = np.random.default_rng(0).random(len(label_N))
    stays_N = balanced(label_N, share, chance_N)
    assert stays_N.sum() == round(share * len(label_N))
    kept = np.array([stays_N[label_N == 7 * c].sum() for c in range(len(sizes))])
    cut = kept < np.array(sizes) - 1  # those that are not kept whole
    if cut.any():
        k = kept[cut] / np.sqrt(np.array(sizes)[cut])
        bounds = 1.01 / np.sqrt(np.array(sizes)[cut])
        assert (k - bounds).max() <= (k + bounds).min()  # one k explains every count to a whole number
        whole = ~cut & (kept == sizes)
        if whole.any():  # and is no less than what would cut these
            assert np.sqrt(np.array(sizes)[whole]).max() - 1.01 <= (k + bounds).min() + 1
    for c in range(len(sizes)):
        inside = label_N == 7 * c
        if stays_N[inside].any() and not stays_N[inside].all():
            assert chance_N[inside & stays_N].max() < chance_N[inside & ~stays_N].min()


def test_a_cluster_nine_times_as_large_keeps_three_times_as_many():
    label_N = np.repeat([0, 1], [900, 100])
    stays_N = balanced(label_N, 0.2, np.random.default_rng(0).random(1000))
    assert (stays_N[:900].sum(), stays_N[900:].sum()) == (150, 50)


def test_clusters_find_groups_and_merge_those_that_are_one():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:3]
    group_N = np.repeat([0, 1, 2], [300, 60, 15])
    vectors = centres[group_N] + rng.normal(scale=0.04, size=(375, 16))
    label_N = clusters(vectors, 24, 0.9, seed=0)
    assert len(set(label_N)) == 3
    assert all(len(set(label_N[group_N == group])) == 1 for group in range(3))
    assert len(set(clusters(vectors, 24, 0.99999, seed=0))) > 3
    assert clusters(vectors[:1], 0, 0.9, seed=0).tolist() == [0]
    assert (clusters(vectors, 24, 0.9, seed=0) == label_N).all()


@pytest.mark.parametrize(
    ("wide", "high", "share"), [(90, 10, 0.6), (10, 90, 0.6), (50, 50, 0.8), (7, 0, 0.6)]
)
def test_the_mix_of_aspects_is_reached_by_dropping_from_one_side(wide, high, share):
    rows = [{"aspect": 1.5}] * wide + [{"aspect": 0.6}] * high
    recipe = override(HIGH_RES, ["filters.aspect.low=0", f"landscape_share={share}", "keep_share=1"])
    kept = chosen(rows, recipe).kept
    kept_wide, kept_high = (kept < wide).sum(), (kept >= wide).sum()
    assert kept_wide == wide or kept_high == high
    assert abs(kept_wide * (1 - share) - kept_high * share) <= 0.5


def test_what_stays_is_a_function_of_seed_and_clip():
    """Other rows before it change nothing about a row's lot."""
    lots = [
        chance(0, "a.mp4", 2.0),
        chance(0, "a.mp4", 2.0),
        chance(1, "a.mp4", 2.0),
        chance(0, "b.mp4", 2.0),
    ]
    assert lots[0] == lots[1] and len(set(lots)) == 3
    values = [chance(0, n) for n in range(2000)]
    assert min(values) >= 0 and max(values) < 1 and abs(np.mean(values) - 0.5) < 0.02


def test_captions_that_cannot_be_read_drop_their_clips_before_twins_are_sought():
    """A twin without a caption must not stand for the one that has one."""

    def read(name):
        if name == "00000.mp4":
            raise ValueError("bad")
        return Caption(caption="" if name == "00002.mp4" else "good")

    same = {"embedding": np.ones(32).tolist()}
    rows = [same | {"quality": 9.0}, same, {}]
    table = table_of(rows)
    recipe = replace(HIGH_RES, keep_share=1.0)
    selection = select(table, recipe, read)
    assert selection.kept.tolist() == [1]
    assert selection.refused["00000.mp4"] == "bad" and "no caption" in selection.refused["00002.mp4"]
    assert select(table, replace(recipe, captioner="a.b:c"), read).kept.tolist() == [1, 2]


@pytest.mark.parametrize("name", recipes.CURATION)
def test_a_curation_recipe_is_called_what_it_is_and_cites_its_section(name):
    assert recipes.get_curation(name).name == name
    assert "s3.2.1" in recipes.CURATION[name].__doc__
    hash(recipes.get_curation(name))


def test_high_res_is_table_38():
    texts = [entry.text for entry in HIGH_RES.filters]
    assert texts == [
        "4 <= duration_seconds <= 120",
        "768 <= min_side_px",
        "1 <= aspect",
        "is_hdr <= 0",
        "text_score < 0.6",
        "border_share <= 0.02",
        "12 <= clip_seconds <= 16",
        "4 <= aesthetics",
        "2 < motion_score",
        "0.5 < motion_vectors < 7",
        "shots_per_second < 0.85",
    ]
    assert (HIGH_RES.dedup_cosine, HIGH_RES.sampling.clips_per_video) == (0.99, 1)
    assert HIGH_RES.keep_share == pytest.approx(0.94 / 1.15, abs=5e-3)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("filters.txt.high=1", "no entry 'txt' in filters; did you mean 'text'"),
        ("filters.text.hihg=1", "did you mean 'filters.4.high'"),
        ("filters.text.column=txt_score", "no scorer fills 'txt_score'; did you mean 'text_score'"),
        ("filters.text.low=3", "nothing lies in 3.0..0.6"),
        ("scorers.aesthetics.function=mine", "names no function; write package.module:function"),
        ("sampling.shortest_seconds=20", "shortest_seconds <= long_seconds"),
        ("keep_share=0", "nothing would be left"),
        ("landscape_share=1.5", "a share lies in 0..1"),
        ("looking.num_frames=4", "odd number"),
        ("num_chunks=0", "use 1 or more"),
    ],
)
def test_a_wrong_setting_says_what_to_change(assignment, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        override(HIGH_RES, [assignment])


def test_recipes_refuse_two_of_one_name_and_taken_columns():
    twice = (Filter(name="a", column="aspect"), Filter(name="a", column="fps"))
    with pytest.raises(ValueError, match="two filters share a name"):
        CurationRecipe(name="x", filters=twice)
    for column in ("aspect", "camera", "clip_seconds"):
        with pytest.raises(ValueError, match="there is such a column already"):
            Scorer(column=column, function="a:b")
    with pytest.raises(ValueError, match="clips of"):
        Sampling(clips_per_video=0)
