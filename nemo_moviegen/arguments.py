"""What one can type after `moviegen`: commands, their arguments, defaults and help. Imports nothing heavy."""

import argparse

import nemo_moviegen


def parse(arguments=None):
    """What was typed: options.command, and its arguments under the names below. Exits with 2 on misuse."""
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

    def command(name, help):
        added = commands.add_parser(name, help=help, description=f"{help}.", allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        added.set_defaults(command=name)
        return added.add_argument

    add = command("recipes", "list the recipes, or print one as YAML")
    add("recipe", nargs="?", help="a recipe's name or YAML file: print all its settings")
    add("settings", nargs="*", metavar="key=value", help="settings to change, as for train")

    add = command("count", "count the parameters and FLOPs of a model, part by part")
    add("name", help="a size (video_30b, video_5b, upsampler_7b, audio_13b, video_tiny) or a recipe")
    add("--latent", type=_shape, metavar="TxHxW", help="latent of one sample; default: the largest it takes")
    add("--text-tokens", type=int, default=256, help="real text tokens of one sample (%(default)s)")
    add("--json", action="store_true", help="print JSON")

    add = command("shapes", "render Moving Shapes: synthetic captioned clips and their manifest")
    add("folder", help="for the video files and manifest.parquet")
    add("--clips", type=int, default=256, help="clips to train on (%(default)s)")
    add("--heldout", type=int, default=0, help="further clips in the split heldout (%(default)s)")
    add("--frames", type=int, default=16, help="frames of a clip (%(default)s)")
    add("--size", type=int, default=64, help="height and width in pixels (%(default)s)")
    add("--fps", type=int, default=16, help="frames a second (%(default)s)")
    add("--seed", type=int, default=0)

    add = command("cut", "cut videos into clips and add them to a manifest; nothing is re-encoded")
    add("videos", nargs="+", help="video files")
    add("--manifest", required=True, help="Parquet manifest to write, or to add to")
    add("--seconds", type=float, default=4.0, help="length of a clip (%(default)s)")
    add("--caption", default="a video clip", help="caption of all clips (%(default)r)")
    add("--split", choices=("train", "heldout"), default="train")
    add("--images", action="store_true", help="also take the middle frame of each clip as an image")

    add = command("curate", "choose from a folder of videos the clips worth training on")
    add("folder", help="videos of any format, in any folders below, their captions beside them")
    add("output", help="folder for the scores, manifest.parquet and report.html; a second run goes on in it")
    add("settings", nargs="*", metavar="key=value", help="settings to change, as in filters.text.high=0.7")
    add("--recipe", required=True, help="curation.high_res, curation.low_res or curation.tiny")
    add("--task", type=_task, metavar="I/N", help="score one part of N, from 0/N; the last to end selects")
    add("--workers", type=int, default=1, metavar="N", help="processes that score, one a core (%(default)s)")

    add = command("plan", "memory, seconds and GPU-hours of a recipe on a cluster, before anything starts")
    add("recipe", nargs="?", help="a recipe's name or YAML file")
    add("settings", nargs="*", metavar="key=value", help="settings to change, as for train")
    add("--cluster", help="where it would run: a name of recipes/clusters; default: the recipe's")
    add("--search", action="store_true", help="all legal layouts and micro-batches, ranked")
    add("--top", type=int, default=10, help="how many of them to show (%(default)s)")
    add("--why", type=_changes, metavar="tensor=8,context=2", help="why a layout is refused, or its place")
    add("--text-tokens", type=int, help="tokens of the longest prompt of a micro-batch (256)")
    add("--validate", action="store_true", help="published training runs beside what is predicted of them")
    add("--json", action="store_true", help="print JSON")
    add("--html", metavar="FILE", help="also write a page with the bars of memory and time")

    add = command("train", "train a recipe on its cluster")
    add("recipe", help="a recipe's name (see `moviegen recipes`) or YAML file")
    add(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings to change, as in num_steps=10 layout.tensor=2",
    )
    add("--cluster", help="where it runs: a name of recipes/clusters or a YAML file, as cluster=NAME")

    add = command("submit", "check a recipe and hand it to SLURM as a batch job (slurm/train.sbatch)")
    add("recipe", help="a recipe's name or YAML file")
    add("settings", nargs="*", metavar="key=value", help="settings to change, as for train")
    add("--cluster", help="a name of recipes/clusters or a YAML file of your site; default: the recipe's")
    add("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add("--name", default="", help="of the job; default: the recipe's")
    add("--after", default="", metavar="JOB", help="start when that job has finished well")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="further options of sbatch, as in --sbatch=--exclude=n07; may be given several times",
    )
    add("--skip-paths", action="store_true", help="look at no file: data and output are on the nodes alone")

    add = command("progress", "make the page of a run, running or ended, and print where it stands")
    add("run_folder", metavar="RUN", help="output folder of the run; gets progress.html")

    add = command("average", "average the weights of several checkpoints into a new run")
    add("sources", nargs="+", help="run folders (their newest checkpoint) or folders checkpoints/step=N")
    add("--output", required=True, help="folder of the new run, to generate from or to start another from")
    add("--weights", type=_weights, metavar="1,2,1", help="one a checkpoint, above 0 (all alike)")
    add("--of", choices=("ema", "weights"), help="what to average (the EMA, where all checkpoints have one)")

    add = command("encode", "write the latents and text features of a manifest's clips")
    add(
        "--manifest",
        action="append",
        required=True,
        dest="manifests",
        help="clip manifest, as `shapes`, `cut` and `curate` write it; may be given several times",
    )
    add("--autoencoder", required=True, help="run folder of the autoencoder")
    add("--encoders", required=True, help="folder of the text encoders")
    add("--output", required=True, help="folder for the latents; held-out clips go to OUTPUT_heldout")
    add("--model", help="size or recipe the features are for (video_30b; video_tiny with toy encoders)")
    add("--toy-encoders", action="store_true", help="first write small encoders with seeded random weights")
    add(
        "--buckets",
        default="single",
        help="single (one shape for all), or what each clip fits of video_768, video_256, sft_768, "
        "image_256, image_1024, ablation_192, tiny, shapes (%(default)s)",
    )
    add("--task", type=_task, default=(0, 1), metavar="I/N", help="be one of N tasks that share the work")
    add("--frames", type=int, help="frames of a clip; this and the next two default to the autoencoder's own")
    add("--size", type=_frame_size, metavar="HxW", help="in pixels")
    add("--fps", type=float, help="frames a second")
    add("--batch", type=int, default=8, help="clips encoded at once (%(default)s)")
    add("--threads", type=int, default=1, help="threads that decode (%(default)s)")
    _add_tiles(add)

    add = command("demo", "run the whole chain at toy size, from raw video to prompted samples")
    add(
        "--recipe",
        default="tiny.t2iv",
        help="of the video model; tiny.shapes_long learns Moving Shapes at two frame rates, in an hour or so "
        "(%(default)s)",
    )
    add("--out", help="folder for everything (out/demo, or that of the recipe)")
    add("--scale", type=float, default=1.0, help="0.05 is a quick look (%(default)s)")
    add(
        "--fresh", action="store_true", help="forget what an earlier demo did; else its finished stages stand"
    )

    add = command("generate", "make videos or images from prompts; under torchrun on several ranks")
    add("run_folder", help="run folder of a video model")
    add("prompts", nargs="*", help="one prompt a video")
    add("--prompts-file", help="text file with one prompt a line")
    _add_models(add)
    add("--output", required=True, help="folder for the videos; what is there already is not made again")
    add("--bucket", metavar="SET/TxHxW", help="shape and rate of a bucket set, as video_768/256x576x1024")
    add("--frames", type=int, help="frames of a video; 1 makes images (256)")
    add("--size", type=_frame_size, metavar="HxW", help="in pixels (768x768)")
    add("--fps", type=float, help="frames a second (16, or the bucket's)")
    add(
        "--rewrite",
        default="",
        metavar="HOW",
        help="prompts as captions are: rules, or folder of a language model",
    )
    _add_sampler(add)
    add("--tensor", type=int, default=1, help="ranks that share the matrices of a layer (%(default)s)")
    add("--context", type=int, default=1, help="ranks that share the tokens of a video (%(default)s)")
    add("--task", type=_task, default=(0, 1), metavar="I/N", help="make one part of N, what is not there yet")
    _add_tiles(add)

    of_evaluate = commands.add_parser(
        "evaluate", help="measure a trained model", description="measure a trained model."
    ).add_subparsers(title="what", metavar="WHAT", required=True)

    def measure(name, help):
        added = of_evaluate.add_parser(name, help=help, description=f"{help}.", allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        added.set_defaults(command="evaluate", what=name)
        return added.add_argument

    add = measure("tae", "how well an autoencoder reconstructs held-out clips: numbers, pictures and a page")
    add("run_folder", metavar="RUN", help="run folder of the autoencoder")
    add("clips", metavar="CLIPS", help="manifest (held-out clips, if it has any), video, or folder of videos")
    add("--against", nargs="+", default=[], metavar="RUN", help="further runs to measure on the same frames")
    add("--seconds", nargs="+", type=float, default=[2, 4, 6, 8], help="durations of clips (2 4 6 8)")
    add(
        "--size",
        type=_frame_size,
        metavar="HxW",
        help="in pixels; default, as of --fps: the run's own",
    )
    add("--fps", type=float, help="frames a second")
    add("--fit", action="store_true", help="crop a size that is no multiple of 8 to one that is")
    add("--limit", type=int, default=200, help="clips of each duration, and images, at most (%(default)s)")
    add("--features", default="random", help="FID's: random, TorchScript or .pt2 file, package.module:name")
    add("--output", default="out/evaluation", help="folder for metrics and pictures (%(default)s)")
    add("--seed", type=int, default=0, help="which clips are drawn (%(default)s)")
    add(
        "--task", type=_task, default=(0, 1), metavar="I/N", help="measure one part of N; the last one writes"
    )
    _add_tiles(add)

    add = measure("shapes", "how often a model trained on Moving Shapes draws what the prompt says")
    add("run_folder", metavar="RUN", help="run folder of a video model")
    _add_models(add)
    add("--output", default="out/shapes", help="folder for the videos and scores (%(default)s)")
    add("--seen", type=int, default=192, help="prompts of combinations trained on (%(default)s)")
    add("--heldout", type=int, default=48, help="prompts of combinations held out of training (%(default)s)")
    add("--frames", type=int, default=16, help="frames of a video; 1 makes images (%(default)s)")
    add("--size", type=int, default=64, help="height and width in pixels (%(default)s)")
    add(
        "--fps",
        type=float,
        nargs="+",
        default=[16.0],
        help="frame rates, each asked for by every prompt (16)",
    )
    add("--shapes-seed", type=int, default=0, help="seed the clips were rendered with (%(default)s)")
    add(
        "--task", type=_task, default=(0, 1), metavar="I/N", help="make one part of N; the last one reads all"
    )
    _add_sampler(add, batch=16)
    _add_tiles(add)

    add = measure(
        "checkpoints", "validation loss and Moving Shapes score of every checkpoint, and how they go together"
    )
    add("run_folder", metavar="RUN", help="run folder of a video model; keep_every keeps its checkpoints")
    _add_models(add)
    add("--output", default="out/checkpoints", help="folder for videos, scores and the plot (%(default)s)")
    add("--seen", type=int, default=48, help="prompts of combinations trained on (%(default)s)")
    add("--heldout", type=int, default=24, help="prompts of combinations held out of training (%(default)s)")
    _add_sampler(add, batch=16)

    add = measure("samples", "FID, FVD and CLIP score of the samples of `moviegen generate`")
    add("samples", metavar="SAMPLES", help="folder that `moviegen generate` has filled")
    add("--real", metavar="CLIPS", help="what FID and FVD compare with: manifest, video or folder of videos")
    add("--fid", default="", metavar="NET", help="features of frames: random, file or package.module:name")
    add("--fvd", default="", metavar="NET", help="features of clips: random, file or package.module:name")
    add("--clip", default="", metavar="FOLDER", help="CLIP model and processor as transformers saves them")
    add("--output", default="out/samples", help="folder for metrics.json (%(default)s)")

    add = measure("votes", "net win rates and ratings from the votes of a page of `moviegen compare`")
    add(
        "votes",
        nargs="+",
        metavar="VOTES.json",
        help="files that raters saved, of one pair of models or several",
    )
    add("--output", help="file for all numbers, JSON")

    add = command("compare", "make the page on which people vote, blind, between the samples of two models")
    add(
        "folders",
        nargs=2,
        metavar="SAMPLES",
        help="two folders that `moviegen generate` filled from one prompts file",
    )
    add("--names", nargs=2, help="of the models, in the exported votes (the folders' names)")
    add("--axes", nargs="+", default=["text", "quality"], help="what is asked of each pair (text quality)")
    add("--limit", type=int, default=0, help="the first prompts only; 0 = all (%(default)s)")
    add("--output", default="out/compare.html", help="the page; it links the videos (%(default)s)")

    add = command("bench", "measure the training steps of a recipe, or ways to do the same work, in turns")
    add(
        "what",
        help="a recipe; parity, of the folders of an FP8 run and of its bf16 twin; steps: our training step, "
        "plain PyTorch's and diffusers'; loader: decoding, reading latents, memory, first batch; tae: our "
        "autoencoder and diffusers'",
    )
    add("settings", nargs="*", metavar="key=value", help="of a recipe: overrides, as layout.recompute=full")
    add(
        "--parity",
        action="store_true",
        help="of an FP8 recipe: train it and its bf16 twin on its data for --steps, and compare their losses",
    )
    add("--gap", type=float, help="the loss in FP8 may be above bf16's by so much (0.005)")
    add(
        "--cluster", help="of a recipe: where it runs, a name of recipes/clusters or a file; default: its own"
    )
    add("--steps", type=int, default=20, help="of a recipe: steps that are timed (%(default)s)")
    add("--warm-up", type=int, default=5, help="of a recipe: steps before them (%(default)s)")
    add("--profiled", type=int, default=3, help="of a recipe: steps after them, taken apart (%(default)s)")
    add(
        "--rank-slice",
        action="store_true",
        help="of a recipe: on one device, the share of the first rank of its cluster, without the others",
    )
    add("--layers", type=int, help="of a rank slice: so many of the model's layers (all)")
    add("--folder", default="out/bench", help="of a recipe: what is emptied and used (%(default)s)")
    add(
        "--parts",
        nargs="+",
        help="some only (all): of steps demo, mid; of loader decode, latents, memory, start; of tae "
        "production, small, long",
    )
    add("--videos", help="folder of videos to decode; default: renders VP9 and H.264 of real film itself")
    add("--frames", type=int, default=64, help="frames of a clip (%(default)s)")
    add("--size", type=_frame_size, default=(256, 256), metavar="HxW", help="in pixels (256x256)")
    add("--fps", type=float, default=16, help="frames a second of a clip (%(default)s)")
    add("--batch", type=int, default=4, help="clips of a batch (%(default)s)")
    add("--rounds", type=int, help="rounds, each way once in each (steps 12, loader 5, tae 3)")
    add("--samples", type=int, default=10_000, help="samples while memory is watched (%(default)s)")
    add("--json", help="file for all figures, with the machine's")

    add = command("report", "write the HTML page about a demo")
    add("folder", nargs="?", default="out/demo", help="folder of the demo (%(default)s)")
    add("--output", help="the page; default: report.html in the folder")
    return parser


def _add_models(add):
    """The folders of `generation.generate.Models`, but for the run's."""
    add("--autoencoder", required=True, help="run folder of the autoencoder")
    add("--encoders", required=True, help="folder of the text encoders")
    add("--latents", required=True, help="latents the model was trained on: statistics, empty prompt")
    add("--step", type=int, default=0, help="whose checkpoint; default: the newest")
    add("--weights", default="", choices=("ema", "weights"), help="default: the average where there is one")


def _add_sampler(add, batch=4):
    """`sampling.Sampler`."""
    add(
        "--method",
        default="",
        choices=("euler", "midpoint", "ddim"),
        help="how a step is taken: ddim of a model trained by v-prediction (euler)",
    )
    add("--schedule", default="linear-quadratic", choices=("linear-quadratic", "linear"))
    add("--steps", type=int, default=50, help="sampling steps (%(default)s)")
    add("--emulated-steps", type=int, default=250, help="N of the linear-quadratic schedule (%(default)s)")
    add("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    add("--negative", default="", metavar="PROMPT", help="what samples move away from (the empty prompt)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=int, default=batch, help="prompts sampled at once (%(default)s)")


def _add_tiles(add):
    """How long and large clips go through the autoencoder: `tae.tiling.Tiling`."""
    add(
        "--tile-frames",
        type=int,
        help="tiles in time (32, or the clips trained on); 0 = one stream, no seams",
    )
    add("--tile-px", type=int, default=0, help="tiles in space, for little memory; 0 = none (%(default)s)")


def _shape(text):
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no latent shape: write frames x height x width, as in 32x96x96"
        )
    return tuple(int(part) for part in parts)


def _task(text):
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no task: write I/N, from 0/4 to 3/4 for four")
    return int(index), int(count)


def _changes(text):
    changes = [part.strip() for part in text.replace(" ", ",").split(",") if part.strip()]
    if not changes or not all("=" in change for change in changes):
        raise argparse.ArgumentTypeError(f"{text!r} is no layout: write changes, as in tensor=8,context=2")
    return changes


def _weights(text):
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no weights: write numbers with commas between, as in 1,2,1"
        ) from None


def _frame_size(text):
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no frame size: write height x width in pixels, as in 64x64"
        )
    return tuple(int(part) for part in parts)
