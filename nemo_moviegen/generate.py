"""Text to video (Movie Gen s3.4): prompt -> noise -> latent -> frames -> mp4.

Axis letters: B clips, T frames, C channels, H W height and width, L text tokens. t = 0 is noise,
t = 1 is data.
"""

import json
import re
import time
from pathlib import Path

import torch

from nemo_moviegen import flow
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.sampling import decode, keeping, sample_latents
from nemo_moviegen.video_files import contact_sheet, pick_frames, stream_mp4, write_png
from nemo_moviegen.writable import why_not_writable

LATENT_STRIDE = 8
"""Pixels and frames of one latent position (s3.1.1)."""
SETTINGS_FILE = "settings.json"
SHEET_FILE = "contact_sheet.png"
SHEET_COLUMNS = 8


def generate(
    run_folder,
    prompts,
    output,
    *,
    autoencoder_folder,
    encoders_folder,
    latents_folder,
    num_frames,
    height_px,
    width_px,
    fps,
    num_steps=50,
    emulated_steps=250,
    guidance_scale=None,
    seed=0,
    batch_size=4,
    tiling=None,
    task=(0, 1),
) -> list[Path]:
    """Write one mp4 a prompt (PNG for num_frames = 1), a contact sheet and the settings; returns the files.

    `task` (I, N) makes every Nth sample from the Ith, and of those only what is not there yet; its settings
    and its sheet carry its number.

    Sampling is Euler over the linear-quadratic schedule with classifier-free guidance (s3.4); where
    `guidance_scale` is None the recipe's counts. The noise of prompt i is keyed by (seed, i), so neither
    `batch_size` nor the other prompts change a sample. Frames are decoded in tiles (`tae.tiling.Tiling`, the
    paper's by default) and written as they come. Raises ValueError before any model is loaded where a folder,
    a prompt, a size or the output does not serve.
    """
    from nemo_moviegen.data.collate import limit_text
    from nemo_moviegen.data.latents import LatentReader
    from nemo_moviegen.text_encoders import TextEncoders
    from nemo_moviegen.training.autoencoder import load_autoencoder
    from nemo_moviegen.training.checkpoint import load_video_model

    output = Path(output)
    folders = {
        "run": run_folder,
        "autoencoder": autoencoder_folder,
        "text encoder": encoders_folder,
        "latents": latents_folder,
    }
    for kind, folder in folders.items():
        check_folder(kind, folder)
    check_prompts(prompts)
    latent_THW = latent_size(num_frames, height_px, width_px)
    check_rate(fps, batch_size)
    schedule = flow.linear_quadratic_schedule(num_steps, emulated_steps)
    check_fits(run_folder, latent_THW)
    check_writable(output)
    settings = {
        **{f"{kind.replace(' ', '_')}_folder": str(folder) for kind, folder in folders.items()},
        "num_frames": num_frames,
        "height_px": height_px,
        "width_px": width_px,
        "fps": fps,
        "schedule": f"linear-quadratic, {num_steps} Euler steps emulating {emulated_steps}",
        "seed": seed,
    }
    rows = range(task[0], len(prompts), task[1])
    if task[1] > 1:
        check_settings(output, settings)
        rows = [row for row in rows if not sample_file(output, row, prompts[row], num_frames).is_file()]
        if not rows:
            return []

    latents = LatentReader(latents_folder)
    model, recipe = load_video_model(run_folder)
    scale = recipe.guidance_scale if guidance_scale is None else guidance_scale
    device = next(model.parameters()).device
    encoders = TextEncoders.load(encoders_folder, recipe.size.contexts, device=device)
    limits = (recipe.size.contexts, recipe.data.token_limits)
    features = encoders.encode([with_fps(prompts[row], fps) for row in rows])
    features = [limit_text(feature, *limits) for feature in features]
    del encoders  # the largest of the three models: its memory is worth more to the decoder
    autoencoder = load_autoencoder(autoencoder_folder).to(device)

    started = time.perf_counter()
    mean_C, std_C = (torch.as_tensor(numbers).float() for numbers in (latents.mean_C, latents.std_C))
    latent_BTCHW = sample_prompts(
        model,
        features,
        limit_text(latents.empty_prompt, *limits),
        recipe.size.contexts,
        (latent_THW[0], recipe.size.output_channels, *latent_THW[1:]),
        schedule=schedule,
        guidance_scale=scale,
        seed=seed,
        batch_size=batch_size,
        numbers=list(rows),
    )
    seconds = time.perf_counter() - started
    videos = (decode(autoencoder, latent, mean_C, std_C, num_frames, tiling) for latent in latent_BTCHW)
    sheet, told = (_of_task(output / name, task) for name in (SHEET_FILE, SETTINGS_FILE))
    numbered = [(row, prompts[row]) for row in rows]
    files = write_samples(videos, num_frames, numbered, output, fps, sheet)
    settings |= {
        "recipe": recipe.name,
        "guidance_scale": scale,
        "sampling_seconds": round(seconds, 3),
        "samples": [{"prompt": prompts[r], "file": f.name} for r, f in zip(rows, files, strict=True)],
    }
    told.write_text(json.dumps(settings, indent=2) + "\n")
    return [*files, sheet, told]


