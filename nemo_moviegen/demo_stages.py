"""The commands that make a demo, stage by stage: of `make demo`, or of a longer run of Moving Shapes."""

from dataclasses import dataclass, replace
from pathlib import Path

from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.report_charts import AUTOENCODER_REPORT
from nemo_moviegen.report_scores import CHECKPOINTS_SCORES, SHAPES_SCORES

RECIPE = "tiny.t2iv"
"""What a demo trains unless told otherwise."""
NUM_CORES = 2
"""That a demo makes use of."""
PROMPTS_FILE = "prompts.txt"
NUM_CLIPS, NUM_HELDOUT = 600, 24
"""Of each frame rate."""
NUM_MEASURED = 12
"""Held-out clips, and images, that the autoencoder and the image autoencoder rebuild for the comparison."""
NUM_SEEN_SCORED, NUM_HELDOUT_SCORED = 48, 24
"""Prompts whose videos are made to be counted, at each frame rate."""
NUM_SEEN_KEPT, NUM_HELDOUT_KEPT = 32, 16
"""Of each checkpoint, where a recipe keeps them."""
LONG_SCORED = 2
"""Times as many of a recipe that keeps its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands (arguments of `moviegen`) that make `outputs` from what earlier stages made."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[Path, ...]
    resumes: bool = False
    """Whether an interrupted run goes on from what it left; otherwise that is deleted first."""
    recipe: str = ""
    """YAML of the recipe that a training command names: with another the stage is another."""


def demo_stages(out, scale, num_clips=NUM_CLIPS, recipe=RECIPE) -> list[Stage]:
    """The stages in order, for a demo below the folder `out` whose last training is of that recipe.

    Clips are rendered at each frame rate of its buckets; where it keeps checkpoints, all are measured.
    """
    import recipes

    tae, video = recipes.get("tae.tiny"), recipes.get(recipe)
    fps, *further = frame_rates(tae, video)
    videos_at = {rate: out / f"videos_{rate:g}_fps" for rate in further}
    manifests = [out / "clips", *videos_at.values()]
    manifests = [folder / "manifest.parquet" for folder in manifests]
    report = out / "report.html"
    return [
        _clips(out, scale, num_clips, videos_at),
        *_autoencoders(out, scale, manifests[0]),
        _latents(out, video, manifests),
        *_trainings(out, scale, video),
        *_samples(out, scale, tae.data.bucket, video, (fps, *further)),
        _stage("report", (("report", out, "--output", report),), report),
    ]


def frame_rates(tae, video) -> tuple[float, ...]:
    """Of the clips: what the autoencoder trains on, then what else the video model's buckets have."""
    own, name = tae.data.bucket.fps, video.data.buckets
    others = {duration.fps for duration in bucket_set(name).durations} if name else set()
    return (own, *sorted(others - {own}))


