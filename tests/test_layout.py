"""Which layouts are refused, before anything is built, and what each refusal says; no ranks needed."""

from dataclasses import replace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from nemo_moviegen.layout import Layout, nearest_bucket
from nemo_moviegen.recipe import VideoRecipe, override
from nemo_moviegen.sizes import VIDEO_30B, VIDEO_TINY

SIX_HEADS_16_TOKENS = "tiny.t2i"  # six heads of width 32, images of 16 tokens, fp32
TWELVE_HEADS_A_RANK = "video_30b.t2iv_768_cp2_4096"  # 48 heads, tensor 4, context 2, bf16

ILLEGAL = [  # recipe, what is changed, words of the message
    (SIX_HEADS_16_TOKENS, ["layout.tensor=0"], ["layout.tensor is 0", "use 1 or more"]),
    (SIX_HEADS_16_TOKENS, ["layout.context=-2"], ["layout.context is -2", "use 1 or more"]),
    (SIX_HEADS_16_TOKENS, ["layout.sharding=zero"], ["layout.sharding is 'zero'", "none, optimizer, full"]),
    (SIX_HEADS_16_TOKENS, ["layout.recompute=all"], ["layout.recompute is 'all'", "none, selective, full"]),
    (SIX_HEADS_16_TOKENS, ["layout.context_comm=ring"], ["context_comm is 'ring'", "all_gather, a2a, p2p"]),
    (SIX_HEADS_16_TOKENS, ["layout.tensor=4"], ["6 heads do not split over tensor 4", "divisor of 6"]),
    (
        SIX_HEADS_16_TOKENS,
        ["data.batching=packed", "micro_batch=2"],
        ["micro_batch is 2", "is one pack", "set micro_batch=1, or data.batching=bucket"],
    ),
    (
        TWELVE_HEADS_A_RANK,  # its paper's all-gather: no kernel of Transformer Engine's takes it with packs
        ["data.batching=packed", "micro_batch=1"],
        ["packs over context ranks by p2p", "context_comm is all_gather", "set layout.context_comm=p2p"],
    ),
    (SIX_HEADS_16_TOKENS, ["data.batching=pack"], ["data.batching is 'pack'", "bucket, balanced or packed"]),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.tensor=3"],
        ["ffn_width 512 does not split over tensor 3", "a divisor of 512 as layout.tensor"],
    ),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.context=3"],
        [
            "1x8x8 has 16 tokens",
            "context 3 x sequence-parallel 1",
            "latent_height=6 latent_width=10, 80x48 px",
        ],
    ),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.tensor=3", "size.ffn_width=513"],
        ["16 tokens", "context 1 x sequence-parallel 3", "divide by 3"],
    ),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.context=16", "precision=bf16"],
        ["an odd number to a rank of context 16", "divide by 32", "latent_height=8 latent_width=16"],
    ),
    (SIX_HEADS_16_TOKENS, ["layout.context=257"], ["divide by 257, or a smaller layout"]),  # prime, > 16 x 16
    (
        SIX_HEADS_16_TOKENS,
        ["layout.context=2", "layout.context_comm=p2p"],
        ["layout.context_comm=p2p", "not in fp32", "set layout.context_comm=all_gather or precision=bf16"],
    ),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.context=4", "layout.context_comm=a2a", "precision=bf16"],
        ["context 4", "tensor 1 leaves 6", "use 1, 2, 3, 6 as layout.context"],
    ),
    (
        TWELVE_HEADS_A_RANK,
        ["layout.context=8", "layout.context_comm=a2a"],
        ["context 8", "tensor 4 leaves 12", "use 1, 2, 3, 4, 6, 12 as layout.context"],
    ),
    (
        SIX_HEADS_16_TOKENS,
        ["layout.context=2", "precision=bf16", "size.num_heads=16"],
        ["heads of width 12", "multiple of 8", "layout.context=1"],
    ),
]

