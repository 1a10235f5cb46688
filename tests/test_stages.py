"""A stage that starts from another stage's weights: the function it keeps, and what it refuses."""

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen.recipe import Layout
from nemo_moviegen.sizes import VIDEO_30B, ContextSize, TransformerSize
from nemo_moviegen.training import stages
from nemo_moviegen.training.checkpoint import join_process_groups
from nemo_moviegen.training.cpu import stand_in_for_cuda
from nemo_moviegen.training.stages import Growth, check_transition, grow, plan_transition

CASES = settings(derandomize=True, deadline=None, max_examples=50)
VISION = ContextSize(name="vision", width=12, max_tokens=4)
T = torch.tensor([0.2, 0.7], dtype=torch.float64)


def transitions(*new_sizes):
    """For each size, what a forked rank finds: lines, weights before and after, velocities of both models."""
    stand_in_for_cuda()
    return run_on_ranks(_transitions, new_sizes, world_size=1)[0]


def _transitions(new_sizes):
    from nemo_moviegen.video.model import VideoTransformer, video_config

    join_process_groups(Layout())
    old = VideoTransformer(video_config(tiny.SIZE, Layout(), "fp64"))
    tiny.open_gates(old)
    with torch.no_grad():
        old.patch_embedding.weight.copy_(on_grid(old.patch_embedding.weight))
    return [
        _transition(old, VideoTransformer(video_config(new_size, Layout(), "fp64"), seed=1))
        for new_size in new_sizes
    ]


def _transition(old, new):
    old_weights, fresh = ({name: p.detach().clone() for name, p in m.named_parameters()} for m in (old, new))
    plan = plan_transition(shapes(old_weights), old.size, shapes(fresh), new.size)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            growth = plan.growths[name]
            parameter.copy_(grow(name, old_weights.get(growth.source), growth, fresh[name]))
    new_weights = {name: p.detach().clone() for name, p in new.named_parameters()}
    batch = tiny.batch(2)
    batch = replace(batch, latent_BTCHW=on_grid(batch.latent_BTCHW))
    before = old.velocity(batch.latent_BTCHW, T, batch.contexts, batch.masks)
    after = new.velocity(*_inputs(batch, new.size))
    return plan.describe(), old_weights, fresh, new_weights, before, after


def _inputs(batch, size):
    """The batch for a model of this size: noise in channels, and no token of encoders, that are new."""
    generator = torch.Generator().manual_seed(5)
    latent = batch.latent_BTCHW
    more = (*latent.shape[:2], size.input_channels - latent.shape[2], *latent.shape[3:])
    new_channels = 100 * torch.randn(more, generator=generator, dtype=torch.float64)
    wide = torch.cat((latent, new_channels), dim=2)
    known = {c.name: pair for c, *pair in zip(tiny.CONTEXTS, batch.contexts, batch.masks, strict=True)}
    empty = [torch.ones(2, 1, VISION.width, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.bool)]
    contexts, masks = zip(*(known.get(c.name, empty) for c in size.contexts), strict=True)
    return wide, T, contexts, masks


def on_grid(values):
    """Multiples of 1/64: fp64 sums of their products are exact, so a longer sum can be held to equality."""
    return (values * 64).round() / 64


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


SAME = replace(tiny.SIZE, name="another name")
LONGER = replace(tiny.SIZE, max_frames=9)
LARGER = replace(tiny.SIZE, max_height=18, max_width=12)
WIDER = replace(tiny.SIZE, input_channels=7)
SEEING = replace(tiny.SIZE, contexts=(VISION, *reversed(tiny.CONTEXTS)))
ALL = replace(SEEING, max_frames=9, max_height=18, max_width=12, input_channels=7)


@pytest.fixture(scope="module")
def results():
    sizes = (SAME, LONGER, LARGER, WIDER, SEEING, ALL)
    return dict(zip(sizes, transitions(*sizes), strict=True))


def assert_others_are_copied(found, *changed):
    _, old, _, new, *_ = found
    for name in new:
        if name not in changed:
            assert torch.equal(new[name], old[name]), name


def test_a_model_of_the_same_size_takes_every_weight_bit_for_bit(results):
    lines, old, fresh, new, before, after = results[SAME]
    assert_others_are_copied(results[SAME])
    assert lines == [f"{len(new)} of {len(new)} parameters copied"]
    assert torch.equal(before, after) and before.abs().max() > 0.1
    assert not torch.equal(old["positions.row"], fresh["positions.row"])


