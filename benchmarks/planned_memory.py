"""Bytes that real training runs hold at once beside those that were planned.

    OMP_NUM_THREADS=1 python benchmarks/planned_memory.py [--write]

The tiny recipes at their own sizes, and slices of the 30B model: its proportions and its head width at a
twelfth of the width. Each run is a process that counts the bytes of its tensors; random latents, prompts of
12 tokens of each encoder. --write puts the numbers into planned_memory.json here.
"""

import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from parallel import test_planned_memory as runs  # noqa: E402

import recipes  # noqa: E402
from nemo_moviegen.data.random_latents import write_random_latents  # noqa: E402
from nemo_moviegen.layout import Layout  # noqa: E402
from nemo_moviegen.recipe import LatentData  # noqa: E402
from nemo_moviegen.sizes import VIDEO_30B  # noqa: E402

SLICE = replace(
    VIDEO_30B, num_layers=3, width=512, ffn_width=1365, num_heads=4, max_frames=8, max_height=16, max_width=16
)
SLICES = {
    f"slice of the 30B, {what}": {"size": SLICE, **changes}
    for what, changes in {
        "TP1": {},
        "recompute selective": {"layout": Layout(recompute="selective")},
        "recompute full": {"layout": Layout(recompute="full")},
        "bf16": {"precision": "bf16"},
    }.items()
} | {
    f"slice of the 30B, {what}, two ranks": {"size": replace(SLICE, ffn_width=1364), **changes}
    for what, changes in {
        "TP2": {"layout": Layout(tensor=2)},
        "CP2": {"layout": Layout(context=2)},
        "FSDP": {"layout": Layout(sharding="full")},
    }.items()
}
TINY = ("tiny.t2i", "tiny.t2iv", "tiny.t2iv_256_3072", "tiny.t2iv_768_6144_a", "tiny.t2iv_768_cp2_4096")


def main():
    from nemo_moviegen.training.cpu import stand_in_for_cuda

    stand_in_for_cuda()
    import nemo.lightning  # noqa: F401, before the ranks fork

    import nemo_moviegen.training.module  # noqa: F401

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in TINY:
            rows.append(_row(name, *_tiny(Path(folder, name), name), num_ranks=2))
        for number, (name, changes) in enumerate(SLICES.items()):
            num_ranks = 2 if "two ranks" in name else 1
            latents = Path(folder, f"latents-{number}")
            write_random_latents(
                latents,
                SLICE,
                12,
                np.random.default_rng(0),
                shapes=(runs.SHAPE,),
                num_tokens=runs.TEXT_TOKENS,
            )
            found = runs.two_steps(Path(folder, str(number)), latents, num_ranks, **dict(changes))
            rows.append(_row(name, *found, num_ranks=num_ranks))
    if "--write" in sys.argv:
        facts = {"machine": platform.processor() or platform.machine(), "steps": 2}
        text = json.dumps({**facts, "runs": rows}, indent=1) + "\n"
        Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


def _tiny(folder, name):
    """(a tiny recipe of two steps, bytes its rank 0 held) on latents of its own shape."""
    recipe = recipes.get(name)
    latents = folder / "latents"
    shape = (recipe.latent_frames, recipe.latent_height, recipe.latent_width)
    write_random_latents(
        latents, recipe.size, 96, np.random.default_rng(0), shapes=(shape,), num_tokens=runs.TEXT_TOKENS
    )
    data = LatentData(folder=str(latents), image_every=recipe.data.image_every)
    changed = {"num_steps": 2, "output": str(folder / "run"), "init_from": "", "data": data}
    recipe = replace(recipe, validation=replace(recipe.validation, every=0), **changed)
    runs.train_on_ranks(recipe, 2, before=runs._count)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return recipe, json.loads(lines[-1])["memory/peak_gib"] * 2**30


def _row(name, recipe, held, *, num_ranks):
    planned = runs.planned(recipe, num_ranks)
    print(
        f"{name:45} held {held / 1e6:8.1f} MB, planned {planned / 1e6:8.1f}: {planned / held:.3f}", flush=True
    )
    return {"run": name, "ranks": num_ranks, "held_bytes": held, "planned_bytes": planned}


if __name__ == "__main__":
    main()
