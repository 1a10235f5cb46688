"""`moviegen bench steps`: what is compared is the same work, ways take turns, one that fails is told."""

import json
import sys
import time
from dataclasses import replace

import diffusers  # noqa: F401, the children of the benchmark then need not import it
import pytest
import tiny
import torch
from megatron.core import parallel_state
from ranks import run_on_ranks

from nemo_moviegen.bench import steps
from nemo_moviegen.bench.plain import PlainTransformer
from nemo_moviegen.bench.turns import in_turns
from nemo_moviegen.layout import Layout
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.training.cpu import stand_in_for_cuda

SIZE = replace(VIDEO_TINY, width=32, ffn_width=64, num_heads=4, num_layers=2)
CASE = {"size": SIZE, "latent_shape": (2, 8, 8), "batch": 2, "steps_a_turn": 2}
NAMES = {
    "modulation_bias": "modulation_bias",
    "input_layernorm.weight": "norm1.weight",
    "pre_cross_attn_layernorm.weight": "norm2.weight",
    "pre_mlp_layernorm.weight": "norm3.weight",
    "self_attention.linear_qkv.weight": "qkv.weight",
    "self_attention.q_layernorm.weight": "query_norm.weight",
    "self_attention.k_layernorm.weight": "key_norm.weight",
    "self_attention.linear_proj.weight": "out.weight",
    "cross_attention.linear_q.weight": "text_query.weight",
    "cross_attention.linear_kv.weight": "text_key_value.weight",
    "cross_attention.linear_proj.weight": "text_out.weight",
    "mlp.linear_fc1.weight": "gate_value.weight",
    "mlp.linear_fc2.weight": "ffn_out.weight",
}
"""Of a layer's parameters, ours to the plain block's."""


def plain_name(name):
    if name == "decoder.final_layernorm.weight":
        return "norm.weight"
    if not name.startswith("decoder.layers."):
        return name
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    return f"layers.{number}.{NAMES[rest]}"


def velocities_and_gradients(size):
    """Of our model and of the plain one with its weights, in fp64: ({name: tensor}, {name: tensor})."""
    from nemo_moviegen.video.model import VideoTransformer, video_config

    stand_in_for_cuda()
    parallel_state.initialize_model_parallel()
    ours = VideoTransformer(video_config(size, Layout(), "fp64"))
    tiny.open_gates(ours)
    plain = PlainTransformer(size).double()
    weights = {plain_name(name): parameter.detach() for name, parameter in ours.named_parameters()}
    plain.load_state_dict(weights)
    batch, t_B = tiny.batch(), torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    found = []
    for model, named in ((ours, plain_name), (plain, str)):
        velocity_SBX = model(batch.latent_BTCHW, t_B, batch.contexts, batch.masks)
        (velocity_SBX.square().sum() + velocity_SBX.sum()).backward()
        gradients = {named(name): parameter.grad for name, parameter in model.named_parameters()}
        found.append({"velocity": velocity_SBX.detach(), **gradients})
    return found


@pytest.mark.parametrize("norms", [True, False])
def test_the_plain_block_is_ours_to_the_last_gradient(norms):
    size = replace(tiny.SIZE, qk_norm=norms, cross_attention_norm=norms)
    ((ours, plain),) = run_on_ranks(velocities_and_gradients, size, world_size=1)
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, msg=name)


def test_wans_block_has_as_many_parameters():
    for case in steps.CASES.values():
        with torch.device("meta"):
            ours, wan = (
                sum(p.numel() for p in make(case)[0].parameters()) for make in (steps._plain, steps._wan)
            )
        assert abs(wan / ours - 1) < 0.05


def test_ways_take_turns_and_one_that_fails_is_told():
    def sleeps(seconds):
        def way(turn):
            turn.facts = {"slept": seconds}
            time.sleep(0.05)  # to begin with, which does not count
            while turn.step_done():
                time.sleep(seconds)

        return way

    def fails(turn):
        turn.step_done()
        raise RuntimeError("no more")

    found, failed = in_turns({"long": sleeps(0.02), "fails": fails, "short": sleeps(0.005)}, turns=3, steps=4)
    assert failed == {"fails": "RuntimeError: no more"} and list(found) == ["long", "short"]
    for name, seconds in (("long", 0.02), ("short", 0.005)):
        turns = found[name].step_seconds
        assert [len(turn) for turn in turns] == [4] * 3 and found[name].facts == {"slept": seconds}
        assert all(step >= seconds for turn in turns for step in turn)


def test_the_command_measures_every_way_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setitem(steps.CASES, "demo", CASE)
    monkeypatch.setattr(steps, "_WARM_UP_TURNS", 1)
    told = []
    steps.bench_steps(["demo"], turns=2, output=tmp_path / "found.json", log=told.append)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["demo"]["failed"] == {}
    rows = {row["name"]: row for row in found["demo"]["rows"]}
    assert list(rows) == [steps.OURS, steps.PLAIN, steps.WAN]
    assert rows[steps.OURS]["parameters"] == rows[steps.PLAIN]["parameters"]
    assert rows[steps.OURS]["ratio"] == 1
    for row in rows.values():
        assert row["step_seconds"] > 0 and len(row["ratios"]) == 2
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert told[1].row_count == 3


def test_what_did_not_run_is_in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    found = steps.bench_case(CASE, turns=1)
    assert set(found["failed"]) == {steps.WAN} and len(found["rows"]) == 2
    assert steps.steps_table("demo", found).row_count == 3
