"""Which samples a step takes and all they draw: the same for any layout, resume and number of model copies.

Noise, time and prompt drop of the transformer; frames, crop and latent noise of the autoencoder.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from global_state import other_global_state
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
from nemo_moviegen.data.latents import LatentReader, LatentSample
from nemo_moviegen.recipe import (
    AutoencoderSize,
    Bucket,
    ClipData,
    LatentData,
    Layout,
    Optim,
    TaeRecipe,
    VideoRecipe,
)
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.autoencoder_step import reconstruct
from nemo_moviegen.training.cpu import stand_in_for_cuda

SHAPE = (2, 4, 8, 4)  # frames, channels, height, width
SIGMAS = 5  # chance of a false alarm: one in two million
NUM_SAMPLES, BATCH = 13, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    with LatentWriter(folder) as writer:
        for n in range(NUM_SAMPLES):
            frames = 1 if n % 3 == 2 else 2
            writer.add(
                LatentSample(
                    sample_id=n + 10**15,
                    clip_id=f"clip{n}",
                    caption="",
                    fps=16.0,
                    latent_TCHW=rng.normal(size=(frames, *SHAPE[1:])).astype(np.float32),
                    contexts={c.name: np.ones((2, c.width), np.float32) for c in tiny.CONTEXTS},
                )
            )
    write_empty_prompt(folder, {c.name: np.full((1, c.width), -1.0) for c in tiny.CONTEXTS})
    return folder


def recipe(folder, **changes):
    base = VideoRecipe(
        name="test",
        cluster="cpu_2",
        size=tiny.SIZE,
        data=LatentData(folder=str(folder), image_every=3, prompt_drop=0.4),
        optim=Optim(learning_rate=1e-3),
        latent_frames=2,
        latent_height=8,
        latent_width=4,
        global_batch=BATCH,
        micro_batch=1,
        num_steps=100,
        precision="fp32",
        output=str(folder / "run"),
    )
    return replace(base, **changes)


def copy_draws(run, copy, num_copies, first_step, num_steps):
    """What one model copy draws at each step."""
    from nemo_moviegen.training.data import MicroBatches, batch_order

    reader = LatentReader(run.data.folder)
    order = batch_order(reader, run)
    return steps_of(
        MicroBatches(reader, order, run, copy, num_copies, first_step), run, num_copies, num_steps
    )


def steps_of(batches, run, num_copies, num_steps):
    """For each step {(sample id, epoch): (noise, time, whether the prompt was dropped)}."""
    from nemo_moviegen.training.step import noisy_pair

    batches, steps = iter(batches), []
    for _ in range(num_steps):
        found = {}
        for batch in itertools.islice(batches, BATCH // num_copies // run.micro_batch):
            _, target, times = noisy_pair(batch, run.seed)
            noise = (batch.latent_BTCHW - target).round(decimals=3)
            for row in range(len(times)):
                key = int(batch.sample_ids[row]), int(batch.epochs[row])
                assert key not in found
                dropped = bool(batch.contexts[0][row, 0, 0] < 0)
                found[key] = (noise[row].numpy().tobytes(), float(times[row]), dropped)
        assert len(found) == BATCH // num_copies
        steps.append(found)
    return steps


def union(copies):
    """Draws of all copies at each step; they must share no sample."""
    steps = [
        {key: draw for found in step for key, draw in found.items()} for step in zip(*copies, strict=True)
    ]
    assert all(len(step) == BATCH for step in steps)
    return steps


@pytest.mark.parametrize("num_copies, micro_batch", [(1, 4), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_any_number_of_copies_and_micro_batches_draws_the_same_for_every_sample_of_every_step(
    folder, num_copies, micro_batch
):
    one = copy_draws(recipe(folder, micro_batch=8), 0, 1, 0, 12)
    run = recipe(folder, micro_batch=micro_batch)
    with other_global_state(num_copies):
        copies = [copy_draws(run, copy, num_copies, 0, 12) for copy in reversed(range(num_copies))]
        peers = [copy_draws(run, copy, num_copies, 0, 12) for copy in reversed(range(num_copies))]
    assert union(copies) == one
    assert copies == peers
    assert len({epoch for step in one for _, epoch in step}) > 3


@settings(derandomize=True, deadline=None, max_examples=15)
@given(step=st.integers(0, 400), num_copies=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99))
def test_a_run_resumed_at_any_step_on_any_number_of_copies_draws_what_it_would_have_drawn(
    folder, step, num_copies, seed
):
    run = recipe(folder, seed=seed)
    whole = copy_draws(run, 0, 1, max(step - 2, 0), 4)[min(step, 2) :]
    resumed = union([copy_draws(run, copy, num_copies, step, len(whole)) for copy in range(num_copies)])
    assert resumed == whole


def test_every_draw_of_every_epoch_and_seed_is_new_and_prompts_are_dropped_as_often_as_told(folder):
    steps = [copy_draws(recipe(folder, seed=seed, micro_batch=8), 0, 1, 0, 60) for seed in (0, 1)]
    draws = [draw for seed in steps for step in seed for draw in step.values()]
    assert len({noise for noise, _, _ in draws}) == len({time for _, time, _ in draws}) == len(draws)
    dropped = [dropped for _, _, dropped in draws]
    assert abs(np.mean(dropped) - 0.4) < SIGMAS * math.sqrt(0.4 * 0.6 / len(draws))
    by_sample = {}
    for step in steps[0]:
        for (sample_id, _), draw in step.items():
            by_sample.setdefault(sample_id, set()).add(draw[2])
    assert all(found == {True, False} for found in by_sample.values())


def _rank_draws(folder):
    """{layout: draws of this rank}, its data module at step 5."""
    from megatron.core import parallel_state

    from nemo_moviegen.training.data import LatentDataModule

    found = {}
    for layout in (Layout(tensor=2), Layout(context=2), Layout()):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(layout.tensor, context_parallel_size=layout.context)
        torch.manual_seed(torch.distributed.get_rank())  # as a rank's own generator would
        run = recipe(folder, layout=layout)
        module = LatentDataModule(run)
        module.trainer = SimpleNamespace(global_step=5, is_global_zero=False)
        found[layout] = steps_of(module.train_dataloader(), run, 4 // layout.model_ranks, 3)
    return found


def test_ranks_of_one_copy_draw_alike_and_copies_share_no_sample(folder):
    import nemo_moviegen.training.data  # noqa: F401, ranks are forked after the import

    stand_in_for_cuda()
    ranks = run_on_ranks(_rank_draws, folder, world_size=4)
    one = copy_draws(recipe(folder), 0, 1, 5, 3)
    for layout in (Layout(tensor=2), Layout(context=2)):
        first, peer, second, second_peer = (rank[layout] for rank in ranks)
        assert first == peer and second == second_peer
        assert union([first, second]) == one
    assert union([rank[Layout()] for rank in ranks]) == one


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from nemo_moviegen.data.clips import Clip
    from nemo_moviegen.data.cutting import image_of, write_video
    from nemo_moviegen.data.synthetic import draw_spec, render

    folder, clips = tmp_path_factory.mktemp("clips"), []
    for n in range(4):
        frames = render(draw_spec(n, 0), 24, 48, 12)[:, :, 8 * (n % 2) :]  # wider than the bucket, or square
        path = write_video(
            folder / f"{n}.mp4", np.ascontiguousarray(frames), 12, ("libvpx-vp9", "libx264")[n // 2]
        )
        clip = Clip(
            clip_id=f"clip{n}",
            path=str(path),
            kind="video",
            start_seconds=0.25,
            end_seconds=1.75,
            source_fps=12.0,
            width_px=frames.shape[2],
            height_px=48,
            codec="",
            caption="",
        )
        clips += [clip, image_of(clip, 0.5, "")]
    return clips


def pixels(clips, order, **keywords):
    """{row: bytes} of what a loader gives for each row; the same bytes each time a row comes."""
    from nemo_moviegen.data.dali import ClipLoader

    bucket, found = Bucket(num_frames=6, height_px=32, width_px=24, fps=8), {}
    for video, rows in ClipLoader(clips, bucket, order=order, **keywords):
        for row, frames in zip(rows, video, strict=True):
            assert found.setdefault(row, frames.numpy().tobytes()) == frames.numpy().tobytes()
    return found


def test_frames_and_crop_of_a_clip_do_not_depend_on_order_batch_threads_epoch_or_global_state(clips):
    once = pixels(clips, range(8), batch_size=1)
    assert len(set(once.values())) == 8
    with other_global_state(1):
        assert pixels(clips, [*reversed(range(8)), *range(8)], batch_size=3, num_threads=3) == once
    with other_global_state(2):
        assert pixels(clips, [0, 6, 6, 2, 1, 0], batch_size=2, substitute=True).items() <= once.items()


def test_the_frames_read_for_a_clip_are_those_of_the_clip_alone(clips):
    from nemo_moviegen.data.frames import read_clip

    bucket = Bucket(num_frames=6, height_px=32, width_px=24, fps=8)

    def frames():
        return [read_clip(clip, 0, bucket, 8, keeps_packets=True).frames.tolist() for clip in clips]

    once = frames()
    for number in range(3):
        with other_global_state(number):
            assert frames() == once


def test_the_latent_an_autoencoder_draws_belongs_to_sample_and_step():
    size = AutoencoderSize(base_width=4, multipliers=(1, 1, 2, 2), blocks_per_level=1)
    bucket = Bucket(num_frames=8, height_px=16, width_px=16, fps=8)
    run = TaeRecipe(
        name="test",
        cluster="cpu_2",
        autoencoder=size,
        data=ClipData(manifest="", bucket=bucket),
        optim=Optim(learning_rate=1e-3),
        global_batch=2,
        micro_batch=2,
        num_steps=9,
        output="",
    )
    torch.manual_seed(0)
    autoencoder = TemporalAutoencoder(size).double()
    video = torch.rand(2, 8, 3, 16, 16, dtype=torch.float64)

    @torch.no_grad()
    def l1(rows, step):
        ids = [(70, 80)[row] for row in rows]
        return [
            float(reconstruct(run, autoencoder, video[row : row + 1], [i], step).losses["l1"])
            for row, i in zip(rows, ids, strict=True)
        ]

    first, second = l1([0, 1], 4)
    with other_global_state(3), torch.no_grad():
        assert l1([1, 0], 4) == [second, first]
        both = float(reconstruct(run, autoencoder, video, [70, 80], 4).losses["l1"])
    assert both == pytest.approx((first + second) / 2, rel=1e-12)
    assert l1([0], 5) != [first]
    same_picture = [
        float(reconstruct(run, autoencoder, video[:1], [i], 4).losses["l1"].detach()) for i in (70, 71)
    ]
    assert same_picture[0] == first != same_picture[1]
