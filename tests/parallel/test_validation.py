"""The validation loss while training: one number in every layout, and training does not notice it."""

import itertools
import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.launch import check_inputs
from nemo_moviegen.recipe import LatentData, Layout, Optim
from nemo_moviegen.training.checkpoint import checkpoints
from nemo_moviegen.training.storage import read_whole, tensor_shapes
from nemo_moviegen.training.validation import (
    NUM_BINS,
    NUM_REPORTED,
    Evaluation,
    evaluations,
    heldout_reader,
    shares,
)
from nemo_moviegen.training.validation import told as named
from nemo_moviegen.validation import Validation, heldout_folder
from parallel.runs import recipe, train_on_ranks, write_latents

EVERY_OTHER_STEP = Validation(every=2, times_per_sample=3)
NUM_HELDOUT = 5
"""Two images and three clips, so that two copies can share neither the 6 nor the 9 evaluations evenly."""


pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder)
    write_latents(heldout_folder(folder), num_samples=NUM_HELDOUT, seed=1)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, latents):
    """One step on one rank: the weights every layout starts from."""
    run = recipe(tmp_path_factory.mktemp("start"), latents, num_steps=1)
    train_on_ranks(run, 1)
    return run.output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, latents, start):
    return train(tmp_path_factory.mktemp("one"), latents, start, num_ranks=1).output


def train(folder, latents, start, num_ranks, plant=None, **changes):
    """Three steps with the loss measured after the second and, with the checkpoint, after the third."""
    settings = {"init_from": start, "validation": EVERY_OTHER_STEP, "num_steps": 3, **changes}
    run = recipe(folder, latents, **settings)
    train_on_ranks(run, num_ranks, before=plant and planted(plant))
    return run


def planted(plant):
    """What runs in each rank before `train`: `plant(callback)` breaks the run's `ValidationLoss`."""

    def before():
        from nemo_moviegen.training import run

        make = run._callbacks

        def make_broken(*args):
            callbacks = make(*args)
            plant(next(c for c in callbacks if hasattr(c, "last_loss")))
            return callbacks

        run._callbacks = make_broken

    return before


def lines(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def told(folder):
    """{step: {name: number}} of what metrics.jsonl says of the validation loss."""
    measured = [line for line in lines(folder) if "validation/loss" in line]
    return {m["step"]: {k: v for k, v in m.items() if k.startswith("validation/loss")} for m in measured}


def check_same(folder, expected):
    found = told(folder)
    assert list(found) == list(expected)
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=0, abs=1e-10), f"step {step}"