def test_a_clip_of_the_old_length_has_exactly_the_old_velocity_after_frames_are_appended(results):
    lines, old, fresh, new, before, after = results[LONGER]
    assert_others_are_copied(results[LONGER], "positions.frame")
    assert torch.equal(new["positions.frame"][:4], old["positions.frame"])
    assert torch.equal(new["positions.frame"][4:], fresh["positions.frame"][4:])
    assert torch.equal(before, after)
    assert "positions.frame [4, 32] -> [9, 32]: rows 0..3 kept, rows 4..8 fresh" in lines


def test_tables_grow_to_the_places_numpy_interpolates(results):
    lines, old, _, new, *_ = results[LARGER]
    assert_others_are_copied(results[LARGER], "positions.row", "positions.column")
    for name, factor in (("positions.row", 3), ("positions.column", 2)):
        places = (np.arange(6 * factor) + 0.5) / factor - 0.5
        expected = np.stack([np.interp(places, np.arange(6), column) for column in old[name].numpy().T], 1)
        torch.testing.assert_close(new[name], torch.from_numpy(expected), rtol=0, atol=1e-15)
        corners = new[name][[0, -1]]
        assert torch.equal(corners, old[name][[0, -1]])
    # of three new rows to an old one, the middle one is the old one
    assert torch.equal(new["positions.row"][1::3], old["positions.row"])
    assert "positions.row [6, 32] -> [18, 32]: interpolated, 3 rows for each old one" in lines


def test_whatever_new_channels_hold_the_velocity_is_exactly_the_old_one(results):
    lines, old, _, new, before, after = results[WIDER]
    assert_others_are_copied(results[WIDER], "patch_embedding.weight")
    assert torch.equal(before, after) and before.abs().max() > 0.1
    by_channel = new["patch_embedding.weight"].reshape(32, 4, 7)
    assert torch.equal(by_channel[..., :4], old["patch_embedding.weight"].reshape(32, 4, 4))
    assert by_channel[..., 4:].eq(0).all()
    assert "patch_embedding.weight [32, 16] -> [32, 28]: widened with zeros for input channels 4..6" in lines


def test_each_encoder_keeps_its_projection_where_another_is_put_before_it(results):
    lines, old, fresh, new, before, after = results[SEEING]
    for place, context in enumerate(SEEING.contexts):
        for kind in ("linears.{}.weight", "norms.{}.weight", "norms.{}.bias"):
            name = "context_projections." + kind.format(place)
            if context is VISION:
                assert torch.equal(new[name], fresh[name])
            else:
                source = "context_projections." + kind.format(tiny.CONTEXTS.index(context))
                assert torch.equal(new[name], old[source])
    # keys are summed in another order
    torch.testing.assert_close(before, after, rtol=0, atol=1e-13)
    prefix = "context_projections.linears"
    assert f"{prefix}.1.weight [32, 8]: copied from {prefix}.2.weight, where byt5 stood" in lines
    assert (
        f"{prefix}.0.weight [32, 12]: new and fresh; the old function where a sample has no token of vision"
        in lines
    )


def test_all_differences_at_once_are_each_of_them(results):
    _, _, _, new, *_ = results[ALL]
    for size, names in {
        LONGER: ["positions.frame"],
        LARGER: ["positions.row", "positions.column"],
        WIDER: ["patch_embedding.weight"],
        SEEING: ["context_projections.linears.1.weight", "context_projections.norms.3.bias"],
    }.items():
        for name in names:
            if name == "positions.frame":  # fresh rows are drawn anew
                assert torch.equal(new[name][:4], results[size][3][name][:4])
            else:
                assert torch.equal(new[name], results[size][3][name])


def interpolated(table, length):
    growth = Growth(
        how="interpolate",
        source="positions.row",
        old_shape=tuple(table.shape),
        new_shape=(length, table.shape[1]),
    )
    return grow("positions.row", table, growth)