def sample_prompts(
    model,
    features,
    empty_prompt,
    context_sizes,
    latent_TCHW,
    *,
    schedule,
    guidance_scale,
    seed,
    batch_size,
    numbers=None,
) -> torch.Tensor:
    """Normalised latents [B, T, C, H, W] on the CPU, one for each element of `features`.

    `features` and `empty_prompt` map an encoder's name to its real tokens [L, width]; `latent_TCHW` is
    a shape. `numbers` are the samples' own, which key their noise; default: 0, 1, 2, ...
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    device = next(model.parameters()).device
    numbers, starts = list(numbers or range(len(features))), range(0, len(features), batch_size)
    latents = []
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(starts) * (len(schedule) - 1))
        for start in starts:
            rows = range(start, min(start + batch_size, len(features)))
            latent_BTCHW = sample_latents(
                model.velocity,
                flow.draw_noise(latent_TCHW, seed, [numbers[r] for r in rows], [0] * len(rows)).to(device),
                pad_contexts([features[row] for row in rows], context_sizes, device),
                pad_contexts([empty_prompt] * len(rows), context_sizes, device),
                schedule=schedule,
                guidance_scale=guidance_scale,
                progress=lambda intervals: _counted(intervals, lambda: progress.advance(task)),
            )
            latents.append(latent_BTCHW.cpu())
    return torch.cat(latents)


def pad_contexts(features, context_sizes, device=None):
    """(contexts, masks) for the backbone: per encoder [B, max_tokens, width] and bool [B, max_tokens].

    `features` holds one dict a prompt of encoder name -> real tokens [L, width]; padding is zero and masked.
    ValueError where a feature is wider or longer than the model takes.
    """
    from nemo_moviegen.data.collate import pad_features

    contexts, masks = [], []
    for size in context_sizes:
        tokens = [feature[size.name] for feature in features]
        for tokens_LD in tokens:
            if tokens_LD.ndim != 2 or tokens_LD.shape[1] != size.width or len(tokens_LD) > size.max_tokens:
                raise ValueError(
                    f"features of {size.name} have shape {list(tokens_LD.shape)}, the model takes [up to "
                    f"{size.max_tokens}, {size.width}]: use the encoders and latents it was trained with"
                )
        context, mask = pad_features(tokens, size.max_tokens, size.width)
        contexts.append(torch.from_numpy(context).to(device))
        masks.append(torch.from_numpy(mask).to(device))
    return tuple(contexts), tuple(masks)


def write_samples(videos, num_frames, numbered, output, fps, sheet) -> list[Path]:
    """One file a video, named by number and prompt, and the contact sheet; returns the files.

    A video is an iterable of chunks [t, 3, H, W], `num_frames` in all; only what the sheet shows is kept.
    `numbered` has the (number, prompt) of each.
    """
    files, shown = [], []
    for chunks, (number, prompt) in zip(videos, numbered, strict=True):
        path, kept = sample_file(output, number, prompt, num_frames), []
        passing = keeping(chunks, pick_frames(num_frames, SHEET_COLUMNS), kept)
        if num_frames == 1:
            files.append(write_png(torch.cat(list(passing))[0], path))
        else:
            files.append(stream_mp4(passing, path, fps))
        shown.append(torch.stack(kept))
    contact_sheet(shown, [prompt for _, prompt in numbered], sheet, num_columns=SHEET_COLUMNS)
    return files


def sample_file(output, number, prompt, num_frames) -> Path:
    """Where the sample of that number goes; it appears under its name when it is whole."""
    ending = "png" if num_frames == 1 else "mp4"
    return Path(output, f"{number:03d}-{_slug(prompt)}.{ending}")


def _of_task(path, task):
    return path if task[1] == 1 else path.with_name(f"{path.stem}-{task[0]}-of-{task[1]}{path.suffix}")


def latent_size(num_frames, height_px, width_px) -> tuple[int, int, int]:
    """(frames, height, width) of the latent; ValueError where a side is no multiple of 16 px (8x, patch 2)"""
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; an image has 1, a video more")
    step = 2 * LATENT_STRIDE
    for side, length in (("height_px", height_px), ("width_px", width_px)):
        if length < step or length % step:
            near = max(step, round(length / step) * step)
            raise ValueError(f"{side} is {length}; it must be a multiple of {step}, for example {near}")
    return -(-num_frames // LATENT_STRIDE), height_px // LATENT_STRIDE, width_px // LATENT_STRIDE


def check_prompts(prompts):
    """ValueError where there is no prompt, or an empty one."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are {prompts!r}; give a list of at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; describe the video in words")


