"""Context parallelism: one answer with any recomputation, collectives noticed when wrong, memory as promised.

Invariant 1 again, for what is cut by context: fp64, 1e-10, loss, output and every gradient.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from ranks import run_on_ranks

from nemo_moviegen.layout import CHOICES, Layout
from nemo_moviegen.training.cpu import stand_in_for_cuda
from nemo_moviegen.video import attention
from nemo_moviegen.video.model import VideoTransformer, video_config
from parallel.matrix import Row, first_wrong, largest_errors

SIZE = replace(tiny.SIZE, width=48, num_heads=6)  # six heads make unequal groups of two and one
LINES = {
    "one rank": (1, Layout()),
    "cp2": (2, Layout(context=2)),
    "cp4": (4, Layout(context=4)),
    "tp2+sp x cp2": (4, Layout(tensor=2, context=2)),
}
ROWS = {
    (name, recompute): Row(
        ranks=ranks, layout=replace(layout, sharding="none", recompute=recompute), size=SIZE
    )
    for name, (ranks, layout) in LINES.items()
    for recompute in CHOICES["recompute"]
}


@pytest.fixture(scope="module")
def found():
    import nemo_moviegen.training.module  # noqa: F401  once, before the ranks fork

    bugs = {name: row for name, (row, _) in BUGS.items()}
    return largest_errors(ROWS | bugs)


@pytest.mark.parametrize("key", ROWS, ids=", recompute ".join)
def test_two_steps_equal_those_of_one_rank(key, found):
    assert not first_wrong(found[key])


def own_gradient_alone(patch, model, wrapped):
    """No reduce-scatter: each rank keeps what its own queries send its keys and values."""

    def keep_own(whole):
        group = parallel_state.get_context_parallel_group()
        return SimpleNamespace(wait=lambda: whole.chunk(group.size())[group.rank()])

    patch.setattr(attention, "start_sum_to_owners", keep_own)


def ranks_in_reverse(patch, model, wrapped):
    """Keys and values in the order of the ranks reversed: attention does not care, their gradient does."""
    start = attention.start_gather_tokens

    def reversed_gather(own, into=None):
        under_way, size = start(own, into), parallel_state.get_context_parallel_world_size()
        return SimpleNamespace(wait=lambda: torch.cat(under_way.wait().chunk(size)[::-1]))

    patch.setattr(attention, "start_gather_tokens", reversed_gather)


def values_of_another_rank(patch, model, wrapped):
    """Each rank's keys with the values of its neighbour."""
    start = attention.start_gather_tokens

    def shifted(own, into=None):
        under_way = start(own, into)

        def wait():
            keys, values = under_way.wait().chunk(2, -1)
            return torch.cat((keys, values.roll(own.shape[0], 0)), -1)

        return SimpleNamespace(wait=wait)

    patch.setattr(attention, "start_gather_tokens", shifted)


def other_heads_in_the_backward_pass(patch, model, wrapped):
    """The second gather brings the keys and values of the wrong heads."""
    start = attention.start_gather_tokens
    patch.setattr(
        attention,
        "start_gather_tokens",
        lambda own, into=None: start(own if into is None else own.roll(1, dims=2), into),
    )


def _planted(plant, recompute):
    layout = Layout(context=2, sharding="none", recompute=recompute)
    return Row(ranks=2, layout=layout, size=SIZE, plant=plant)


