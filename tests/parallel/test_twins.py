"""The toy twins of the paper's recipes train, each from the one before, on two ranks."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recipes
from nemo_moviegen.cluster import Cluster, placed
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.sizes import VIDEO_TINY
from parallel.runs import train_on_ranks
from recipes import tiny


@pytest.mark.slow
def test_every_twin_trains_from_the_weights_of_the_one_before(tmp_path):
    import nemo_moviegen.training.module  # noqa: F401, once, before the ranks fork

    for name, seed in (("latents", 0), ("latents_heldout", 1)):
        folder = tmp_path / "out" / "demo" / name
        write_random_latents(folder, VIDEO_TINY, 24, np.random.default_rng(seed), shapes=((2, 8, 8),))
    here = Cluster(
        name="here", accelerator="cpu", nodes=1, ranks_per_node=2, memory_gib=4, root=str(tmp_path)
    )
    for name in tiny.TWINS:
        full = recipes.get(f"tiny.{name}")
        run = placed(replace(full, num_steps=2, save_every=2), here)
        if full.data.image_every > 1:  # an image step among the two
            run = replace(run, data=replace(run.data, image_every=2))
        train_on_ranks(run, 2)
        steps = [json.loads(line) for line in Path(run.output, "metrics.jsonl").read_text().splitlines()]
        assert [line["train/skipped"] for line in steps] == [0, 0]
        images = {0: 0, 1: 2}.get(full.data.image_every, 1)
        assert sum(line["train/is_image"] for line in steps) == images
        assert ("validation/loss" in steps[-1]) == (full.validation.every > 0)
        assert os.path.isdir(f"{run.output}/checkpoints/step=2")
