"""What can be told before a model is loaded: folders, prompts, sizes, the output."""

import math
from pathlib import Path

from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.recipe import RECIPE_FILE, TaeRecipe, VideoRecipe, read_recipe
from nemo_moviegen.sampling import method_of
from nemo_moviegen.writable import why_not_writable

LATENT_STRIDE = 8
"""Pixels of one latent position along each side, and the paper's frames of one (s3.1.1)."""


def check_inputs(models, prompts, bucket, sampler, layout) -> tuple[tuple[int, int, int], str]:
    """((frames, height, width) of the latents, how the model takes a step).

    ValueError where a folder, prompt, size or the sampler does not serve.
    """
    for kind, folder in models.folders().items():
        check_folder(kind, folder)
    check_prompts(prompts)
    check_rate(bucket.fps)
    autoencoder = read_autoencoder_size(models.autoencoder)
    compression = autoencoder.temporal_compression
    latent_THW = latent_size(bucket.num_frames, bucket.height_px, bucket.width_px, compression)
    recipe = check_fits(models.run, latent_THW)
    size = recipe.size
    if autoencoder.latent_channels != size.output_channels:
        raise ValueError(
            f"{models.autoencoder} decodes latents of {autoencoder.latent_channels} channels, {models.run} "
            f"makes {size.output_channels}: give the autoencoder that encoded what the model was trained on"
        )
    check_layout(size, latent_THW, layout)
    return latent_THW, method_of(recipe.objective, sampler.method)


def check_layout(size, latent_THW, layout):
    """ValueError where the heads or the tokens do not split over the ranks of one copy of the model."""
    num_tokens, ranks = size.num_tokens(latent_THW), layout.model_ranks
    if size.num_heads % layout.tensor:
        raise ValueError(f"{size.num_heads} heads do not split over tensor {layout.tensor}: use a divisor")
    if num_tokens % ranks:
        raise ValueError(
            f"{num_tokens} tokens do not split over tensor {layout.tensor} x context {layout.context}: use "
            "fewer ranks for a copy of the model, or another size"
        )


def find_bucket(name) -> Bucket:
    """The shape `SET/FRAMESxHEIGHTxWIDTH` of a bucket set; ValueError with the known ones for another."""
    family, _, shape = name.partition("/")
    known = {f"{b.num_frames}x{b.height_px}x{b.width_px}": b for b in bucket_set(family).buckets}
    if shape not in known:
        raise ValueError(
            f"buckets {family} have no shape {shape or 'without a name'!r}; use "
            + ", ".join(f"{family}/{shape}" for shape in known)
        )
    return known[shape]


def latent_size(num_frames, height_px, width_px, compression=LATENT_STRIDE) -> tuple[int, int, int]:
    """(frames, height, width) of the latent; ValueError where a side is no multiple of 16 px (8x, patch 2).

    `compression` is how many frames the autoencoder puts into one.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; an image has 1, a video more")
    step = 2 * LATENT_STRIDE
    for side, length in (("height_px", height_px), ("width_px", width_px)):
        if length < step or length % step:
            near = max(step, round(length / step) * step)
            raise ValueError(f"{side} is {length}; it must be a multiple of {step}, for example {near}")
    return -(-num_frames // compression), height_px // LATENT_STRIDE, width_px // LATENT_STRIDE


def check_prompts(prompts):
    """ValueError where there is no prompt, or an empty one."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are {prompts!r}; give a list of at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; describe the video in words")


def check_rate(fps):
    """ValueError for a frame rate that no prompt can name."""
    if not 0.5 <= fps <= 1000 or not math.isfinite(fps):
        raise ValueError(f"fps is {fps:g}; use a frame rate the model was trained at, for example 16")


def check_folder(kind, folder):
    """ValueError where `folder` is missing or empty."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "is empty" if folder.is_dir() else "does not exist"
        raise ValueError(f"the {kind} folder {folder} {state}; give the folder its stage has written")


def check_fits(run_folder, latent_THW):
    """The run's `VideoRecipe`; ValueError where it has no recipe, or position tables too small."""
    path = Path(run_folder) / RECIPE_FILE
    if not path.is_file():
        raise ValueError(f"{run_folder} holds no recipe.yaml: it is not the output folder of a training run")
    recipe = read_recipe(path)
    if not isinstance(recipe, VideoRecipe):
        raise ValueError(
            f"{run_folder} holds a run of {recipe.name}, which is no video model: give one that is"
        )
    recipe.size.num_tokens(latent_THW)
    return recipe


def read_autoencoder_size(folder):
    """The `AutoencoderSize` of a run; ValueError where the folder holds none."""
    path = Path(folder) / RECIPE_FILE
    recipe = read_recipe(path) if path.is_file() else None
    if not isinstance(recipe, TaeRecipe):
        holds = f"holds a run of {recipe.name}" if recipe else "holds no recipe.yaml"
        raise ValueError(f"the autoencoder folder {folder} {holds}: give the run folder of an autoencoder")
    return recipe.autoencoder


def check_writable(output):
    """Make the folder `output`; ValueError where that, or writing in it, is not allowed."""
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        problem = why_not_writable(output)
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ValueError(f"cannot write to {output} ({problem}); choose another output folder")