@CASES
@given(rows=st.integers(1, 40), more=st.integers(1, 90), seed=st.integers(0, 10**6))
def test_any_table_grows_as_numpy_interpolates_between_the_middles_of_patches(rows, more, seed):
    table = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 3)))
    length = rows + more
    middles, wanted = (np.arange(rows) + 0.5) / rows, (np.arange(length) + 0.5) / length
    expected = np.stack([np.interp(wanted, middles, column) for column in table.numpy().T], 1)
    torch.testing.assert_close(interpolated(table, length), torch.from_numpy(expected), rtol=0, atol=1e-12)


@CASES
@given(rows=st.integers(1, 30), factor=st.integers(2, 5), used=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_a_picture_scaled_up_sees_the_positions_it_saw_however_much_of_the_table_it_fills(
    rows, factor, used, seed
):
    """The mean position of the patches an old patch became, and the order of positions on a ramp."""
    ramp = torch.arange(rows, dtype=torch.float64)[:, None] + seed
    grown = interpolated(ramp, rows * factor)
    patches = max(1, round(used * rows))
    means = grown[: patches * factor].reshape(patches, factor).mean(1, keepdim=True)
    inner = slice(1, patches if patches < rows else rows - 1)  # the ends of the table are repeated
    torch.testing.assert_close(means[inner], ramp[:patches][inner], rtol=0, atol=1e-9)
    assert (grown.diff(dim=0) >= 0).all() and grown.min() == ramp.min() and grown.max() == ramp.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_table_is_interpolated_exactly_and_rounded_once(dtype):
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4))).to(dtype)
    wide = interpolated(table.double(), 12)
    assert torch.equal(interpolated(table, 12), wide.to(dtype))


def test_a_whole_new_part_is_listed_and_starts_as_the_new_model_says():
    old = {"head.weight": (4, 8)}
    plan = plan_transition(old, tiny.SIZE, old | {"task_embedding.weight": (8, 3)}, tiny.SIZE)
    line = "task_embedding.weight [8, 3]: new, as the new model initialises it"
    assert plan.describe() == ["1 of 2 parameters copied", line]
    fresh = torch.randn(8, 3)
    assert grow("task_embedding.weight", None, plan.growths["task_embedding.weight"], fresh) is fresh


DIFFERENT = {
    "num_layers": 3,
    "width": 64,
    "ffn_width": 96,
    "num_heads": 2,
    "output_channels": 8,
    "patch_frames": 2,
    "patch_height": 1,
    "patch_width": 1,
    "block": "dit",
    "gated_ffn": False,
    "qk_norm": False,
    "cross_attention_norm": False,
    "time_frequencies": 32,
}


@pytest.mark.parametrize("field", stages.FIXED)
def test_a_field_that_no_stage_changes_is_refused_by_name(field):
    before = replace(tiny.SIZE, gated_ffn=field != "block")  # a dit block has a plain FFN
    with pytest.raises(ValueError) as error:
        check_transition(before, replace(before, name="next", **{field: DIFFERENT[field]}))
    old, new = getattr(before, field), DIFFERENT[field]
    assert str(error.value).splitlines() == [
        "next can not start from weights of test:",
        f"  {field} is {new}, those weights have {old}: set size.{field}={old}",
    ]


@pytest.mark.parametrize("field", ["max_frames", "max_height", "max_width", "input_channels"])
def test_nothing_shrinks(field):
    old = getattr(tiny.SIZE, field)
    with pytest.raises(
        ValueError, match=f"{field} shrinks from {old} to 2: set size.{field} to {old} or mor"
    ):
        check_transition(tiny.SIZE, replace(tiny.SIZE, **{field: 2}))


def test_an_encoder_that_is_dropped_or_of_another_width_is_refused():
    ul2, _, byt5 = tiny.CONTEXTS
    changed = replace(tiny.SIZE, contexts=(replace(ul2, width=9), byt5))
    with pytest.raises(ValueError) as error:
        check_transition(tiny.SIZE, changed)
    assert "features of ul2 are 9 wide, those weights take 24" in str(error.value)
    assert "contexts lack metaclip" in str(error.value) and "byt5" not in str(error.value)
    longer_prompts = tuple(replace(context, max_tokens=99) for context in tiny.CONTEXTS)
    check_transition(tiny.SIZE, replace(tiny.SIZE, contexts=longer_prompts))


def test_every_field_of_a_size_is_decided_about():
    decided = {"name", "input_channels", "contexts", *stages.FIXED, *stages.TABLES.values()}
    assert decided == {field.name for field in fields(TransformerSize)}


