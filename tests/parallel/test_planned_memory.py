"""Bytes the planner counts against those of the tensors of real training runs, which count themselves."""

import json
import os
from dataclasses import replace

import pytest

from nemo_moviegen.cluster import Cluster
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.layout import Layout
from nemo_moviegen.planning.plan import make_plan
from nemo_moviegen.recipe import LatentData, Optim, VideoRecipe
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.training import tensor_bytes
from parallel.runs import train_on_ranks

pytestmark = pytest.mark.usefixtures("nemo")
TEXT_TOKENS = 12
"""Of each encoder, in every prompt."""
SHAPE = (8, 32, 32)
SIZE = replace(VIDEO_TINY, max_frames=8, max_height=16, max_width=16)
"""2,048 tokens: activations weigh as much beside weights as they do in a large run."""


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("planned") / "latents"
    write_random_latents(folder, SIZE, 12, np.random.default_rng(0), shapes=(SHAPE,), num_tokens=TEXT_TOKENS)
    return folder


def two_steps(folder, latents, num_ranks, **changes):
    """A recipe of two steps, and the most bytes its rank 0 held at once."""
    layout = changes.pop("layout", Layout())
    copies = layout.data_parallel(num_ranks)
    micro_batch = changes.pop("micro_batch", 1)
    frames, height, width = SHAPE
    recipe = VideoRecipe(
        name="planned",
        cluster="cpu_2",
        layout=layout,
        size=changes.pop("size", SIZE),
        data=LatentData(folder=str(latents), image_every=0),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        optim=Optim(learning_rate=1e-3),
        global_batch=copies * micro_batch,
        micro_batch=micro_batch,
        num_steps=2,
        precision=changes.pop("precision", "fp32"),
        output=str(folder),
        **changes,
    )
    train_on_ranks(recipe, num_ranks, before=_count)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return recipe, json.loads(lines[-1])["memory/peak_gib"] * 2**30


def _count():
    os.environ[tensor_bytes.TRACK] = "1"


def planned(recipe, num_ranks):
    cluster = Cluster(name="here", accelerator="cpu", nodes=1, ranks_per_node=num_ranks, memory_gib=4)
    text = {context.name: TEXT_TOKENS for context in recipe.size.contexts}
    return make_plan(recipe, cluster, text=text).memory.peak_bytes


ALONE = {
    "as it is": {},
    "selective": {"layout": Layout(recompute="selective")},
    "full": {"layout": Layout(recompute="full")},
    "bf16, moving average": {"precision": "bf16", "ema_decay": 0.9},
    "two clips": {"micro_batch": 2, "layout": Layout(recompute="selective")},
    "normed queries and keys": {"size": replace(SIZE, qk_norm=True)},
}
TOGETHER = {
    "tensor": {"layout": Layout(tensor=2)},
    "context": {"layout": Layout(context=2)},
    "all shared out": {"layout": Layout(sharding="full")},
    "optimiser shared out": {"layout": Layout(sharding="optimizer", recompute="full")},
}


@pytest.mark.parametrize("changes", ALONE.values(), ids=ALONE)
def test_one_rank_holds_what_was_planned_within_5_percent(changes, tmp_path, latents):
    recipe, held = two_steps(tmp_path / "run", latents, 1, **changes)
    assert planned(recipe, 1) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("changes", TOGETHER.values(), ids=TOGETHER)
def test_each_of_two_ranks_holds_what_was_planned_within_5_percent(changes, tmp_path, latents):
    recipe, held = two_steps(tmp_path / "run", latents, 2, **changes)
    assert planned(recipe, 2) == pytest.approx(held, rel=0.05)