LEGAL = [
    (SIX_HEADS_16_TOKENS, ["layout.tensor=2", "layout.context=8"]),
    (SIX_HEADS_16_TOKENS, ["layout.tensor=3", "layout.sequence=false", "size.ffn_width=513"]),
    (SIX_HEADS_16_TOKENS, ["layout.context=16"]),  # one token a rank: refused in bf16 alone
    (SIX_HEADS_16_TOKENS, ["layout.context_comm=p2p"]),  # one context rank: nothing to send
    (SIX_HEADS_16_TOKENS, ["data.batching=packed", "micro_batch=1", "layout.context=2"]),  # fp32: our own
    (TWELVE_HEADS_A_RANK, ["data.batching=packed", "micro_batch=1", "layout.context_comm=p2p"]),
    (SIX_HEADS_16_TOKENS, ["size.num_heads=16"]),
    (SIX_HEADS_16_TOKENS, ["layout.context=2", "layout.context_comm=a2a", "precision=bf16"]),
    (SIX_HEADS_16_TOKENS, ["layout.context=4", "layout.context_comm=p2p", "precision=bf16"]),
    (TWELVE_HEADS_A_RANK, ["layout.context=4", "layout.context_comm=a2a"]),
    (TWELVE_HEADS_A_RANK, ["layout.sharding=full", "layout.sequence=false", "layout.recompute=selective"]),
    (TWELVE_HEADS_A_RANK, ["layout.sharding=full", "layout.recompute=full"]),
    (TWELVE_HEADS_A_RANK, ["layout.sharding=none", "layout.recompute=full", "layout.context_comm=p2p"]),
]


@pytest.mark.parametrize(("name", "changes", "words"), ILLEGAL, ids=lambda x: " ".join(x)[:60])
def test_a_mix_that_can_not_run_is_refused_with_what_to_change(name, changes, words):
    with pytest.raises(ValueError) as refusal:
        override(recipes.get(name), changes)
    assert not [word for word in words if word not in str(refusal.value)], refusal.value


@pytest.mark.parametrize(("name", "changes"), LEGAL, ids=lambda x: " ".join(x))
def test_a_mix_that_can_run_builds(name, changes):
    assert isinstance(override(recipes.get(name), changes), VideoRecipe)


@pytest.mark.parametrize("context_comm", ["a2a", "p2p"])
def test_a_model_without_transformer_engine_gathers_or_is_not_split(context_comm):
    from nemo_moviegen.video.model import video_config

    layout = Layout(context=2, context_comm=context_comm)
    with pytest.raises(
        ValueError, match=f"context_comm={context_comm} .* set layout.context_comm=all_gather"
    ):
        video_config(tiny.SIZE, layout, "bf16")
    config = video_config(tiny.SIZE, layout, "bf16", uses_transformer_engine=True)
    assert config.cp_comm_type == context_comm
    video_config(tiny.SIZE, replace(layout, context=1), "bf16")


def test_the_bucket_of_an_image_also_fits_the_video():
    recipe = override(recipes.get("video_30b.t2iv_768_cp2_4096"), ["data.buckets="])
    with pytest.raises(ValueError, match="latent of 1x96x96 has 2304 tokens"):
        override(recipe, ["layout.context=7"])
    _, height, width = nearest_bucket(VIDEO_30B, (1, 96, 96), 56)
    fitting = override(recipe, ["layout.context=7", f"latent_height={height}", f"latent_width={width}"])
    assert fitting.latent_frames == 32


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from(
        (VIDEO_TINY, tiny.SIZE, replace(tiny.SIZE, patch_height=3, patch_width=1, max_width=9))
    ),
    divisor=st.integers(1, 60),
    data=st.data(),
)
def test_the_nearest_bucket_fits_and_no_nearer_one_does(size, divisor, data):
    frames = data.draw(st.integers(1, size.max_frames)) * size.patch_frames
    sides = [
        (frames, rows * size.patch_height, columns * size.patch_width)
        for rows in range(1, size.max_height + 1)
        for columns in range(1, size.max_width + 1)
    ]
    asked = data.draw(st.sampled_from(sides))
    tokens = size.num_tokens(asked)
    fitting = [shape for shape in sides if size.num_tokens(shape) % divisor == 0]
    found = nearest_bucket(size, asked, divisor)
    if not fitting:
        assert found is None
        return
    assert found in fitting
    assert abs(size.num_tokens(found) - tokens) == min(abs(size.num_tokens(s) - tokens) for s in fitting)
    if tokens % divisor == 0:
        assert found == asked


def test_a_pack_holds_as_many_tokens_as_the_largest_latent():
    assert recipes.get(TWELVE_HEADS_A_RANK).pack_tokens == 73_728  # 256 frames of 768 px