def test_all_mismatches_come_in_one_message():
    old = {
        "positions.frame": (4, 32),
        "decoder.layers.0.mlp.linear_fc1.weight": (128, 32),
        "decoder.layers.1.mlp.linear_fc1.weight": (128, 32),
        "decoder.layers.2.mlp.linear_fc1.weight": (128, 32),
        "decoder.layers.1.q_layernorm.weight": (8,),
        "head.weight": (16, 32),
        "head.bias": (16,),
    }
    new = {
        "positions.frame": (3, 32),
        "decoder.layers.0.mlp.linear_fc1.weight": (96, 32),
        "decoder.layers.1.mlp.linear_fc1.weight": (96, 32),
        "decoder.layers.2.mlp.linear_fc1.weight": (96, 32),
        "decoder.layers.3.mlp.linear_fc1.weight": (96, 32),
        "head.weight": (32, 32),
    }
    old_size, new_size = tiny.SIZE, replace(tiny.SIZE, name="next", ffn_width=96, max_frames=3)
    with pytest.raises(ValueError) as error:
        plan_transition(old, old_size, new, new_size)
    assert str(error.value).splitlines() == [
        "next can not start from weights of test:",
        "  ffn_width is 96, those weights have 64: set size.ffn_width=64",
        "  max_frames shrinks from 4 to 3: set size.max_frames to 4 or more",
        "  positions.frame is [3, 32], those weights have [4, 32]",
        "  decoder.layers.0..2.mlp.linear_fc1.weight is [96, 32], those weights have [128, 32]",
        "  decoder.layers.3.mlp.linear_fc1.weight is [96, 32], those weights have none of it",
        "  head.weight is [32, 32], those weights have [16, 32]",
        "  decoder.layers.1.q_layernorm.weight is not in the new model, those weights have [8]",
        "  head.bias is not in the new model, those weights have [16]",
    ]


def test_weights_that_lack_a_part_of_a_module_are_refused_not_filled_with_fresh_ones():
    new = {"head.weight": (16, 32), "head.bias": (16,)}
    with pytest.raises(ValueError, match=r"head.bias is \[16\], those weights have none of it"):
        plan_transition({"head.weight": (16, 32)}, tiny.SIZE, new, tiny.SIZE)
    linear, norm = "context_projections.linears.1.weight", "context_projections.norms.1.weight"
    with pytest.raises(ValueError, match=f"{norm} is .* have none of it"):
        plan_transition({linear: (32, 16)}, tiny.SIZE, {linear: (32, 16), norm: (32,)}, tiny.SIZE)


def test_a_patch_embedding_that_contradicts_its_size_is_refused():
    old, new = {"patch_embedding.weight": (32, 16)}, {"patch_embedding.weight": (32, 24)}
    with pytest.raises(
        ValueError, match=r"patch_embedding.weight is \[32, 24\], those weights have \[32, 16"
    ):
        plan_transition(old, tiny.SIZE, new, WIDER)


def test_a_tensor_of_another_shape_than_planned_is_refused_by_name():
    plan = plan_transition({"head.weight": (16, 32)}, tiny.SIZE, {"head.weight": (16, 32)}, tiny.SIZE)
    with pytest.raises(
        ValueError, match=r"head.weight: the checkpoint's tensor is \[16, 31\], the plan needs"
    ):
        grow("head.weight", torch.zeros(16, 31), plan.growths["head.weight"])
    with pytest.raises(ValueError, match=r"head.weight: the checkpoint's tensor is missing"):
        grow("head.weight", None, plan.growths["head.weight"])


def test_the_stages_of_the_paper_are_allowed_and_back_is_not():
    images = replace(VIDEO_30B, max_frames=1, max_height=16, max_width=16)
    joint = replace(VIDEO_30B, max_height=32, max_width=32)  # s3.1.3: twice the tables, 32 latent frames
    editing = replace(VIDEO_30B, input_channels=32)
    for before, after in ((images, joint), (joint, VIDEO_30B), (VIDEO_30B, editing)):
        check_transition(before, after)
        with pytest.raises(ValueError, match="shrinks"):
            check_transition(after, before)


def test_sizes_are_checked_without_torch():
    code = "import sys, nemo_moviegen.training.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
