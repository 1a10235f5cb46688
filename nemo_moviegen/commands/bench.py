"""`moviegen bench`: how fast it is."""

import os
from pathlib import Path

from nemo_moviegen.commands.asked import recipe_of


def bench_command(options):
    """Measure a recipe's training steps, or ways to do the same work, on this machine."""
    from rich.console import Console

    from nemo_moviegen.inputs import Bucket

    log = Console(width=120).print
    if options.what == "parity":
        from nemo_moviegen.bench.parity import judge

        if len(options.settings) != 2:
            raise ValueError("bench parity takes two folders: a run in FP8, then its twin in bf16")
        return judge(*options.settings, gap=options.gap, output=options.json, log=log)
    if options.what not in ("steps", "loader", "tae"):
        return _bench_recipe(options, log)
    from nemo_moviegen.bench import autoencoder, loader, steps

    known = {"steps": steps.PARTS, "loader": loader.PARTS, "tae": autoencoder.PARTS}[options.what]
    parts = tuple(options.parts or known)
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"bench {options.what} has no part {', '.join(unknown)}; use {', '.join(known)}")
    if options.what == "steps":
        steps.bench_steps(parts, turns=options.rounds or 12, output=options.json, log=log)
        return 0
    if options.what == "tae":
        autoencoder.bench_autoencoder(parts, rounds=options.rounds or 3, output=options.json, log=log)
        return 0
    height_px, width_px = options.size
    loader.bench_loader(
        parts,
        videos=options.videos,
        bucket=Bucket(num_frames=options.frames, height_px=height_px, width_px=width_px, fps=options.fps),
        batch_size=options.batch,
        rounds=options.rounds or 5,
        num_samples=options.samples,
        output=options.json,
        log=log,
    )
    return 0


def _bench_recipe(options, log):
    from nemo_moviegen.cluster import read_cluster
    from nemo_moviegen.launch import check_run, must_start_ranks, start_ranks

    recipe = recipe_of(options.what, options)
    cluster = read_cluster(recipe.cluster)
    numbers = {"steps": options.steps, "warm_up": options.warm_up, "profiled": options.profiled}
    if options.parity:
        from nemo_moviegen.bench.parity import gate

        more = {"gap": options.gap, "output": options.json, "log": log}
        return gate(recipe, cluster, options.folder, steps=options.steps, **more)
    if options.rank_slice:
        from nemo_moviegen.bench.recipe import bench_recipe

        if "WORLD_SIZE" in os.environ:
            raise ValueError(
                "--rank-slice is one process, the first of ranks that are not there: start it alone"
            )
        more = {"slice_layers": options.layers or 0, "output": options.json, "log": log}
        bench_recipe(recipe, cluster, options.folder, **numbers, **more)
        return 0
    if options.layers:
        raise ValueError(f"--layers {options.layers} is of --rank-slice; a recipe's is size.num_layers")
    check_run(recipe, cluster)
    if must_start_ranks(cluster, "start it on every node with torchrun"):
        given = {"--folder": options.folder, "--json": options.json} | {
            f"--{name.replace('_', '-')}": str(number) for name, number in numbers.items()
        }
        words = [word for name, value in given.items() if value for word in (name, value)]
        return start_ranks(recipe, Path(f"{options.folder}-launch"), cluster, ["bench", *words])
    from nemo_moviegen.bench.recipe import bench_recipe

    bench_recipe(recipe, cluster, options.folder, **numbers, output=options.json, log=log)
    return 0
