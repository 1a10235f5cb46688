"""The command line: `moviegen COMMAND`. A command imports what it runs when it runs, so help is instant."""

import json
import linecache
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

from nemo_moviegen.arguments import parse

_OUR_CODE = tuple(str(Path(__file__).resolve().parents[1] / name) for name in ("nemo_moviegen", "recipes"))
_PATIENCE_SECONDS = 20
"""What a rank needs at most to end after its last line, and its launcher to see it, on a busy machine."""


def main(arguments=None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, said in one line on stderr."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # torch, at import
    try:
        return COMMANDS[options.command](options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug or not _is_users_mistake(error):
            raise
        _say(error)
        return 2


def recipes_command(options):
    """All recipes, or one of them as YAML."""
    import nemo_moviegen.curation.recipe as curation
    import recipes
    from nemo_moviegen import tables
    from nemo_moviegen.recipe import override, recipe_yaml

    if not options.recipe:
        tables.show(tables.recipes_table())
        tables.show(tables.curation_table())
    elif options.recipe in recipes.CURATION:
        recipe = recipes.get_curation(options.recipe)
        print(recipe_yaml(curation.override(recipe, options.settings)), end="")
    else:
        print(recipe_yaml(override(tables.find_recipe(options.recipe), options.settings)), end="")


def count_command(options):
    """Parameters and FLOPs of a size or of a recipe's model, part by part."""
    from nemo_moviegen import tables

    size, largest = tables.find_size(options.name)
    counted = tables.count(size, options.latent or largest, options.text_tokens)
    if options.json:
        print(json.dumps(counted, indent=2))
    else:
        tables.show(tables.count_table(counted))
        print(tables.count_notes(counted))


def shapes_command(options):
    """Render Moving Shapes and write their manifest."""
    from nemo_moviegen.data.clips import write_manifest
    from nemo_moviegen.data.synthetic import write_moving_shapes

    settings = {
        "num_frames": options.frames,
        "size_px": options.size,
        "fps": options.fps,
        "seed": options.seed,
    }
    clips = write_moving_shapes(options.folder, options.clips, **settings)
    if options.heldout:
        clips += write_moving_shapes(options.folder, options.heldout, split="heldout", **settings)
    print(write_manifest(Path(options.folder) / "manifest.parquet", clips))


def cut_command(options):
    """Cut videos into clips and add them to a manifest."""
    from nemo_moviegen.data.clips import read_manifest, write_manifest
    from nemo_moviegen.data.cutting import cut_clips

    clips = read_manifest(options.manifest) if Path(options.manifest).exists() else []
    for video in options.videos:
        clips += cut_clips(
            video, options.seconds, caption=options.caption, split=options.split, images=options.images
        )
    print(write_manifest(options.manifest, clips))


def curate_command(options):
    """Choose from a folder of videos the clips worth training on."""
    import recipes
    from nemo_moviegen.curation.recipe import override
    from nemo_moviegen.curation.run import MANIFEST, REPORT, curate

    recipe = override(recipes.get_curation(options.recipe), options.settings)
    done = curate(options.folder, options.output, recipe, options.task)
    output = Path(options.output)
    print(f"{done['num_scored']} videos scored", end="")
    if done["num_missing"]:
        print(f"; other tasks owe {done['num_missing']}, the last of them selects")
    else:
        print(
            f"; {output / MANIFEST}: {done['num_clips']} clips and {done['num_images']} images; "
            f"{done['num_refused']} files quarantined; see {output / REPORT}"
        )


def plan_command(options):
    """Say what a recipe needs and how long it takes on a cluster."""
    from nemo_moviegen.planning.command import run_plan
    from nemo_moviegen.recipe import TaeRecipe, override
    from nemo_moviegen.tables import find_recipe

    if options.validate:
        run_plan(None, options)
        return
    if not options.recipe:
        raise ValueError("plan needs a recipe (`moviegen recipes` lists them), or --validate")
    recipe = override(find_recipe(options.recipe), options.settings)
    if isinstance(recipe, TaeRecipe):
        raise ValueError(f"{recipe.name} trains an autoencoder; plan knows transformers")
    run_plan(recipe, options)


def train_command(options):
    """Train a recipe: on this machine, or as one of the ranks a launcher started."""
    from nemo_moviegen.launch import launch

    return launch(_recipe(options.recipe, options), debug=options.debug)


def submit_command(options):
    """Check a recipe and hand it to SLURM."""
    from nemo_moviegen.cluster import read_cluster
    from nemo_moviegen.submit import make_job, submit, summary
    from nemo_moviegen.tables import show_pairs

    recipe = _recipe(options.recipe, options)
    job = make_job(
        recipe,
        read_cluster(recipe.cluster),
        options.recipe,
        options.settings,
        name=options.name,
        after=options.after,
        options=options.sbatch,
        check_paths=not options.skip_paths,
    )
    rows = summary(job)
    show_pairs(rows)
    print(job.line)
    if not options.dry_run:
        print(f"job {submit(job)}: `moviegen progress {dict(rows)['output']}` says where it stands")


def progress_command(options):
    """Make the page of a run folder and print one screen."""
    from rich.console import Console

    from nemo_moviegen.live.screen import show

    print(show(options.run_folder, Console()))


def average_command(options):
    """Average checkpoints into a new run."""
    from nemo_moviegen.training.average import average

    print(average(options.sources, options.output, weights=options.weights, kind=options.of))


def encode_command(options):
    """Write the latents and text features of the clips of manifests."""
    from nemo_moviegen.buckets import bucket_set
    from nemo_moviegen.data.encoded import told
    from nemo_moviegen.encode import encode
    from nemo_moviegen.tables import find_size
    from nemo_moviegen.text_encoders import write_toy_encoders

    size, _ = find_size(options.model or ("video_tiny" if options.toy_encoders else "video_30b"))
    if options.buckets == "single":
        shapes = {"bucket": _bucket(options)}
    elif options.frames or options.size or options.fps:
        raise ValueError(
            f"--buckets {options.buckets} says what shapes clips get: drop --frames, --size, --fps"
        )
    else:
        shapes = {"bucket_set": bucket_set(options.buckets)}
    if options.toy_encoders:
        write_toy_encoders(options.encoders, size.contexts)
    done = encode(
        options.manifests,
        options.autoencoder,
        options.encoders,
        options.output,
        context_sizes=size.contexts,
        task=options.task,
        batch_size=options.batch,
        num_threads=options.threads,
        tiling=_tiling(options, options.autoencoder),
        **shapes,
    )
    print(told(options.output, done))


def demo_command(options):
    """Run the whole chain at toy size."""
    from nemo_moviegen.demo import run_demo

    run_demo(options.out, options.scale, recipe=options.recipe, fresh=options.fresh)


def generate_command(options):
    """Make videos from prompts."""
    from nemo_moviegen.generation.checks import find_bucket
    from nemo_moviegen.generation.generate import generate
    from nemo_moviegen.generation.rewrite import find_rewrite
    from nemo_moviegen.inputs import Bucket
    from nemo_moviegen.layout import Layout

    prompts = list(options.prompts)
    if options.prompts_file:
        text = Path(options.prompts_file).read_text(encoding="utf-8-sig", errors="replace")
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if options.bucket and (options.frames or options.size):
        raise ValueError(f"--bucket {options.bucket} says the shape: drop --frames and --size")
    height_px, width_px = options.size or (768, 768)
    frames = 256 if options.frames is None else options.frames
    bucket = (
        find_bucket(options.bucket)
        if options.bucket
        else Bucket(num_frames=frames, height_px=height_px, width_px=width_px, fps=16)
    )
    made = generate(
        _models(options),
        prompts,
        options.output,
        bucket if options.fps is None else replace(bucket, fps=options.fps),
        _sampler(options),
        tiling=_tiling(options, options.autoencoder),
        task=options.task,
        layout=Layout(tensor=options.tensor, context=options.context),
        rewrite=find_rewrite(options.rewrite),
    )
    if made:  # the first rank says it
        print(*made, sep="\n")


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

    recipe = _recipe(options.what, options)
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


def evaluate_command(options):
    """Measure a trained model."""
    measures = {"tae": _evaluate_tae, "shapes": _evaluate_shapes, "votes": _evaluate_votes}
    measures |= {"checkpoints": _evaluate_checkpoints, "samples": _evaluate_samples}
    return measures[options.what](options)


def _evaluate_tae(options):
    from nemo_moviegen.evaluation.autoencoder import REPORT, evaluate_autoencoder
    from nemo_moviegen.evaluation.rows import notes, results_table
    from nemo_moviegen.tables import show

    metrics = evaluate_autoencoder(
        options.run_folder,
        options.clips,
        options.output,
        against=options.against,
        seconds=options.seconds,
        size=options.size,
        fps=options.fps,
        limit=options.limit,
        features=options.features,
        tiling=_tiling(options, options.run_folder),
        fit=options.fit,
        seed=options.seed,
        task=options.task,
    )
    if metrics:  # one rank has them
        show(results_table(metrics))
        print(*notes(metrics), Path(options.output) / REPORT, sep="\n")


def _evaluate_shapes(options):
    from nemo_moviegen.evaluation.scores import scores_note, scores_table
    from nemo_moviegen.evaluation.shapes import SCORES, evaluate_shapes
    from nemo_moviegen.tables import show

    scores = evaluate_shapes(
        _models(options),
        options.output,
        num_seen=options.seen,
        num_heldout=options.heldout,
        num_frames=options.frames,
        size_px=options.size,
        rates=options.fps,
        shapes_seed=options.shapes_seed,
        sampler=_sampler(options),
        tiling=_tiling(options, options.autoencoder),
        task=options.task,
    )
    if scores:  # one rank has them
        show(scores_table(scores))
        print(scores_note(scores), Path(options.output) / SCORES, sep="\n")


def _evaluate_checkpoints(options):
    from nemo_moviegen.evaluation.checkpoints import evaluate_checkpoints
    from nemo_moviegen.evaluation.scores import CHECKPOINTS_PLOT, checkpoints_table, correlation_note
    from nemo_moviegen.tables import show

    if options.step:
        raise ValueError(
            f"--step {options.step}: evaluate checkpoints measures all of them; see evaluate shapes"
        )
    found = evaluate_checkpoints(
        _models(options),
        options.output,
        num_seen=options.seen,
        num_heldout=options.heldout,
        sampler=_sampler(options),
    )
    show(checkpoints_table(found))
    print(correlation_note(found), Path(options.output) / CHECKPOINTS_PLOT, sep="\n")


def _evaluate_samples(options):
    from nemo_moviegen.evaluation.sample_metrics import RESULT, find_metrics, measure_samples, metrics_table
    from nemo_moviegen.tables import show

    metrics = find_metrics(options.fid, options.fvd, options.clip)
    show(metrics_table(measure_samples(options.samples, metrics, options.output, options.real)))
    print(Path(options.output) / RESULT)


def _evaluate_votes(options):
    from nemo_moviegen.evaluation.votes import count_votes, votes_tables
    from nemo_moviegen.tables import show

    counted = count_votes(options.votes)
    for table in votes_tables(counted):
        show(table)
    print("Net win rate: prompts won less prompts lost, by majority of raters; in brackets its 95% interval.")
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
        print(path)


def compare_command(options):
    """Make the page on which people vote between two models."""
    from nemo_moviegen.evaluation.compare import write_compare

    names = options.names or [Path(folder).resolve().name for folder in options.folders]
    path, number = write_compare(
        options.folders, names, options.output, axes=options.axes, limit=options.limit
    )
    print(f"{path}: {number} pairs, {len(options.axes)} questions each")


def _models(options):
    from nemo_moviegen.generation.generate import Models

    return Models(
        run=options.run_folder,
        autoencoder=options.autoencoder,
        encoders=options.encoders,
        latents=options.latents,
        step=options.step,
        weights=options.weights,
    )


def _sampler(options):
    from nemo_moviegen.sampling import Sampler

    return Sampler(
        method=options.method,
        schedule=options.schedule,
        num_steps=options.steps,
        emulated_steps=options.emulated_steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        batch_size=options.batch,
    )


def report_command(options):
    """Write the page about a demo."""
    from nemo_moviegen.report import write_report

    print(write_report(options.folder, options.output or Path(options.folder) / "report.html"))


COMMANDS = {
    "recipes": recipes_command,
    "count": count_command,
    "shapes": shapes_command,
    "cut": cut_command,
    "curate": curate_command,
    "plan": plan_command,
    "train": train_command,
    "submit": submit_command,
    "progress": progress_command,
    "average": average_command,
    "encode": encode_command,
    "generate": generate_command,
    "demo": demo_command,
    "evaluate": evaluate_command,
    "compare": compare_command,
    "bench": bench_command,
    "report": report_command,
}


def _recipe(name, options):
    """The recipe of that name with the settings and the cluster that were asked for."""
    from nemo_moviegen.recipe import override
    from nemo_moviegen.tables import find_recipe

    recipe = override(find_recipe(name), options.settings)
    return replace(recipe, cluster=options.cluster) if options.cluster else recipe


def _is_users_mistake(error) -> bool:
    """Whether the error is one of our own checks, or a file that is not there: no stack trace helps then."""
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return True
    if not isinstance(error, ValueError) or not error.__traceback__:
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = os.path.realpath(frame.filename).startswith(_OUR_CODE)
    return ours and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise ")


def _say(error):
    """One line for all ranks: where the first says the same, its end is that of the others, which wait."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler would let the wait go on
        time.sleep(_PATIENCE_SECONDS)
    where = f" (rank {rank})" if rank else ""
    print(f"moviegen: {' '.join(str(error).split())}{where}", file=sys.stderr, flush=True)


def _tiling(options, autoencoder_folder):
    """Tiles as asked for, overlapping by half in time; ValueError for sizes that do not serve."""
    from nemo_moviegen.recipe import RECIPE_FILE, read_recipe
    from nemo_moviegen.tae.tiling import Tiling, trained_frames

    frames, size_px = options.tile_frames, options.tile_px
    file = Path(autoencoder_folder, RECIPE_FILE)
    if frames is None:
        frames = trained_frames(read_recipe(file)) if file.is_file() else Tiling().frames
    shared_frames, shared_px = frames // 2 // 8 * 8, min(64, size_px // 4 // 8 * 8)
    return Tiling(frames=frames, overlap_frames=shared_frames, size_px=size_px, overlap_px=shared_px)


def _bucket(options):
    """The autoencoder's own bucket, with what the options change."""
    from nemo_moviegen.recipe import RECIPE_FILE, read_recipe

    file = Path(options.autoencoder) / RECIPE_FILE
    if not file.is_file():
        raise ValueError(f"{options.autoencoder} is no run folder of an autoencoder: it holds no recipe.yaml")
    bucket = getattr(read_recipe(file).data, "bucket", None)
    if bucket is None:
        raise ValueError(f"{options.autoencoder} is the run of a transformer: give one of an autoencoder")
    height_px, width_px = options.size or (bucket.height_px, bucket.width_px)
    return replace(
        bucket,
        num_frames=bucket.num_frames if options.frames is None else options.frames,
        fps=bucket.fps if options.fps is None else options.fps,
        height_px=height_px,
        width_px=width_px,
    )


if __name__ == "__main__":
    sys.exit(main())
