"""MFU and HFU against numbers worked out by hand, for clips, images and packs of both."""

import pytest

from nemo_moviegen import flops
from nemo_moviegen.recipe import Layout
from nemo_moviegen.sizes import VIDEO_30B, ContextSize, TransformerSize
from nemo_moviegen.utilisation import RECOMPUTED, counting_error, real_text_tokens, step_flops, utilisation

SMALL = TransformerSize(
    name="small",
    num_layers=1,
    width=4,
    ffn_width=8,
    num_heads=1,
    input_channels=1,
    output_channels=1,
    contexts=(ContextSize(name="ul2", width=2, max_tokens=9),),
    time_frequencies=2,
)
CLIP, IMAGE = (2, 4, 4), (1, 4, 4)  # 8 tokens and 4, in patches of 4 numbers
TEXT = {"ul2": 3}
CLIP_FORWARD = (
    256  # 8 tokens x 4 x 4, patch embedding
    + 48  # time: 2 x 4 and 4 x 4
    + 48  # 3 text tokens x 2 x 4
    + 192  # six modulations of 4 x 4
    + 1024  # q, k, v, out: 8 x 4 matrices of 4 x 4
    + 1024  # 8 x 8 scores and their values, 4 wide
    + 512 + 192 + 384  # cross-attention: q and out, 3 keys and values, 8 x 3 scores
    + 1536  # 8 x 3 matrices of 4 x 8
    + 256  # head
)  # fmt: skip
IMAGE_FORWARD = 128 + 48 + 48 + 192 + 512 + 256 + 256 + 192 + 192 + 768 + 128
assert (CLIP_FORWARD, IMAGE_FORWARD) == (5472, 2720)


def test_a_clip_costs_three_forward_passes_of_its_own_shape_and_prompt():
    assert step_flops(SMALL, {CLIP: 1}, text_tokens=TEXT) == (3 * 5472, 0)


def test_a_step_of_clips_and_images_costs_their_sum_as_does_a_pack_of_them():
    model, _ = step_flops(SMALL, {CLIP: 2, IMAGE: 3}, text_tokens=TEXT)
    assert model == 3 * (2 * 5472 + 3 * 2720)
    assert (
        model < step_flops(SMALL, {(4, 4, 4): 1, IMAGE: 3}, text_tokens=TEXT)[0]
    )  # 16 tokens see each other


@pytest.mark.parametrize(
    ("recompute", "clip", "image"),
    [
        ("none", 0, 0),
        ("selective", 1536, 768),
        ("full", 1024 + 1024 + 512 + 192 + 384 + 1536, 512 + 256 + 256 + 192 + 192 + 768),
    ],
)
def test_recomputation_adds_what_the_backward_pass_runs_again(recompute, clip, image):
    assert step_flops(SMALL, {CLIP: 2, IMAGE: 3}, recompute, TEXT)[1] == 2 * clip + 3 * image


def test_every_way_of_recomputing_is_counted():
    for recompute in RECOMPUTED:
        Layout(recompute=recompute)
    assert RECOMPUTED.keys() == {"none", "selective", "full"}
    assert set().union(*RECOMPUTED.values()) <= set(flops.COMPONENTS)


def test_full_recomputation_of_the_30b_costs_nearly_one_forward_pass_more():
    model, again = step_flops(VIDEO_30B, {(32, 96, 96): 1}, "full")
    assert 0.999 < 3 * again / model < 1


def test_mfu_is_the_models_share_of_the_peak_of_all_ranks_and_hfu_adds_what_is_recomputed():
    found = utilisation(8e15, 2e15, seconds=10, num_ranks=2, peak_tflops=1000)
    assert found == pytest.approx({"speed/tflops_per_gpu": 400, "speed/mfu": 0.4, "speed/hfu": 0.5})


def test_an_unknown_peak_gives_no_mfu_at_all():
    assert utilisation(8e15, 2e15, 10, 2, peak_tflops=0) == {"speed/tflops_per_gpu": 400}


def test_the_paper_sized_clip_at_the_published_best_is_no_counting_error_but_sparse_flops_are():
    assert counting_error(0.482) == ""
    assert "counting error: 96.4% of the dense peak" in counting_error(2 * 0.482)
    assert "any known kernel reaches, 80%" in counting_error(0.81)
    assert "the dense peak itself" in counting_error(1.2)
    assert "peak_dense_tflops" in counting_error(1.2)


def test_text_tokens_are_the_mean_over_the_prompts_that_were_seen():
    tokens = real_text_tokens({"ul2": 30, "byt5": 0}, 4)
    assert tokens == {"ul2": 7.5, "byt5": 0}
    of_mean = step_flops(SMALL, {CLIP: 2}, text_tokens={"ul2": 4.5})[0]
    one_by_one = sum(step_flops(SMALL, {CLIP: 1}, text_tokens={"ul2": n})[0] for n in (3, 6))
    assert of_mean == one_by_one  # linear in the text: the mean is exact for one shape