def train_command(recipe, scale, settings) -> tuple[str, ...]:
    """`train NAME` with the settings that differ from the recipe's, steps scaled."""
    changed = {key: value for key, value in settings.items() if str(value) != str(_setting(recipe, key))}
    if scale != 1:
        changed["num_steps"] = steps = max(4, round(recipe.num_steps * scale))
        changed["save_every"] = save_every = max(2, min(recipe.save_every or steps, steps // 2))
        changed["log_every"] = max(1, min(recipe.log_every, steps // 20))
        changed["optim.warmup_steps"] = max(1, round(recipe.optim.warmup_steps * min(scale, 1)))
        if getattr(recipe, "keep_every", 0):
            changed["keep_every"] = save_every
    return ("train", recipe.name, *(f"{key}={value}" for key, value in changed.items()))


def _clips(out, scale, num_clips, videos_at):
    counts = ("--clips", max(24, round(num_clips * scale)), "--heldout", max(4, round(NUM_HELDOUT * scale)))
    commands = [("shapes", out / "videos" / "shapes", *counts)]
    commands += [
        ("curate", out / "videos", out / "clips", "--recipe", "curation.tiny", "--workers", NUM_CORES)
    ]
    for fps, folder in videos_at.items():  # another seed: clips of their own
        commands += [("shapes", folder, *counts, "--fps", f"{fps:g}", "--seed", f"{fps:g}")]
    return _stage("clips", commands, out / "videos", out / "clips", *videos_at.values())


def _autoencoders(out, scale, manifest):
    import recipes

    where = {"output": out / "tae_image", "data.manifest": manifest}
    image = train_command(recipes.get("tae.tiny_image"), scale, where)
    where |= {"output": out / "tae", "init_from": out / "tae_image"}
    video = train_command(recipes.get("tae.tiny"), scale, where)
    measure = ("evaluate", "tae", out / "tae", manifest, "--against", out / "tae_image", "--seconds", 1)
    measure += ("--limit", NUM_MEASURED, "--output", out / AUTOENCODER_REPORT.parent)
    return [
        _training("image autoencoder", image, out / "tae_image"),
        _training("autoencoder", video, out / "tae"),
        _stage("autoencoder measured", (measure,), out / AUTOENCODER_REPORT.parent),
    ]


def _latents(out, video, manifests):
    from nemo_moviegen.validation import heldout_folder

    latents, encoders = out / "latents", out / "encoders"
    encode = ["encode"]
    for manifest in manifests:
        encode += ["--manifest", manifest]
    encode += ["--autoencoder", out / "tae", "--encoders", encoders, "--output", latents, "--toy-encoders"]
    if video.data.buckets:
        encode += ["--buckets", video.data.buckets]
    return _stage("latents", (encode,), encoders, latents, heldout_folder(latents))


def _trainings(out, scale, video):
    import recipes

    where = {"output": out / "t2i", "data.folder": out / "latents"}
    images = train_command(recipes.get("tiny.t2i"), scale, where)
    where |= {"output": out / "t2iv", "init_from": out / "t2i"}
    return [
        _training("images", images, out / "t2i"),
        _training("images and video", train_command(video, scale, where), out / "t2iv"),
    ]


def _samples(out, scale, bucket, video, rates):
    size = f"{bucket.height_px}x{bucket.width_px}"
    models = ("--autoencoder", out / "tae", "--encoders", out / "encoders", "--latents", out / "latents")
    generate = ("generate", out / "t2iv", "--prompts-file", out / PROMPTS_FILE, *models)
    generate += ("--output", out / "generated", "--frames", bucket.num_frames, "--size", size)
    generate += ("--fps", f"{bucket.fps:g}")
    times = min(scale, 1) * (LONG_SCORED if video.keep_every else 1)
    score = ("evaluate", "shapes", out / "t2iv", *models, "--output", out / SHAPES_SCORES.parent)
    score += ("--seen", max(2, round(NUM_SEEN_SCORED * times)))
    score += ("--heldout", max(1, round(NUM_HELDOUT_SCORED * times)))
    score += ("--fps", *(f"{rate:g}" for rate in rates)) if len(rates) > 1 else ()
    stages = [
        _stage("generate", (generate,), out / "generated"),
        _stage("scores", (score,), out / SHAPES_SCORES.parent),
    ]
    if video.keep_every:
        folder = out / CHECKPOINTS_SCORES.parent
        measure = ("evaluate", "checkpoints", out / "t2iv", *models, "--output", folder)
        measure += ("--seen", max(2, round(NUM_SEEN_KEPT * min(scale, 1))))
        measure += ("--heldout", max(1, round(NUM_HELDOUT_KEPT * min(scale, 1))))
        stages += [_stage("checkpoints", (measure,), folder)]
    return stages


def _training(name, command, output):
    import recipes
    from nemo_moviegen.recipe import recipe_yaml

    stage = _stage(name, (command,), output)
    return replace(stage, resumes=True, recipe=recipe_yaml(recipes.get(command[1])))


def _stage(name, commands, *outputs):
    commands = tuple(tuple(str(word) for word in command) for command in commands)
    return Stage(name=name, commands=commands, outputs=outputs)


def _setting(recipe, key):
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe
