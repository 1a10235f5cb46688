"""Whole training runs on forked ranks, started as torchrun starts them: by the environment."""

import os
import socket
import tempfile
from dataclasses import replace

import numpy as np
import tiny
import torch.distributed as dist
from ranks import run_on_ranks

from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.recipe import LatentData, Layout, Optim, VideoRecipe
from nemo_moviegen.stopping import Stopped
from nemo_moviegen.training.shards import gathers_late


def write_latents(folder, num_samples=24, seed=0, shapes=(tiny.LATENT_SHAPE,)):
    """Clips whose latents (T, H, W) take turns, every third sample an image, prompts of different length."""
    write_random_latents(folder, tiny.SIZE, num_samples, np.random.default_rng(seed), shapes=shapes)


def recipe(folder, latents, **changes) -> VideoRecipe:
    """Six steps in fp64, whose gradient is never clipped: megatron clips with an fp32 factor."""
    frames, height, width = tiny.LATENT_SHAPE
    base = VideoRecipe(
        name="test",
        cluster="cpu_2",
        layout=Layout(),
        ema_decay=0.5,
        size=tiny.SIZE,
        data=LatentData(folder=str(latents), image_every=3),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        optim=Optim(learning_rate=3e-3, warmup_steps=2, clip_grad=1e9),
        global_batch=4,
        micro_batch=2,
        num_steps=6,
        precision="fp64",
        output=str(folder),
        save_every=3,
    )
    return replace(base, **changes)


def gather_weights(chunk):
    """All weights of DDP's `chunk` as the optimiser left them, also where they travel late."""
    if gathers_late(chunk):
        chunk.start_param_sync(force_sync=True)


def train_on_ranks(run, num_ranks, before=None):
    """Train `run` on forked ranks; `before()` runs in each first and may break something.

    Returns what each rank's training returned: metrics, or a `Stopped`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        after = f"{folder}/store"
        return run_on_ranks(_train, run, port, after, before, world_size=num_ranks, timeout_seconds=300)


def _train(run, port, store, before):
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # the strategy makes its own from the environment, as under torchrun
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        GROUP_RANK="0",
    )
    from nemo_moviegen.training.run import train

    if before is not None:
        before()
    try:
        metrics = train(run)
    except Stopped as stopped:
        metrics = stopped
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    return metrics