def test_the_loss_is_told_with_every_checkpoint_too_over_four_parts_of_time(one_rank):
    found = told(one_rank)
    assert list(found) == [2, 3]
    parts = [f"validation/loss_t{t}" for t in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")]
    for values in found.values():
        assert list(values)[:5] == ["validation/loss", *parts]
        assert min(values[p] for p in parts) < values["validation/loss"] < max(values[p] for p in parts)
        of_shapes = list(values)[5:]
        assert {name.rpartition("_")[0] for name in of_shapes} == {
            "validation/loss_1x8x4",
            "validation/loss_3x8x4",
        }
        assert len(of_shapes) == 8  # six and nine evaluations: all quarters of both
    assert found[2] != found[3]  # other weights
    assert [line["step"] for line in lines(one_rank) if "validation/seconds" in line] == [2, 3]
    (state,) = (json.loads((f / "state.json").read_text()) for f in checkpoints(one_rank).values())
    assert state["validation_loss"] == found[3]["validation/loss"]


def test_the_loss_is_the_mean_over_tokens_at_the_fixed_noise_and_times(one_rank, latents):
    """From the weights of the checkpoint, sample by sample in plain torch."""
    (losses,) = run_on_ranks(_plain_losses, one_rank, latents, world_size=1)
    assert told(one_rank)[3] == pytest.approx(losses, rel=0, abs=1e-10)


def test_each_shape_and_quarter_of_time_has_the_mean_over_its_own_tokens():
    """Images lose 1 near noise and 2 near data on 8 tokens, clips 10 near noise on 24; nothing in between."""
    sums = torch.zeros(2, NUM_REPORTED, 2, dtype=torch.float64)
    sums[0, 0], sums[0, 3] = torch.tensor([8.0, 8.0]), torch.tensor([16.0, 8.0])
    sums[1, 0] = torch.tensor([240.0, 24.0])
    assert named(sums.view(-1, 2), [(1, 8, 4), (3, 8, 4)]) == {
        "validation/loss": 264 / 40,
        "validation/loss_t0.00-0.25": 248 / 32,
        "validation/loss_t0.75-1.00": 2.0,
        "validation/loss_1x8x4_t0.00-0.25": 1.0,
        "validation/loss_1x8x4_t0.75-1.00": 2.0,
        "validation/loss_3x8x4_t0.00-0.25": 10.0,
    }


def _plain_losses(run_folder, latents):
    from nemo_moviegen import flow
    from nemo_moviegen.data.collate import collate
    from nemo_moviegen.training.checkpoint import load_video_model

    model, run = load_video_model(run_folder, weights="weights")
    reader = LatentReader(heldout_folder(latents))
    ids, shapes = reader.sample_ids, reader.latent_shapes
    sums = defaultdict(lambda: [0, 0])
    for place, row in enumerate(sorted(range(len(reader)), key=lambda r: (*shapes[r], ids[r]))):
        sample = reader[row]
        batch = collate([sample], [0], run.size.contexts, dtype=torch.float64, statistics=reader.statistics)
        data = batch.latent_BTCHW[0]
        for number, offset in enumerate((0, 2, 5)):  # thirds of eight parts of time
            keys = (run.seed, sample.sample_id, number)
            noise = torch.from_numpy(
                flow.sample_generator(*keys, "validation noise").standard_normal(data.shape)
            )
            place_in_bin = flow.sample_generator(*keys, "validation time").random()
            t = ((place + offset) % 8 + place_in_bin) / 8
            x = t * data + (1 - (1 - 1e-5) * t) * noise
            time = torch.tensor([t], dtype=torch.float64)
            velocity = model.velocity(x[None], time, batch.contexts, batch.masks)[0]
            error = (velocity - (data - (1 - 1e-5) * noise)).square()
            num_tokens = run.size.num_tokens(shapes[row])
            quarter = f"_t{int(4 * t) / 4:.2f}-{(int(4 * t) + 1) / 4:.2f}"
            for part in ("", quarter, f"_{'x'.join(map(str, shapes[row]))}{quarter}"):
                sums[f"validation/loss{part}"][0] += float(error.mean()) * num_tokens
                sums[f"validation/loss{part}"][1] += num_tokens
    return {name: loss / tokens for name, (loss, tokens) in sums.items()}


LAYOUTS = {
    "dp2": Layout(sharding="none"),
    "dp2 optimizer": Layout(sharding="optimizer"),
    "dp2 full, recomputed": Layout(sharding="full", recompute="full"),
    "tp2+sp": Layout(tensor=2, sharding="none"),
    "tp2": Layout(tensor=2, sequence=False, sharding="none"),
    "cp2, recomputed": Layout(context=2, sharding="none", recompute="selective"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_measures_the_loss_of_one_rank(layout, tmp_path, latents, start, one_rank):
    run = train(tmp_path, latents, start, num_ranks=2, layout=layout)
    check_same(run.output, told(one_rank))


def weigh_repeats(validation):
    from nemo_moviegen.training import validation as room

    right = room.shares
    room.shares = lambda *args: ((own, [1.0] * len(own)) for own, _ in right(*args))


def draw_by_rank(validation):
    from nemo_moviegen.training import validation as room

    right = room.fixed_pair
    room.fixed_pair = lambda batch, bins, seed, of: right(
        batch, bins, seed + torch.distributed.get_rank(), of
    )


def mix_up_shapes(validation):
    """Each rank has the shapes in an order of its own: their sums meet in the wrong rows."""
    if int(os.environ["RANK"]):
        validation.held_out.shapes.reverse()


@pytest.mark.parametrize("bug", [weigh_repeats, draw_by_rank, mix_up_shapes], ids=lambda bug: bug.__name__)
def test_the_check_of_layouts_notices_a_bug(bug, tmp_path, latents, start, one_rank):
    run = train(tmp_path, latents, start, num_ranks=2, plant=bug)
    with pytest.raises(AssertionError, match="step 2"):
        check_same(run.output, told(one_rank))


def check_released(validation):
    """Megatron FSDP gathers ahead of a forward pass; no backward pass follows that would free it."""
    measure = validation.measure

    def measure_and_look(module):
        values = measure(module)
        fsdp = module.module.module
        assert {str(status) for status in fsdp.all_gather_pipeline.bucket_status.values()} == {
            "BucketStatus.EMPTY"
        }
        assert fsdp.is_param_fsdp_distributed
        return values

    validation.measure = measure_and_look


def test_training_does_not_notice_bit_for_bit(tmp_path, latents, start):
    """Losses and everything a checkpoint holds, fully sharded in fp32; no gathered weight stays."""
    changes = {"layout": Layout(sharding="full"), "precision": "fp32", "num_steps": 4, "ema_decay": 0.9}
    runs = [
        train(tmp_path / str(every), latents, start, 2, plant, validation=Validation(every=every), **changes)
        for every, plant in ((0, None), (1, check_released))
    ]
    without, with_validation = ([line["train/loss"] for line in lines(run.output)] for run in runs)
    assert without == with_validation
    assert (len(told(runs[0].output)), len(told(runs[1].output))) == (0, 4)
    first, second = (checkpoints(run.output)[4] / "tensors" for run in runs)
    first, second = (read_whole(folder, tensor_shapes(folder)) for folder in (first, second))
    assert len(first) == len(second) > 4
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_same_weights_have_the_same_loss_at_every_step_and_epoch(tmp_path, latents, start):
    standing = Optim(learning_rate=1e-300, warmup_steps=2, clip_grad=1e9)
    run = train(tmp_path, latents, start, 1, optim=standing, num_steps=9, save_every=9)
    first, *others = told(run.output).values()
    assert len(others) == 4 and all(other == first for other in others)


def test_a_resumed_run_measures_what_it_would_have_measured(tmp_path, latents, start, one_rank):
    run = train(tmp_path, latents, start, 1, num_steps=2)
    train_on_ranks(replace(run, num_steps=3), 1)
    assert told(run.output) == told(one_rank)


def _losses_of_checkpoints(run_folder, latents, output):
    """{step: losses} of the weights of each checkpoint, outside training."""
    from nemo_moviegen.evaluation.checkpoints import validation_losses
    from nemo_moviegen.generation.generate import Models

    found = {}
    for step in checkpoints(run_folder):
        models = Models(
            run=run_folder, autoencoder="", encoders="", latents=latents, step=step, weights="weights"
        )
        found[step] = validation_losses(models, output)
    return found


def test_a_checkpoint_has_the_losses_its_run_has_logged(tmp_path, latents, start):
    """Seen to catch: the newest checkpoint in place of the step's; averaged weights in place of the raw."""
    changes = {"save_every": 1, "keep_every": 1, "num_steps": 2, "ema_decay": 0.5}
    run = train(tmp_path, latents, start, 2, layout=Layout(tensor=2, sharding="none"), **changes)
    arguments = (run.output, latents, tmp_path / "out")
    (found,) = run_on_ranks(_losses_of_checkpoints, *arguments, world_size=1)
    logged = told(run.output)
    assert list(found) == list(logged) == [1, 2]
    for step, losses in found.items():
        assert losses == pytest.approx(logged[step], rel=1e-9)


def test_the_checkpoint_of_the_lowest_loss_stays(tmp_path, latents, start):
    def tell(validation):
        losses = iter((3.0, 1.0, 2.0, 2.5))
        validation.measure = lambda module: {"validation/loss": next(losses)}

    changes = {"save_every": 1, "keep_last": 1, "keep_best": 1, "num_steps": 4}
    run = train(tmp_path, latents, start, 1, plant=tell, **changes)
    assert list(checkpoints(run.output)) == [2, 4]


def test_a_missing_or_empty_folder_is_refused_before_launch(tmp_path, latents):
    run = recipe(tmp_path, latents, validation=Validation(every=5, folder=str(tmp_path)))
    advice = r"moviegen encode.*validation\.folder.*validation\.every=0"
    with pytest.raises(
        ValueError, match=rf"latents of {tmp_path}, which holds no index\.parquet: .*{advice}"
    ):
        check_inputs(run)
    with pytest.raises(ValueError, match=rf"no finished latents in {tmp_path} .*{advice}"):
        heldout_reader(run)
    check_inputs(replace(run, validation=Validation(folder=str(tmp_path))))  # never measured
    check_inputs(replace(run, validation=Validation(every=5)))  # beside the training set


@pytest.mark.parametrize("image_every, kind, sample", [(1, "images", 1), (0, "clips", 0)])
def test_only_the_kinds_a_run_trains_on_are_taken_and_one_must_be_there(image_every, kind, sample, tmp_path):
    write_latents(tmp_path, num_samples=6)
    run = recipe(tmp_path, tmp_path, data=LatentData(folder="x", image_every=image_every))
    run = replace(run, validation=Validation(every=1, folder=str(tmp_path)))
    taken = evaluations(heldout_reader(run), run)
    assert {e.shape[0] == 1 for e in taken} == {kind == "images"}
    if kind == "clips":
        write_latents(tmp_path, num_samples=1)  # an image
        with pytest.raises(ValueError, match=rf"holds no {kind}, which test trains on.*of the split heldout"):
            heldout_reader(run)


def test_the_first_samples_by_id_are_taken_and_every_part_of_time_as_often(tmp_path):
    write_latents(tmp_path, num_samples=30)
    reader = LatentReader(tmp_path)
    run = recipe(tmp_path, tmp_path, validation=Validation(every=1, num_samples=24, times_per_sample=2))
    taken = evaluations(reader, run)
    assert sorted({reader.sample_ids[e.row] for e in taken}) == list(range(24))
    assert len(taken) == len({(e.row, e.number) for e in taken}) == 48
    for shape in {e.shape for e in taken}:  # 8 images, 16 clips
        bins = [e.time_bin for e in taken if e.shape == shape]
        assert {bins.count(b) for b in range(NUM_BINS)} == {len(bins) // NUM_BINS}


@given(st.lists(st.integers(0, 17), max_size=3), st.integers(1, 5), st.integers(1, 4))
def test_copies_take_as_many_passes_of_one_shape_and_every_evaluation_counts_once(
    counts, copies, micro_batch
):
    every = [
        Evaluation(100 * s + n, (s + 1, 2, 2), 0, 0) for s, count in enumerate(counts) for n in range(count)
    ]
    passes = [list(shares(every, copy, copies, micro_batch)) for copy in range(copies)]
    for together in zip(*passes, strict=True):
        assert len({e.shape for own, _ in together for e in own}) == 1
        assert len({len(own) for own, _ in together}) == 1 and 1 <= len(together[0][0]) <= micro_batch
    pairs = [zip(own, weights, strict=True) for own_passes in passes for own, weights in own_passes]
    counted = [e for e, weight in itertools.chain(*pairs) if weight]
    assert sorted(e.row for e in counted) == [e.row for e in every]


@pytest.mark.parametrize("name, value", [("every", -1), ("num_samples", 0), ("times_per_sample", 0)])
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"validation\.{name} is {value}; use {value + 1} or more"):
        Validation(**{name: value})
