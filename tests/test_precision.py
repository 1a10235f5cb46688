"""FP8 settings: what megatron and NeMo are told, what must fit, and what a machine without FP8 answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import recipes
from nemo_moviegen import precision
from nemo_moviegen.precision import Fp8
from nemo_moviegen.recipe import Layout, override
from nemo_moviegen.sizes import VIDEO_30B

FP8_ROW = "video_30b.t2iv_768_cp2_4096_fp8"
EMULATED = Fp8(emulated=True)
WITHOUT_CONTEXT = "fp8.bf16_parts=[patch_embedding,time_embedding,modulation,head]"


def test_every_fp8_precision_is_mixed_and_the_others_are_what_they_were():
    mixed = [p for p in precision.PRECISIONS if precision.is_mixed(p)]
    assert mixed == ["bf16", "fp8_delayed", "fp8_current", "fp8_block"]
    assert [p for p in precision.PRECISIONS if precision.is_fp8(p)] == mixed[1:]
    assert precision.fp8_settings("bf16", Fp8(bf16_layers=1)) == precision.fp8_settings("fp32", Fp8()) == {}
    assert precision.fp8_settings("fp8_block", Fp8(emulated=True)) == {}


@pytest.mark.parametrize(
    "name, megatron, bf16_layers",
    [("fp8_delayed", "delayed", 0), ("fp8_current", "tensorwise", 1), ("fp8_block", "blockwise", 2)],
)
def test_megatron_and_nemo_know_what_they_are_told(name, megatron, bf16_layers):
    """Both get one set of names, and NeMo's overwrites megatron's: nothing may differ."""
    import nemo.lightning as nl
    import torch

    from nemo_moviegen.training.module import optimizer_config
    from nemo_moviegen.training.strategy import ddp_config
    from nemo_moviegen.video.model import video_config

    fp8 = Fp8(bf16_layers=bf16_layers, attention=name == "fp8_delayed")
    told = precision.fp8_settings(name, fp8)
    model = video_config(VIDEO_30B, Layout(tensor=4), name, fp8=fp8, uses_transformer_engine=True)
    plugin = nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16, **told).dtype_config
    assert (model.fp8, model.fp8_recipe) == ("hybrid", megatron)
    assert model.first_last_layers_bf16 == (bf16_layers > 0)
    assert {key: getattr(model, key) for key in told} == told == {key: getattr(plugin, key) for key in told}
    assert (model.bf16, model.params_dtype, model.fp8_param) == (True, torch.bfloat16, False)
    assert (plugin.bf16, plugin.grad_reduce_in_fp32) == (True, True)
    assert ddp_config(Layout(), name) == ddp_config(Layout(), "bf16")
    assert model.fp8_dot_product_attention == (name == "fp8_delayed")
    recipe = replace(recipes.get(FP8_ROW), precision=name, fp8=Fp8(bf16_layers=bf16_layers))
    assert optimizer_config(recipe) == optimizer_config(replace(recipe, precision="bf16"))


def test_a_model_without_transformer_engine_is_not_built_in_fp8():
    from nemo_moviegen.video.model import video_config

    with pytest.raises(ValueError, match="precision=fp8_block is Transformer Engine's alone"):
        video_config(VIDEO_30B, Layout(), "fp8_block")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["data.token_limits.ul2=255"],
            r"prompts have up to 639: set data\.token_limits to a sum that 8 divides",
        ),
        (["data.batching=packed", "layout.context=1"], r"packs have any number: set data\.batching=bucket"),
        (
            ["precision=fp8_delayed"],
            r"megatron keeps no layer in bf16 with delayed scaling: set fp8\.bf16_layers=0",
        ),
        (["fp8.bf16_layers=25"], r"fp8\.bf16_layers 25 at each end of 48 layers: use 0 to 24"),
        (
            ["precision=fp8_delayed", "fp8.bf16_layers=0", WITHOUT_CONTEXT],
            "context_projections is outside: add it to fp8.bf16_parts, or set precision=fp8_current",
        ),
        (
            ["fp8.bf16_parts=[patch_embedding,head,context_projections,modulation]"],
            "time_embedding has a row a clip, 1 of micro_batch, and FP8 takes 8s: add it to fp8.bf16_parts",
        ),
        (
            ["fp8.bf16_parts=[time_embedding,modulation,context_projections]"],
            "2352 tokens, which in micro-batches of 1 on context 2 x sequence-parallel 4 are no 8s",
        ),
        (["fp8.attention=true"], "fp8.attention on Hopper takes delayed scaling: set precision=fp8_delayed"),
        (
            ["fp8.attention=true", "precision=fp8_delayed", "fp8.bf16_layers=0"],
            "fp8.attention over context 2 gathers no keys: set layout.context_comm=a2a or p2p",
        ),
        (["fp8.gathers=true", "fp8.emulated=true"], "set fp8.attention=false and fp8.gathers=false"),
        (["fp8.gathers=true", "layout.sharding=none"], "layout.sharding is none: set layout.sharding=opt"),
        (["size.ffn_width=16392"], r"tensor 4 leaves 1536 of size\.width and 4098 of size\.ffn_width"),
        (
            ["data.buckets=", "latent_height=90", "latent_width=90", "latent_frames=4", "layout.tensor=1"],
            r"latent of 1x90x90 has 2025 tokens",
        ),
    ],
)
def test_what_is_no_fp8_matrix_is_refused_when_the_recipe_is_built(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        override(recipes.get(FP8_ROW), changes)
    assert "\n" not in str(error.value)


def test_tokens_are_counted_over_a_micro_batch():
    """An image of 2,312 tokens leaves 1,156 to a rank of context 2, no multiple of 8; two of them are one."""
    shape = {"latent_frames": 1, "latent_height": 68, "latent_width": 136}
    one = replace(recipes.get(FP8_ROW), layout=Layout(context=2))
    one = replace(one, data=replace(one.data, buckets="", image_every=1), micro_batch=2, **shape)
    with pytest.raises(ValueError, match=r"2312 tokens.*in micro-batches of 1 on context 2 are no 8s"):
        replace(one, micro_batch=1)
    replace(one, micro_batch=1, precision="bf16")


@pytest.mark.parametrize(
    "name, capability, engine, said",
    [
        ("fp8_current", None, True, "a GPU of compute capability 8.9 or more, and here is none"),
        ("fp8_current", (8, 0), True, "8.9 or more, and this one has 8.0"),
        ("fp8_block", (8, 9), True, "9.0 or more, and this one has 8.9"),
        ("fp8_block", (9, 0), False, "Transformer Engine, which is not installed"),
        ("fp8_block", (9, 0), True, ""),
        ("fp8_delayed", (8, 9), True, ""),
    ],
)
def test_a_machine_says_what_it_lacks_for_fp8(name, capability, engine, said):
    assert said in precision.why_not_fp8(name, capability, engine)
    assert bool(said) == bool(precision.why_not_fp8(name, capability, engine))


def test_a_run_on_a_cpu_refuses_fp8_in_one_line_that_says_what_to_set():
    from nemo_moviegen.training.run import uses_transformer_engine

    run = SimpleNamespace(name="x", precision="fp8_current", fp8=Fp8())
    with pytest.raises(
        ValueError, match=r"x trains in fp8_current, which takes a GPU.*: set precision=bf16, or fp8.emulated"
    ):
        uses_transformer_engine(run)
    assert not uses_transformer_engine(SimpleNamespace(name="x", precision=run.precision, fp8=EMULATED))


def test_an_autoencoder_has_no_fp8_and_no_plateau():
    for change in ("precision=fp8_block", "optim.decay=plateau"):
        with pytest.raises(ValueError, match="an autoencoder trains in bf16, fp32 or fp64"):
            override(recipes.get("tae.tiny"), [change])


def test_validation_is_measured_in_bf16_and_training_goes_on_in_fp8():
    from nemo_moviegen.video.model import without_fp8

    config = SimpleNamespace(fp8="hybrid")
    with pytest.raises(RuntimeError), without_fp8(config):
        assert config.fp8 is None
        raise RuntimeError
    assert config.fp8 == "hybrid"
