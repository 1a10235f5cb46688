"""What several commands read out of their options."""

from dataclasses import replace
from pathlib import Path


def recipe_of(name, options):
    """The recipe of that name with the settings and the cluster that were asked for."""
    from nemo_moviegen.recipe import override
    from nemo_moviegen.tables import find_recipe

    recipe = override(find_recipe(name), options.settings)
    return replace(recipe, cluster=options.cluster) if options.cluster else recipe


def models_of(options):
    from nemo_moviegen.generation.generate import Models

    return Models(
        run=options.run_folder,
        autoencoder=options.autoencoder,
        encoders=options.encoders,
        latents=options.latents,
        step=options.step,
        weights=options.weights,
    )


def sampler_of(options):
    from nemo_moviegen.sampling import Sampler

    return Sampler(
        method=options.method,
        schedule=options.schedule,
        num_steps=options.steps,
        emulated_steps=options.emulated_steps,
        guidance_scale=options.guidance,
        negative_prompt=options.negative.strip(),
        seed=options.seed,
        batch_size=options.batch,
    )


def tiling_of(options, autoencoder_folder):
    """Tiles as asked for, overlapping by half in time; ValueError for sizes that do not serve."""
    from nemo_moviegen.recipe import RECIPE_FILE, read_recipe
    from nemo_moviegen.tae.tiling import Tiling, trained_frames

    frames, size_px = options.tile_frames, options.tile_px
    file = Path(autoencoder_folder, RECIPE_FILE)
    if frames is None:
        frames = trained_frames(read_recipe(file)) if file.is_file() else Tiling().frames
    shared_frames, shared_px = frames // 2 // 8 * 8, min(64, size_px // 4 // 8 * 8)
    return Tiling(frames=frames, overlap_frames=shared_frames, size_px=size_px, overlap_px=shared_px)


def bucket_of(options):
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
