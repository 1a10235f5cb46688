"""The recipes hold the paper's numbers: Table 3, finetuning, the 5B ablation, post-training; and variants."""

import re
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

import recipes
from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.recipe import override
from nemo_moviegen.training.record import learning_rate_factor
from recipes import tiny, video_30b

# Table 3: TP, CP, batch a model copy, GPUs, global batch, learning rate, iterations, samples in millions
ROWS = {
    "video_30b.t2i_256_1536": (1, 1, 6, 1536, 9216, 1e-4, 210_000, 1940),
    "video_30b.t2iv_256_3072": (4, 1, 2, 3072, 1536, 6e-5, 113_000, 173.6),
    "video_30b.t2iv_256_6144": (4, 1, 2, 6144, 3072, 6e-5, 72_000, 221.2),
    "video_30b.t2iv_768_6144_a": (4, 1, 1, 6144, 1536, 6e-5, 19_600, 30.1),
    "video_30b.t2iv_768_6144_b": (4, 1, 1, 6144, 1536, 3e-5, 11_000, 16.9),
    "video_30b.t2iv_768_cp2_6144": (4, 2, 1, 6144, 768, 2e-5, 15_900, 12.2),
    "video_30b.t2iv_768_cp2_4096": (4, 2, 1, 4096, 512, 1e-5, 28_000, 14.3),  # printed 14.6: 28.5k iterations
}
# The same columns, of stages outside the table; None where the paper states nothing and ours may change
STAGES = {
    "video_30b.sft": (None, None, None, 512, None, None, None),
    "video_30b.t2i_1024": (None, None, None, None, None, None, None),
    "video_30b.t2i_quality": (None, None, None, None, 64, 1e-5, 6000),
    "ablation_5b.t2i": (None, None, None, 512, 9216, 3e-4, 96_000),
    "ablation_5b.t2iv": (None, None, None, None, 256, 5e-5, 100_000),
}
IMAGES_AND_CLIPS = ("video_30b.t2iv", "ablation_5b.t2iv")


@pytest.mark.parametrize("name", [*ROWS, *(f"{name}_fp8" for name in ROWS)])
def test_a_row_of_table_3_holds(name):
    *columns, millions = ROWS[name.removesuffix("_fp8")]
    recipe = recipes.get(name)
    holds(recipe, columns)
    assert recipe.num_microbatches(columns[3]) == 1
    assert recipe.global_batch * recipe.num_steps / 1e6 == pytest.approx(millions, rel=3e-3)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_outside_the_table_holds_what_the_paper_states(name):
    holds(recipes.get(name), STAGES[name])


def holds(recipe, columns):
    """What is stated is there, and the batch is the table's footnote: batch a copy x GPUs / (TP x CP)."""
    gpus, layout = read_cluster(recipe.cluster).num_ranks, recipe.layout
    copies = gpus / (layout.tensor * layout.context)
    assert recipe.global_batch == recipe.micro_batch * copies * recipe.num_microbatches(gpus)
    found = (
        layout.tensor,
        layout.context,
        recipe.micro_batch,
        gpus,
        recipe.global_batch,
        recipe.optim.learning_rate,
        recipe.num_steps,
    )
    assert tuple(f if stated is not None else None for f, stated in zip(found, columns, strict=True)) == (
        tuple(columns)
    )


def test_every_row_of_table_3_starts_from_the_one_before():
    rows = [recipes.get(name) for name in ROWS]
    assert rows[0].init_from == ""
    for before, after in pairwise(rows):
        assert after.init_from == before.output
    assert sum(row.num_steps for row in rows[1:3]) == 185_000
    assert sum(row.num_steps for row in rows[3:]) == 74_500


def test_the_longest_clip_has_73728_tokens():
    recipe = recipes.get("video_30b.t2iv_768_cp2_4096")
    shape = (recipe.latent_frames, recipe.latent_height, recipe.latent_width)
    assert recipe.size.num_tokens(shape) == 73_728
    assert recipes.get("video_30b.t2iv_256_3072").size.num_tokens((32, 32, 32)) == 8_192


def test_joint_stages_take_one_image_iteration_for_ten_of_video():
    for name in ROWS:
        image_every = recipes.get(name).data.image_every
        assert image_every == (1 if ".t2i_" in name else 11)  # 1 : 10


def test_a_stage_trains_on_the_buckets_of_table_2_its_layout_divides():
    for name in (*ROWS, *STAGES):
        recipe = recipes.get(name)
        assert recipe.bucket_shapes
        pieces = recipe.layout.tensor * recipe.layout.context
        assert {recipe.size.num_tokens(shape) % pieces for shape in recipe.bucket_shapes} == {0}
        assert (recipe.latent_frames, recipe.latent_height, recipe.latent_width) in recipe.bucket_shapes
    video = recipes.get("video_30b.t2iv_768_cp2_4096")
    assert {shape[0] for shape in video.bucket_shapes} == {1, 16, 24, 32}
    assert len({shape[1:] for shape in video.bucket_shapes}) == 5
    assert (32, 72, 128) in video.bucket_shapes  # 1024x576 px
    assert recipes.get("video_30b.t2i_256_1536").bucket_shapes == ((1, 32, 32),)


def test_a_bucket_that_the_layout_does_not_divide_is_refused_when_the_recipe_is_built():
    with pytest.raises(
        ValueError,
        match=r"1x28x36 has 252 tokens, which do not split over context 8.*\(data\.buckets=video_256 has",
    ):
        override(recipes.get("video_30b.t2iv_256_3072"), ["layout.context=8", "layout.tensor=1"])


