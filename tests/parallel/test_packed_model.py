"""What a pack is: the share of each rank, its FLOPs and its memory, whole runs, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_moviegen import flops
from nemo_moviegen.layout import Layout
from nemo_moviegen.spikes import Guard
from nemo_moviegen.training import monitor
from nemo_moviegen.video import model, parallel
from parallel.matrix import MIXED_SHAPES, mixed, pack
from parallel.runs import recipe, train_on_ranks, write_latents
from parallel.steps import join_groups
from parallel.test_monitor import PARAMETERS, reports

ALONE = Layout()
exact = settings(derandomize=True, deadline=None, max_examples=50)


@exact
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_every_rank_has_its_share_of_every_clip_and_the_shares_are_the_pack(clips, context, sequence):
    """Also where the cut of sequence parallelism falls inside a clip, or leaves a rank nothing of one."""
    lengths = [context * n for n in clips]
    lengths.append(context * sequence - sum(lengths) % (context * sequence))
    config = SimpleNamespace(context_parallel_size=context)
    tokens_S = torch.arange(sum(lengths))
    clip_S = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(context * sequence):
            patch.setattr(parallel, "_pieces", lambda config, rank=rank: (context * sequence, rank))
            built = parallel.pack_of(lengths, config)
            own.append(parallel.split_tokens(tokens_S, config, built))
            assert tuple(torch.bincount(clip_S[own[-1]], minlength=len(lengths))) == built.own_lengths
            assert (clip_S[own[-1]].diff() >= 0).all()  # clips one after the other
    assert torch.equal(built.by_clip(torch.cat(own)), tokens_S)
    of_context_ranks = [
        torch.bincount(clip_S[torch.cat(own[i : i + sequence])]) for i in range(0, len(own), sequence)
    ]
    assert all(tuple(counts) == built.context_lengths for counts in of_context_ranks)
    for starts in (built.cu_seqlens_q, built.cu_seqlens_kv):  # what Transformer Engine takes
        assert starts.dtype == torch.int32 and starts.diff().tolist() == lengths and starts[0] == 0
    assert built.qkv_format == "thd" and built.max_seqlen_q == built.max_seqlen_kv == max(lengths)


@pytest.mark.parametrize(
    "lengths, pieces, context, message",
    [
        (
            (8, 6),
            (4, 0),
            4,
            "a clip of 6 tokens in a pack does not split over context parallel 4: use buckets",
        ),
        ((8, 6), (4, 0), 2, "14 tokens do not split over context parallel 2 x sequence parallel 2"),
    ],
)
def test_a_pack_that_does_not_split_says_so(lengths, pieces, context, message, monkeypatch):
    monkeypatch.setattr(parallel, "_pieces", lambda config: pieces)
    with pytest.raises(ValueError, match=message):
        parallel.pack_of(lengths, SimpleNamespace(context_parallel_size=context))


def _built(layout=ALONE, size=tiny.SIZE):
    join_groups(layout)
    return model.VideoTransformer(model.video_config(size, layout, "fp64"))


def _error_of(change):
    batch = pack(mixed())
    arguments = {"x": batch.latents, "t": torch.rand(5).double()}
    arguments |= change(arguments)
    try:
        _built()(arguments["x"], arguments["t"], batch.contexts, batch.masks)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {"t": a["t"][:1]}, "(1,) times for a pack of 5 clips: pass a time for each, t_B"),
        (
            lambda a: {"x": (*a["x"][:4], a["x"][4][:, :3])},
            "a latent of a pack is (4, 3, 4, 4); test takes [T, 4, H, W]",
        ),
        (
            lambda a: {"x": (*a["x"][:4], torch.rand(5, 4, 4, 4))},
            "latent frames 5 needs 5 positions, test has 4",
        ),
    ],
)
def test_a_pack_the_model_can_not_take_is_refused(change, message):
    assert message in run_on_ranks(_error_of, change, world_size=1)[0]


def _measured_flops():
    batch = pack(mixed())
    built = _built()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(batch.latents, torch.rand(5).double(), batch.contexts, batch.masks)
    return counter.get_total_flops()


def test_a_pack_costs_the_flops_of_its_clips():
    """By torch's own count of matrix products: attention takes no token of another clip."""
    text = {context.name: context.max_tokens for context in tiny.CONTEXTS}
    of_clips = [sum(flops.forward_flops(tiny.SIZE, shape, text).values()) for shape in MIXED_SHAPES]
    assert run_on_ranks(_measured_flops, world_size=1)[0] == sum(of_clips)