def check_rate(fps, batch_size):
    """ValueError for a frame rate or batch size that cannot be."""
    if not fps > 0:
        raise ValueError(f"fps is {fps}; use the frame rate the model was trained at, for example 16")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use 1 or more")


def check_folder(kind, folder):
    """ValueError where `folder` is missing or empty."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "is empty" if folder.is_dir() else "does not exist"
        raise ValueError(f"the {kind} folder {folder} {state}; give the folder its stage has written")


def check_fits(run_folder, latent_THW):
    """ValueError where the run's recipe is missing or its position tables are smaller than the latent."""
    from nemo_moviegen.recipe import RECIPE_FILE, VideoRecipe, read_recipe

    path = Path(run_folder) / RECIPE_FILE
    if not path.is_file():
        raise ValueError(f"{run_folder} holds no recipe.yaml: it is not the output folder of a training run")
    recipe = read_recipe(path)
    if not isinstance(recipe, VideoRecipe):
        raise ValueError(
            f"{run_folder} holds a run of {recipe.name}, which is no video model: give one that is"
        )
    recipe.size.num_tokens(latent_THW)


def check_writable(output):
    """Make the folder `output`; ValueError where that, or writing in it, is not allowed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        problem = why_not_writable(output)
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ValueError(f"cannot write to {output} ({problem}); choose another output folder")


def check_settings(output, settings):
    """ValueError where samples in `output` were made with other settings: a task would take them for it."""
    for path in sorted(output.glob(f"{Path(SETTINGS_FILE).stem}*.json")):
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            raise ValueError(
                f"{output} holds samples of another {', '.join(changed)} ({path.name}): choose another "
                "output folder, or remove them"
            )


def _counted(items, advance):
    for item in items:
        yield item
        advance()


def _slug(prompt):
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "sample"