def test_a_folder_with_latents_of_other_buckets_is_refused():
    recipe = recipes.get("video_30b.sft")
    recipe.check_shapes([(32, 96, 96), [32, 72, 128]])
    with pytest.raises(
        ValueError, match=r"trains on the buckets sft_768; 16x96x96 in data/latents_sft is none"
    ):
        recipe.check_shapes([(32, 96, 96), (16, 96, 96)])
    replace(recipe, data=replace(recipe.data, buckets="")).check_shapes([(16, 96, 96)])


def test_finetuning_takes_clips_of_10_6_to_16_seconds_at_two_rates_and_a_cosine():
    recipe = recipes.get("video_30b.sft")
    durations = bucket_set(recipe.data.buckets).durations
    spans = [(round(d.shortest_seconds, 2), d.longest_seconds, d.num_frames, d.fps) for d in durations]
    assert spans == [(10.67, 16, 256, 24), (16, 120, 256, 16)]
    assert {shape[0] for shape in recipe.bucket_shapes} == {32}
    assert recipe.optim.decay == "cosine"
    assert recipe.init_from == recipes.get("video_30b.t2iv_768_cp2_4096").output
    assert recipe.size == recipes.get("video_30b.t2iv_768_cp2_4096").size


def test_the_ablation_has_4096_images_or_256_clips_at_0_02_to_1():
    image, joint = recipes.get("ablation_5b.t2i"), recipes.get("ablation_5b.t2iv")
    assert (joint.images_per_step, joint.global_batch) == (4096, 256)
    assert 1 / (joint.data.image_every - 1) == pytest.approx(0.02)
    assert joint.bucket_shapes == ((1, 24, 44), (16, 24, 44))
    assert joint.images_per_step * joint.size.num_tokens((1, 24, 44)) == 256 * joint.size.num_tokens(
        (16, 24, 44)
    )
    assert joint.init_from == image.output
    assert (joint.size.num_layers, joint.size.width, joint.size.num_heads) == (32, 3072, 24)
    (duration,) = bucket_set(joint.data.buckets).durations
    assert (duration.shortest_seconds, duration.longest_seconds) == (4, 8)


def test_image_post_training_goes_to_1024_px_and_quality_tuning_warms_up_over_2000_steps():
    image, quality = recipes.get("video_30b.t2i_1024"), recipes.get("video_30b.t2i_quality")
    assert image.init_from == recipes.get("video_30b.t2iv_768_cp2_4096").output
    assert quality.init_from == image.output
    for recipe in (image, quality):
        assert {shape[0] for shape in recipe.bucket_shapes} == {1}
        areas = [64 * height * width for _, height, width in recipe.bucket_shapes]
        assert areas == pytest.approx([1024**2] * 5, rel=0.02)
    rates = [learning_rate_factor(step, quality.optim, quality.num_steps) for step in (999, 1999, 2000, 5999)]
    assert rates == [0.5, 1, 1, 1]


@pytest.mark.parametrize("name", ROWS)
def test_an_fp8_row_is_its_row_but_for_the_precision(name):
    row, variant = recipes.get(name), recipes.get(f"{name}_fp8")
    assert variant.precision.startswith("fp8_")
    renamed = {"name": row.name, "output": row.output, "precision": row.precision, "fp8": row.fp8}
    assert replace(variant, **renamed) == row


def test_the_plateau_run_is_rows_4_and_5_from_the_rate_of_row_4():
    run, *rows = (recipes.get(f"video_30b.t2iv_768_6144_{part}") for part in ("plateau", "a", "b"))
    assert run.num_steps == sum(row.num_steps for row in rows)
    assert (run.optim.decay, run.optim.learning_rate) == ("plateau", rows[0].optim.learning_rate)
    assert run.validation.every > 0
    assert run.optim.plateau.factor == rows[1].optim.learning_rate / rows[0].optim.learning_rate


def test_every_stage_has_a_twin_of_the_same_fields_on_two_cores():
    names = {name for name in recipes.RECIPES if name.startswith(("video_30b.", "ablation_5b."))}
    full = {name for name in names if not name.endswith("_fp8")}
    twins = {f"tiny.{name.partition('.')[2]}" for name in full if name.startswith("video_30b.")}
    twins |= {"tiny.ablation_t2i", "tiny.ablation_t2iv"}
    assert twins == {f"tiny.{name}" for name in tiny.TWINS}
    for name in twins:
        twin = recipes.get(name)
        assert (twin.cluster, twin.precision) == ("cpu_2", "fp32")
        assert twin.num_microbatches(2) >= 1
        original = recipes.get(re.search(r"Twin of (\S+)", recipes.RECIPES[name].__doc__)[1])
        assert asdict(twin).keys() == asdict(original).keys()
        same = ("ema_decay", "keep_best", "guidance_scale", "guard")
        assert [getattr(twin, field) for field in same] == [getattr(original, field) for field in same]
        assert twin.data.image_every == original.data.image_every
        assert twin.optim.decay == original.optim.decay
        assert twin.layout.recompute == original.layout.recompute
        assert (twin.layout.context > 1) == (original.layout.context > 1)
        assert (twin.image_batch > 0) == (original.image_batch > 0)
        assert bool(twin.init_from) == bool(original.init_from)


def test_twins_start_from_twins():
    outputs = {recipes.get(f"tiny.{name}").output for name in tiny.TWINS}
    starts = {recipes.get(f"tiny.{name}").init_from for name in tiny.TWINS} - {""}
    assert starts <= outputs
    assert len(outputs) == len(tiny.TWINS)


def test_the_rows_of_the_table_are_in_its_order():
    assert [f"video_30b.{row.__name__}" for row in video_30b.TABLE_3] == list(ROWS)
