"""Commands that make samples, and the page on which people compare them."""

from dataclasses import replace
from pathlib import Path

from nemo_moviegen.commands.asked import models_of, sampler_of, tiling_of


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
        models_of(options),
        prompts,
        options.output,
        bucket if options.fps is None else replace(bucket, fps=options.fps),
        sampler_of(options),
        tiling=tiling_of(options, options.autoencoder),
        task=options.task,
        layout=Layout(tensor=options.tensor, context=options.context),
        rewrite=find_rewrite(options.rewrite),
    )
    if made:  # the first rank says it
        print(*made, sep="\n")


def compare_command(options):
    """Make the page on which people vote between two models."""
    from nemo_moviegen.evaluation.compare import write_compare

    names = options.names or [Path(folder).resolve().name for folder in options.folders]
    path, number = write_compare(
        options.folders, names, options.output, axes=options.axes, limit=options.limit
    )
    print(f"{path}: {number} pairs, {len(options.axes)} questions each")