WIDE = replace(tiny.SIZE, width=256, ffn_width=683, qk_norm=False)  # the 30B model's proportions


def _kept(recompute):
    """Hidden states that two clips leave in the backward pass of a token's layer: as a batch, as a pack."""
    layout = Layout(recompute=recompute)
    sums = {}
    for num_layers in (1, 2):
        built = _built(layout, replace(WIDE, num_layers=num_layers))
        weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
        for frames in (2, 4):  # differences leave out embeddings, head and text
            batch = tiny.batch(2, (frames, 12, 12))
            packed = pack([batch])
            for kind, x in (("batch", batch.latent_BTCHW), ("pack", packed.latents)):
                kept = []
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda x, kept=kept: kept.append(x) or x, lambda x: x
                ):
                    out = built(x, torch.rand(2).double(), batch.contexts, batch.masks)
                assert out.requires_grad
                storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
                sums[kind, num_layers, frames] = sum(
                    n for place, n in storages.items() if place not in weights
                )
    tokens = 2 * 2 * 36
    return {
        kind: (sums[kind, 2, 4] - sums[kind, 2, 2] - sums[kind, 1, 4] + sums[kind, 1, 2]) / tokens / (256 * 8)
        for kind in ("batch", "pack")
    }


@pytest.mark.parametrize("recompute, most", [("none", 2.05), ("full", 0.05)])
def test_a_pack_keeps_the_output_of_each_attention_twice_and_nothing_else(recompute, most):
    """Modulation looked up for every token would keep four hidden states more."""
    kept = run_on_ranks(_kept, recompute, world_size=1)[0]
    assert 0 <= kept["pack"] - kept["batch"] + 1e-9 < most


def packs_in_place_of_batches():
    """Every micro-batch of the loader as a pack."""
    from nemo_moviegen.training.data import LatentDataModule

    batches = LatentDataModule.train_dataloader

    class Packs(torch.utils.data.IterableDataset):
        def __init__(self, data):
            self.loader = batches(data)

        def __iter__(self):
            return (pack([batch]) for batch in self.loader)

    LatentDataModule.train_dataloader = lambda data: torch.utils.data.DataLoader(Packs(data), batch_size=None)


def test_a_run_on_packs_has_the_losses_of_a_run_on_batches(tmp_path, batch_run):
    """Through NeMo, guard and monitor: six steps, every one compared across the two context ranks."""
    latents, losses = batch_run
    run = recipe(tmp_path / "packs", latents, layout=Layout(context=2), guard=Guard(check_every=1))
    train_on_ranks(run, 2, before=packs_in_place_of_batches)
    assert _losses(run) == pytest.approx(losses, rel=0, abs=1e-9)


@pytest.fixture(scope="module")
def batch_run(tmp_path_factory):
    """(latents, losses of one rank that takes them in batches)."""
    import nemo.lightning  # noqa: F401  once, before the ranks fork

    import nemo_moviegen.training.module  # noqa: F401

    folder = tmp_path_factory.mktemp("batches")
    write_latents(folder / "latents")
    run = recipe(folder / "run", folder / "latents")
    train_on_ranks(run, 1)
    return folder / "latents", _losses(run)


def _losses(run):
    lines = Path(run.output, "metrics.jsonl").read_text().splitlines()
    assert len(lines) == run.num_steps
    return [json.loads(line)["train/loss"] for line in lines]


def _agree(layout, samples):
    join_groups(layout)
    rank, copies = dist.get_rank(), layout.data_parallel(dist.get_world_size())
    report = replace(reports(tensor=layout.tensor, data=copies)[rank], samples=samples[rank])
    return monitor.all_agree(report, PARAMETERS)


A, B, C, D = ((number, 0) for number in range(4))


@pytest.mark.parametrize(
    "layout, samples, agree",
    [
        (Layout(), ((A, B), (C,), (D,)), True),
        (Layout(), ((A, B), (C,), (B,)), False),  # one sample for two copies
        (Layout(tensor=2), ((A, B), (A, B)), True),
        (Layout(tensor=2), ((A, B), (A,)), False),  # of one copy
        (Layout(tensor=2), ((A, B), (B, A)), False),
    ],
)
def test_the_monitor_compares_copies_whose_packs_hold_more_samples_than_others(layout, samples, agree):
    assert run_on_ranks(_agree, layout, samples, world_size=len(samples)) == [agree] * len(samples)