BUGS = {  # name: (where it hides, what shows it first)
    "reduce-scatter left out": (_planted(own_gradient_alone, "none"), "gradients"),
    "reduce-scatter left out, gathered again": (_planted(own_gradient_alone, "selective"), "gradients"),
    "wrong order of the ranks": (_planted(ranks_in_reverse, "none"), "gradients"),
    "values of another rank": (_planted(values_of_another_rank, "none"), "loss"),
    "gathered again: wrong heads": (_planted(other_heads_in_the_backward_pass, "selective"), "gradients"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name, found):
    assert first_wrong(found[name]) == BUGS[name][1]


@pytest.mark.parametrize("gathers_again", [False, True])
def test_collectives_are_under_way_while_heads_attend(gathers_again, monkeypatch):
    torch.manual_seed(0)
    log, attend, gradient = [], attention._attend, torch.autograd.grad

    def logged(name, result=None):
        log.append(name)
        return result

    def collective(name, result):  # of a single rank, so nothing needs to travel
        number = sum(line.startswith(f"start {name}") for line in log)
        log.append(f"start {name} {number}")
        return SimpleNamespace(wait=lambda: logged(f"wait {name} {number}", result))

    monkeypatch.setattr(
        attention,
        "start_gather_tokens",
        lambda own, into=None: collective("gather", own.clone() if into is None else into.copy_(own)),
    )
    monkeypatch.setattr(attention, "start_sum_to_owners", lambda whole: collective("sum", whole))
    monkeypatch.setattr(attention, "_attend", lambda *args: logged("attend", attend(*args)))
    query, key, value = (torch.randn(5, 1, 3, 8, requires_grad=True) for _ in range(3))
    out = attention.ContextAttention.apply(query, key, value, gathers_again, True)
    assert log == [
        *("start gather 0", "start gather 1", "wait gather 0", "attend"),
        *("start gather 2", "wait gather 1", "attend"),
        *("wait gather 2", "attend"),
    ]
    log.clear()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: logged("backward", gradient(*args)))
    out.backward(torch.ones_like(out))
    sums = [line for line in log if "gather" not in line]
    assert sums == [
        *("backward", "start sum 0", "backward", "start sum 1", "backward", "start sum 2"),
        *("wait sum 0", "wait sum 1", "wait sum 2"),
    ]
    gathers = [line for line in log if "sum" not in line]
    again = [
        "start gather 0",
        "start gather 1",
        "wait gather 0",
        "backward",
        "start gather 2",
        "wait gather 1",
    ]
    again += ["backward", "wait gather 2", "backward"]
    assert gathers == (again if gathers_again else ["backward"] * 3)


WIDE = replace(tiny.SIZE, width=256, ffn_width=683, qk_norm=False)  # the 30B model's proportions


def kept_for_backward(layout):
    """What one layer keeps of one token of its rank for the backward pass, counted in hidden states.

    Differences in layers and in frames leave out embeddings, head and text.
    """
    (few, few_longer), (more, more_longer) = (
        [_kept_bytes(layout, num_layers, frames) for frames in (2, 4)] for num_layers in (1, 2)
    )
    tokens = 2 * 36 / layout.context
    return (more_longer - more - few_longer + few) / tokens / (WIDE.width * 4)


def _kept_bytes(layout, num_layers, frames):
    stand_in_for_cuda()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor, context_parallel_size=layout.context)
    model_parallel_cuda_manual_seed(123)
    model = VideoTransformer(video_config(replace(WIDE, num_layers=num_layers), layout, "fp32"))
    batch, kept = tiny.batch(1, (frames, 12, 12), torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = model(batch.latent_BTCHW, torch.rand(1).double(), batch.contexts, batch.masks)
    assert out.requires_grad
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.fixture(scope="module")
def kept():
    """Hidden states a token leaves behind in a layer, by context ranks and layout.recompute."""
    return {
        (context, recompute): run_on_ranks(
            kept_for_backward, Layout(context=context, recompute=recompute), world_size=context
        )[0]
        for context in (1, 2)
        for recompute in CHOICES["recompute"]
    }


@pytest.mark.parametrize("context", (1, 2))
def test_selective_recomputation_keeps_less_than_none_and_full_less_still(context, kept):
    none, selective, full = (kept[context, recompute] for recompute in CHOICES["recompute"])
    ffn = WIDE.ffn_width / WIDE.width
    assert none - selective > 3 * ffn  # gate, up and their product are not kept
    assert full == pytest.approx(1, abs=0.1)  # the layer's input alone


def test_selective_recomputation_does_not_keep_the_gathered_keys_and_values(kept):
    added = {recompute: kept[2, recompute] - kept[1, recompute] for recompute in ("none", "selective")}
    assert added["none"] - added["selective"] == pytest.approx(
        2 * 2, abs=0.1
    )  # of two ranks, for one's token
    assert added["selective"] < 1.1  # the output twice: each group of heads, and side by side
