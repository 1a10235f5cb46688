"""Parameters and FLOPs against the paper's sizes and against numbers worked out by hand."""

from dataclasses import replace

import pytest

from nemo_moviegen import flops
from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.sizes import AUDIO_13B, UPSAMPLER_7B, VIDEO_5B, VIDEO_30B, VIDEO_TINY, ContextSize

LONGEST = (32, 96, 96)  # 256 frames at 768 px


def total(size):
    return sum(flops.parameters(size).values())


def test_video_30b_has_29_30_billion_parameters():
    assert round(total(VIDEO_30B) / 1e9, 2) == 29.30


def test_the_parts_of_video_30b_are_those_of_its_derivation():
    parts, width = flops.parameters(VIDEO_30B), 6144
    in_blocks = [
        "self_attention_projections",
        "cross_attention_queries",
        "cross_attention_keys_values",
        "ffn",
    ]
    assert sum(parts[name] for name in in_blocks) == 28_991_029_248  # 48 * (8 D^2 + 3 D F)
    assert parts["modulation"] == 226_492_416 + 1_769_472
    assert parts["time_embedding"] == 39_321_600
    assert parts["context_projections"] == 42_074_112 + 36_864
    assert parts["patch_embedding"] + parts["head"] == 786_432
    assert parts["positions"] == (32 + 96 + 96) * width
    assert parts["norms"] == 48 * 2 * width + width


def test_the_other_sizes_count_what_they_are_named_after():
    assert total(UPSAMPLER_7B) == 7_168_426_496
    assert round(total(VIDEO_5B) / 1e9, 2) == 4.92  # 4.83B in the blocks
    parts = flops.parameters(AUDIO_13B)
    extras = ("patch_embedding", "time_embedding", "positions", "context_projections", "norms", "head")
    assert round((total(AUDIO_13B) - sum(parts[name] for name in extras)) / 1e9, 2) == 12.36


def test_switches_add_their_norms():
    plain = replace(VIDEO_TINY, qk_norm=False)
    assert total(VIDEO_TINY) - total(plain) == 4 * 2 * 32  # layers, queries and keys, head width
    assert total(replace(plain, cross_attention_norm=True)) - total(plain) == 4 * 192


@pytest.mark.parametrize(
    ("latent_shape", "printed", "attention_percent"),
    [
        ((1, 32, 32), "5.08e+13", 0.6),
        ((32, 32, 32), "1.510e+15", 15.8),
        ((1, 96, 96), "3.85e+14", 5.0),
        ((16, 96, 96), "1.050e+16", 45.9),
        ((24, 96, 96), "1.935e+16", 56.0),
        ((32, 96, 96), "3.060e+16", 62.9),
    ],
)
def test_training_flops_of_every_sequence_length_with_512_text_tokens(
    latent_shape, printed, attention_percent
):
    digits = len(printed.split("e")[0]) - 2
    assert f"{flops.train_flops(VIDEO_30B, latent_shape, 512):.{digits}e}" == printed
    parts = flops.forward_flops(VIDEO_30B, latent_shape, 512)
    per_token = ["self_attention_projections", "self_attention_scores", "cross_attention_queries"]
    per_token += ["cross_attention_scores", "ffn"]  # the share leaves out what does not grow with the clip
    share = parts["self_attention_scores"] / sum(parts[name] for name in per_token)
    assert round(100 * share, 1) == attention_percent


def test_a_full_clip_costs_3_05e16_flops():
    assert f"{flops.train_flops(VIDEO_30B, LONGEST):.2e}" == "3.05e+16"
    assert (
        f"{flops.train_flops(VIDEO_30B, LONGEST, 0):.3e}" == "3.046e+16"
    )  # 137.7 GFLOP a token, three times


@pytest.mark.parametrize("text_tokens", [0, 256])
def test_the_cost_of_tokens_is_what_train_flops_says_but_for_a_constant_a_sample(text_tokens):
    shapes = [
        (-(-bucket.num_frames // 8), bucket.height_px // 8, bucket.width_px // 8)
        for name in ("video_256", "video_768")
        for bucket in bucket_set(name).buckets
    ]
    for size in (VIDEO_30B, VIDEO_5B):
        linear, quadratic = flops.token_cost(size, text_tokens)
        tokens = [size.num_tokens(shape) for shape in shapes]
        rest = {
            flops.train_flops(size, shape, text_tokens) - linear * S - quadratic * S**2
            for shape, S in zip(shapes, tokens, strict=True)
        }
        assert len(set(tokens)) > 8 and len(rest) == 1
        assert 0 < rest.pop() < 2e-4 * flops.train_flops(size, LONGEST, text_tokens)


def test_flops_of_one_token_in_one_layer_are_those_of_the_derivation():
    parts, each = flops.forward_flops(VIDEO_30B, LONGEST, 0), 73_728 * 48
    assert parts["self_attention_projections"] == each * 301_989_888
    assert parts["self_attention_scores"] == each * 1_811_939_328
    assert parts["cross_attention_queries"] == each * 150_994_944
    assert parts["ffn"] == each * 603_979_776


def test_flops_of_a_model_small_enough_to_count_by_hand():
    text = ContextSize(name="t5", width=3, max_tokens=8)
    size = replace(
        VIDEO_TINY, num_layers=2, width=4, ffn_width=8, num_heads=2, contexts=(text,), time_frequencies=2
    )
    parts = flops.forward_flops(size, (1, 2, 4), 5)  # two tokens of 2*2*16 numbers, five of text
    assert parts == {
        "patch_embedding": 2 * (2 * 64 * 4),
        "time_embedding": 2 * (2 * 4 + 4 * 4),
        "positions": 0,
        "context_projections": 2 * (5 * 3 * 4),
        "modulation": 2 * (4 * 24),
        "self_attention_projections": 2 * 2 * (2 * 4 * 16),
        "self_attention_scores": 2 * 2 * (2 * 2 * 4 + 2 * 2 * 4),
        "cross_attention_queries": 2 * 2 * (2 * 4 * 4 * 2),
        "cross_attention_keys_values": 2 * 2 * (5 * 4 * 4 * 2),
        "cross_attention_scores": 2 * 2 * (2 * 5 * 4 + 2 * 5 * 4),
        "ffn": 2 * 2 * (2 * 3 * 4 * 8),
        "norms": 0,
        "head": 2 * (2 * 4 * 64),
    }


def test_text_goes_to_the_encoders_that_read_all_of_it():
    assert flops.split_text(VIDEO_30B, 257) == {"ul2": 129, "metaclip": 128}
    by_name = flops.forward_flops(VIDEO_30B, LONGEST, {"ul2": 128, "metaclip": 128})
    assert by_name == flops.forward_flops(VIDEO_30B, LONGEST, 256)


def test_impossible_inputs_say_what_is_wrong():
    with pytest.raises(ValueError, match="33 positions, video_30b has 32"):
        flops.forward_flops(VIDEO_30B, (33, 96, 96))
    with pytest.raises(ValueError, match="height 95 is not a positive multiple of the patch's 2"):
        flops.forward_flops(VIDEO_30B, (1, 95, 96))
    with pytest.raises(ValueError, match="-1 text tokens; use 0 or more"):
        flops.forward_flops(VIDEO_30B, LONGEST, -1)
