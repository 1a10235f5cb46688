"""The backbone alone: shapes, positions, conditions, errors, and a count that equals the plain numbers."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen import flops, sizes
from nemo_moviegen.recipe import Layout
from nemo_moviegen.training.checkpoint import join_process_groups
from nemo_moviegen.training.cpu import stand_in_for_cuda
from nemo_moviegen.video.embeddings import (
    ContextProjections,
    FactorizedPositions,
    TimeEmbedding,
    patchify,
    unpatchify,
)


def build(size=tiny.SIZE, precision="fp64", **config_fields):
    from nemo_moviegen.video.model import VideoTransformer, video_config

    join_process_groups(Layout())
    config = video_config(size, Layout(), precision)
    for name, value in config_fields.items():
        setattr(config, name, value)
    return VideoTransformer(config)


def on_one_rank(fn, *args):
    stand_in_for_cuda()
    return run_on_ranks(fn, *args, world_size=1)[0]


def _count(size):
    with torch.device("meta"):
        model = build(size, "bf16", perform_initialization=False)
    return sum(p.numel() for p in model.parameters()), model.config


@pytest.mark.parametrize("name", sizes.SIZES)
def test_the_plain_count_is_the_built_model_exactly(name):
    built, config = on_one_rank(_count, sizes.SIZES[name])
    assert built == sum(flops.parameters(sizes.SIZES[name]).values())
    assert (config.normalization, config.layernorm_epsilon, config.add_bias_linear) == (
        "RMSNorm",
        1e-5,
        False,
    )
    assert config.num_query_groups == config.num_attention_heads  # MHA, no GQA


def _dit():
    built, config = _count(tiny.DIT_SIZE)
    model = build(tiny.DIT_SIZE)
    tiny.open_gates(model)
    batch, t_B = tiny.batch(2), torch.tensor([0.2, 0.7], dtype=torch.float64)
    seen = {}

    def keep(module, inputs, output):
        seen[type(module).__name__] = inputs, output

    layer = model.decoder.layers[0]
    for module in (layer.input_layernorm, layer.mlp, layer.mlp.linear_fc1):
        module.register_forward_hook(keep)
    model.velocity(batch.latent_BTCHW, t_B, batch.contexts, batch.masks)
    return built, config, seen, dict(layer.mlp.named_parameters())


def test_a_dit_block_has_layer_norms_without_weights_biases_and_silu():
    """Table 9: what s3.6.2 compares with."""
    built, config, seen, mlp = on_one_rank(_dit)
    assert built == sum(flops.parameters(tiny.DIT_SIZE).values())
    assert (config.layernorm_epsilon, config.add_bias_linear, config.gated_linear_unit) == (1e-6, True, False)
    (x, scale, shift), normed = seen["ModulatedLayerNorm"]
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (normed - unit * (1 + scale) - shift).abs().max() < 1e-12
    (x, *_), (mixed, bias) = seen["MLP"]
    hidden = torch.nn.functional.silu(x @ mlp["linear_fc1.weight"].T + mlp["linear_fc1.bias"])
    assert (mixed - hidden @ mlp["linear_fc2.weight"].T).abs().max() < 1e-12
    assert torch.equal(bias, mlp["linear_fc2.bias"]) and bias.abs().min() > 0


@pytest.mark.parametrize("fields", [{"block": "gpt"}, {"block": "dit", "gated_ffn": True}])
def test_a_block_that_is_not_there_is_refused(fields):
    with pytest.raises(ValueError, match="use block llama, or dit with gated_ffn=false"):
        replace(tiny.SIZE, **fields)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_patches_go_back_where_they_came_from(frames, rows, columns):
    latent = torch.randn(2, frames, 4, 2 * rows, 2 * columns)
    tokens = patchify(latent, tiny.SIZE)
    assert tokens.shape == (frames * rows * columns, 2, 16)
    assert torch.equal(unpatchify(tokens, (frames, 2 * rows, 2 * columns), tiny.SIZE), latent)


def test_a_token_is_one_patch_and_knows_its_frame_row_and_column():
    latent = torch.zeros(1, 3, 4, 8, 4)
    latent[0, 1, :, 4:6, 2:4] = 1  # frame 1, row 2, column 1
    tokens = patchify(latent, tiny.SIZE)
    (token,) = tokens[:, 0].sum(dim=1).nonzero().flatten().tolist()
    assert tokens[token].eq(1).all()
    indices = FactorizedPositions(tiny.SIZE).token_indices((3, 8, 4))
    assert indices[token].tolist() == [1, 2, 1] and len(indices) == 24


def test_positions_are_the_sum_of_the_three_tables():
    positions = FactorizedPositions(tiny.SIZE)
    for table in positions.parameters():
        torch.nn.init.normal_(table)
    got = positions(torch.tensor([[2, 1, 0]]))
    assert torch.equal(got[0, 0], positions.frame[2] + positions.row[1] + positions.column[0])


def test_neighbouring_times_have_different_embeddings_also_in_bf16():
    embed = TimeEmbedding(sizes.VIDEO_TINY).bfloat16()
    early, late = embed(torch.tensor([0.9000, 0.9002], dtype=torch.float64))
    assert (early - late).abs().max() > 1e-3


def test_context_is_one_sequence_in_the_order_of_the_encoders():
    projections = ContextProjections(tiny.SIZE).double()
    batch = tiny.batch(2)
    context, mask = projections(batch.contexts, batch.masks)
    assert context.shape == (7 + 5 + 3, 2, 32) and mask.shape == (2, 15)
    metaclip = projections.norms[1](projections.linears[1](batch.contexts[1]))
    assert torch.equal(context[7:12], metaclip.transpose(0, 1))


def _padding_and_prompts():
    model = build()
    tiny.open_gates(model)
    batch = tiny.batch(2)
    x, t = batch.latent_BTCHW, torch.tensor([0.2, 0.7], dtype=torch.float64)
    plain = model.velocity(x, t, batch.contexts, batch.masks)
    noisy = tuple(torch.where(m[..., None], c, 1e3) for c, m in zip(batch.contexts, batch.masks, strict=True))
    padded = model.velocity(x, t, noisy, batch.masks)
    other_prompt = model.velocity(x, t, tuple(c.flip(0) for c in batch.contexts), batch.masks)
    alone = model.velocity(
        x[:1], t[:1], tuple(c[:1] for c in batch.contexts), tuple(m[:1] for m in batch.masks)
    )
    return plain, padded, other_prompt, alone


def test_padding_is_invisible_prompts_are_not_and_samples_do_not_see_each_other():
    plain, padded, other_prompt, alone = on_one_rank(_padding_and_prompts)
    assert torch.equal(plain, padded)
    assert (plain - other_prompt).abs().max() > 1e-3
    assert (plain[:1] - alone).abs().max() < 1e-12


def test_a_plain_gelu_ffn_has_a_configuration_with_either_kernels():
    """Megatron refuses its fused GELU without a bias; its fused SwiGLU takes none."""
    from nemo_moviegen.video.model import video_config

    for fused in (True, False):
        plain = video_config(sizes.AUDIO_13B, Layout(), "bf16", uses_transformer_engine=fused)
        gated = video_config(sizes.VIDEO_30B, Layout(), "bf16", uses_transformer_engine=fused)
        assert not plain.bias_activation_fusion and gated.bias_activation_fusion == fused


def _fresh_velocity():
    batch = tiny.batch(1)
    t = torch.tensor([0.5], dtype=torch.float64)
    return build().velocity(batch.latent_BTCHW, t, batch.contexts, batch.masks)


def test_a_fresh_model_moves_nothing():
    assert on_one_rank(_fresh_velocity).eq(0).all()


def _error_of(change):
    model, batch = build(), change(tiny.batch(1))
    t = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        model(batch.latent_BTCHW, t, batch.contexts, batch.masks)
    return str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: replace(b, latent_BTCHW=b.latent_BTCHW[:, :, :3]), r"takes \[B, T, 4, H, W\]"),
        (
            lambda b: replace(b, latent_BTCHW=b.latent_BTCHW[..., :3]),
            "latent width 3 is not a positive multiple",
        ),
        (
            lambda b: replace(b, latent_BTCHW=b.latent_BTCHW.repeat(1, 2, 1, 1, 1)),
            "has 4; raise size.max_frames",
        ),
        (lambda b: replace(b, contexts=b.contexts[:2], masks=b.masks[:2]), "takes ul2, metaclip, byt5"),
        (lambda b: replace(b, contexts=(b.contexts[1], *b.contexts[1:])), "ul2 features are 16 wide"),
    ],
)
def test_wrong_shapes_say_what_the_model_takes(change, message):
    import re

    assert re.search(message, on_one_rank(_error_of, change))
