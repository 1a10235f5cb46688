"""The command line: `moviegen COMMAND`. A command imports what it runs when it runs, so help is instant."""

import argparse
import json
import linecache
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import nemo_moviegen

_OUR_CODE = tuple(str(Path(__file__).resolve().parents[1] / name) for name in ("nemo_moviegen", "recipes"))


def main(arguments=None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, said in one line on stderr."""
    options = _options(arguments)
    try:
        return options.run(options) or 0
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
    from nemo_moviegen import tables
    from nemo_moviegen.recipe import override, recipe_yaml

    if options.recipe:
        print(recipe_yaml(override(tables.find_recipe(options.recipe), options.settings)), end="")
    else:
        tables.show(tables.recipes_table())


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
    from nemo_moviegen.data.clips import cut_clips, read_manifest, write_manifest

    clips = read_manifest(options.manifest) if Path(options.manifest).exists() else []
    for video in options.videos:
        clips += cut_clips(
            video, options.seconds, caption=options.caption, split=options.split, images=options.images
        )
    print(write_manifest(options.manifest, clips))


def train_command(options):
    """Train a recipe: on this machine, or as one of the ranks a launcher started."""
    from nemo_moviegen.launch import launch
    from nemo_moviegen.recipe import override
    from nemo_moviegen.tables import find_recipe

    recipe = override(find_recipe(options.recipe), options.settings)
    if options.cluster:
        recipe = replace(recipe, cluster=options.cluster)
    return launch(recipe, debug=options.debug)


def encode_command(options):
    """Write the latents and text features of a manifest's clips."""
    from nemo_moviegen.encode import encode
    from nemo_moviegen.tables import find_size
    from nemo_moviegen.text_encoders import write_toy_encoders

    size, _ = find_size(options.model or ("video_tiny" if options.toy_encoders else "video_30b"))
    bucket = _bucket(options)
    if options.toy_encoders:
        write_toy_encoders(options.encoders, size.contexts)
    done = encode(
        options.manifest,
        options.autoencoder,
        options.encoders,
        options.output,
        bucket=bucket,
        context_sizes=size.contexts,
        batch_size=options.batch,
        num_threads=options.threads,
    )
    left_out = f"; {len(done['quarantined'])} left out, see quarantine" if done["quarantined"] else ""
    print(f"{options.output}: {done['train']} samples, {done['heldout']} held out{left_out}")


def demo_command(options):
    """Run the whole chain at toy size."""
    from nemo_moviegen.demo import run_demo

    run_demo(options.out, options.scale, fresh=options.fresh)


def generate_command(options):
    """Make videos from prompts."""
    from nemo_moviegen.generate import generate

    prompts = list(options.prompts)
    if options.prompts_file:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    height_px, width_px = options.size
    files = generate(
        options.run_folder,
        prompts,
        options.output,
        autoencoder_folder=options.autoencoder,
        encoders_folder=options.encoders,
        latents_folder=options.latents,
        num_frames=options.frames,
        height_px=height_px,
        width_px=width_px,
        fps=options.fps,
        num_steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        batch_size=options.batch,
    )
    print(*files, sep="\n")


def report_command(options):
    """Write the page about a demo."""
    from nemo_moviegen.report import write_report

    print(write_report(options.folder, options.output or Path(options.folder) / "report.html"))


def _options(arguments):
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "settings") or any(text.startswith("-") for text in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:  # key=value after an option: argparse takes only one run of them
        options.settings += rest
    return options


def _parser():
    parser = argparse.ArgumentParser(
        prog="moviegen", description="Movie Gen: from raw video to a prompted sample.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=nemo_moviegen.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help):
        added = commands.add_parser(name, help=help, description=f"{help}.", allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        added.set_defaults(run=run)
        return added.add_argument

    add = command("recipes", recipes_command, "list the recipes, or print one as YAML")
    add("recipe", nargs="?", help="a recipe's name or YAML file: print all its settings")
    add("settings", nargs="*", metavar="key=value", help="settings to change, as for train")

    add = command("count", count_command, "count the parameters and FLOPs of a model, part by part")
    add("name", help="a size (video_30b, video_5b, upsampler_7b, audio_13b, video_tiny) or a recipe")
    add("--latent", type=_shape, metavar="TxHxW", help="latent of one sample; default: the largest it takes")
    add("--text-tokens", type=int, default=256, help="real text tokens of one sample (%(default)s)")
    add("--json", action="store_true", help="print JSON")

    add = command(
        "shapes", shapes_command, "render Moving Shapes: synthetic captioned clips and their manifest"
    )
    add("folder", help="for the video files and manifest.parquet")
    add("--clips", type=int, default=256, help="clips to train on (%(default)s)")
    add("--heldout", type=int, default=0, help="further clips in the split heldout (%(default)s)")
    add("--frames", type=int, default=16, help="frames of a clip (%(default)s)")
    add("--size", type=int, default=64, help="height and width in pixels (%(default)s)")
    add("--fps", type=int, default=16, help="frames a second (%(default)s)")
    add("--seed", type=int, default=0)

    add = command(
        "cut", cut_command, "cut videos into clips and add them to a manifest; nothing is re-encoded"
    )
    add("videos", nargs="+", help="video files")
    add("--manifest", required=True, help="Parquet manifest to write, or to add to")
    add("--seconds", type=float, default=4.0, help="length of a clip (%(default)s)")
    add("--caption", default="a video clip", help="caption of all clips (%(default)r)")
    add("--split", choices=("train", "heldout"), default="train")
    add("--images", action="store_true", help="also take the middle frame of each clip as an image")

    add = command("train", train_command, "train a recipe on its cluster")
    add("recipe", help="a recipe's name (see `moviegen recipes`) or YAML file")
    add(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings to change, as in num_steps=10 layout.tensor=2",
    )
    add("--cluster", help="where it runs: a name of recipes/clusters, as cluster=NAME")

    add = command("encode", encode_command, "write the latents and text features of a manifest's clips")
    add("--manifest", required=True, help="clip manifest, as `shapes` and `cut` write it")
    add("--autoencoder", required=True, help="run folder of the autoencoder")
    add("--encoders", required=True, help="folder of the text encoders")
    add("--output", required=True, help="folder for the latents; held-out clips go to OUTPUT_heldout")
    add("--model", help="size or recipe the features are for (video_30b; video_tiny with toy encoders)")
    add("--toy-encoders", action="store_true", help="first write small encoders with seeded random weights")
    add("--frames", type=int, help="frames of a clip; this and the next two default to the autoencoder's own")
    add("--size", type=_frame_size, metavar="HxW", help="in pixels")
    add("--fps", type=float, help="frames a second")
    add("--batch", type=int, default=8, help="clips encoded at once (%(default)s)")
    add("--threads", type=int, default=1, help="threads that decode (%(default)s)")

    add = command("demo", demo_command, "run the whole chain at toy size, from raw video to prompted samples")
    add("--out", default="out/demo", help="folder for everything (%(default)s)")
    add("--scale", type=float, default=1.0, help="0.05 is a quick look (%(default)s)")
    add(
        "--fresh", action="store_true", help="forget what an earlier demo did; else its finished stages stand"
    )

    add = command("generate", generate_command, "make videos from prompts")
    add("run_folder", help="run folder of a video model")
    add("prompts", nargs="*", help="one prompt a video")
    add("--prompts-file", help="text file with one prompt a line")
    add("--output", required=True, help="folder for the videos")
    add("--autoencoder", required=True, help="run folder of the autoencoder")
    add("--encoders", required=True, help="folder of the text encoders")
    add(
        "--latents",
        required=True,
        help="folder of the latents the model was trained on: statistics, empty prompt",
    )
    add("--frames", type=int, default=256, help="frames of a video; 1 makes images (%(default)s)")
    add("--size", type=_frame_size, default=(768, 768), metavar="HxW", help="in pixels (768x768)")
    add("--fps", type=float, default=16, help="frames a second (%(default)s)")
    add("--steps", type=int, default=50, help="sampling steps (%(default)s)")
    add("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=4, help="prompts sampled at once (%(default)s)")

    add = command("report", report_command, "write the HTML page about a demo")
    add("folder", nargs="?", default="out/demo", help="folder of the demo (%(default)s)")
    add("--output", help="the page; default: report.html in the folder")
    return parser


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
    """One line for all ranks: another than the first waits, as the first may say the same and end the run."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)
    where = f" (rank {rank})" if rank else ""
    print(f"moviegen: {' '.join(str(error).split())}{where}", file=sys.stderr, flush=True)


def _bucket(options):
    """The autoencoder's own bucket, with what the options change."""
    from nemo_moviegen.recipe import read_recipe

    file = Path(options.autoencoder) / "recipe.yaml"
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


def _shape(text):
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no latent shape: write frames x height x width, as in 32x96x96"
        )
    return tuple(int(part) for part in parts)


def _frame_size(text):
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no frame size: write height x width in pixels, as in 64x64"
        )
    return tuple(int(part) for part in parts)
