"""Text to video (Movie Gen s3.4): prompt -> noise -> latent -> frames -> mp4.

    prompts -> (rewritten) -> text encoders, let go -> a batch at a time: sampled, decoded, written

Axis letters: B clips, T frames, C channels, H W height and width, L text tokens. t = 0 is noise,
t = 1 is data.
"""

import collections
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_moviegen import flow
from nemo_moviegen.generation import files
from nemo_moviegen.generation.checks import check_inputs, check_writable
from nemo_moviegen.layout import Layout
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.sampling import Sampler, decode, sample_latents, step_of
from nemo_moviegen.tae.tiling import Tiling
from nemo_moviegen.training.checkpoint import checkpoints
from nemo_moviegen.training.place import joined

_PAPERS, _ALONE = Sampler(), Layout()


@dataclass(frozen=True, kw_only=True)
class Models:
    """The folders a sample is made with."""

    run: Path
    """Run folder of the video model."""
    autoencoder: Path
    encoders: Path
    latents: Path
    """Latents the model was trained on: their statistics and the empty prompt."""
    step: int = 0
    """Whose checkpoint; 0 = the newest."""
    weights: str = ""
    """ema, or weights (those being trained); "" = the average where the run kept one."""

    def __post_init__(self):
        if self.weights not in ("", "ema", "weights"):
            raise ValueError(f"weights are {self.weights!r}; use ema, weights, or nothing for either")

    def folders(self) -> dict:
        """The folders by what they are called to the user."""
        return {
            "run": self.run,
            "autoencoder": self.autoencoder,
            "text encoder": self.encoders,
            "latents": self.latents,
        }


def generate(
    models,
    prompts,
    output,
    bucket,
    sampler=_PAPERS,
    *,
    tiling=None,
    task=(0, 1),
    layout=_ALONE,
    rewrite=None,
) -> list[Path]:
    """Write one mp4 a prompt (PNG for one frame) of `bucket`'s shape and rate; returns the files.

    A contact sheet and the settings lie beside them (`generation.files`). What is there already, of a job
    that was killed, is not made again. `task` (I, N) makes every Nth sample from the Ith. Under torchrun the
    ranks form copies of `layout` (tensor, context), which share the prompts; neither ranks nor batch change a
    sample. `rewrite` takes a prompt and returns the one the model is given (`generation.rewrite`). Frames
    are decoded in tiles (`tae.tiling.Tiling`, the paper's by default), which the ranks of a copy share, and
    written as they come. Ranks but the first return an empty list.

    Raises ValueError before any model is loaded where a folder, prompt, size or the output does not serve.
    """
    output = Path(output)
    latent_THW, method = check_inputs(models, prompts, bucket, sampler, layout)
    sampler = replace(sampler, method=method)
    check_writable(output)
    models = replace(models, step=models.step or max(checkpoints(models.run), default=0))
    tiling = tiling or Tiling()
    settings = files.settings_of(models, prompts, bucket, sampler, rewrite, tiling)
    files.check_settings(output, settings)
    rows = range(task[0], len(prompts), task[1])
    paths = {row: files.sample_file(output, row, prompts[row], bucket.num_frames) for row in rows}
    told = files.of_task(output / files.SETTINGS_FILE, task)
    sheet = files.of_task(output / files.SHEET_FILE, task)
    with joined(layout) as place:
        # as the first rank sees it: another may look when files of this very call are there already
        missing = place.of_first([row for row in rows if not paths[row].is_file()])
        if place.of_first(not missing and sheet.is_file()):
            return [] if place.rank else [*paths.values(), sheet, told]
        if place.rank == 0:
            files.write_settings(told, settings)
        texts = place.share(lambda: {row: rewrite(prompts[row]) if rewrite else prompts[row] for row in rows})
        own = missing[place.copy :: place.num_copies]
        shape = (bucket, latent_THW)
        made = _make(models, {row: (texts[row], paths[row]) for row in own}, shape, sampler, tiling, place)
        made = place.together(made)
    if place.rank:
        return []
    settings |= files.put_together(made)
    settings["samples"] = [
        {"number": row, "prompt": prompts[row], "file": paths[row].name}
        | ({"rewritten": texts[row]} if rewrite else {})
        for row in rows
    ]
    files.write_sheet(sheet, list(paths.values()), [prompts[row] for row in rows])
    return [*paths.values(), sheet, files.write_settings(told, settings)]


def _make(models, wanted, shape, sampler, tiling, place):
    """Write the samples `wanted`, {number: (text, file)}; returns what the settings say of them."""
    from nemo_moviegen.data.collate import limit_text
    from nemo_moviegen.data.latents import LatentReader
    from nemo_moviegen.training.autoencoder_weights import load_autoencoder
    from nemo_moviegen.training.checkpoint import load_video_model

    if not wanted:
        return {}
    bucket, latent_THW = shape
    latents = LatentReader(models.latents)
    model, recipe = load_video_model(
        models.run, place.layout, weights=models.weights or None, step=models.step
    )
    device = next(model.parameters()).device
    texts = [text for text, _ in wanted.values()] + [sampler.negative_prompt] * bool(sampler.negative_prompt)
    prompts = [with_fps(text, bucket.fps) for text in texts]
    encoded, num_cut = place.share(lambda: _encode(models.encoders, prompts, recipe.size.contexts, device))
    limits = (recipe.size.contexts, recipe.data.token_limits)
    encoded = [limit_text(feature, *limits) for feature in encoded]
    unwanted = encoded.pop() if sampler.negative_prompt else limit_text(latents.empty_prompt, *limits)
    features = dict(zip(wanted, encoded, strict=True))
    autoencoder = load_autoencoder(models.autoencoder).to(device)
    mean_C, std_C = (torch.as_tensor(numbers).float() for numbers in latents.statistics)
    scale = recipe.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
    batches = sample_batches(
        model,
        features,
        unwanted,
        recipe.size.contexts,
        (latent_THW[0], recipe.size.output_channels, *latent_THW[1:]),
        sampler=replace(sampler, guidance_scale=scale),
        objective=recipe.objective,
        shows=place.rank == 0,
    )
    sampling_seconds, started = 0.0, time.perf_counter()
    for rows, latent_BTCHW in batches:
        sampling_seconds += time.perf_counter() - started
        for row, latent_TCHW in zip(rows, latent_BTCHW, strict=True):
            chunks = decode(autoencoder, latent_TCHW, mean_C, std_C, bucket.num_frames, tiling, place.group)
            if place.is_first_of_copy:
                files.write_sample(chunks, wanted[row][1], bucket.fps)
            else:
                collections.deque(chunks, maxlen=0)  # its share of the tiles
        started = time.perf_counter()
    return {
        "recipe": recipe.name,
        "guidance_scale": scale,
        "sampling_seconds": round(sampling_seconds, 3),
        "num_cut": num_cut if place.is_first_of_copy else {},
    }


def _encode(folder, prompts, context_sizes, device):
    """(features of each prompt, prompts that were cut by encoder); the encoders do not stay."""
    from nemo_moviegen.text_encoders import TextEncoders

    encoders = TextEncoders.load(folder, context_sizes, device=device)
    features = encoders.encode(prompts)
    num_cut = {name: number for name, number in encoders.num_cut.items() if number}
    del encoders  # the largest of the three models: its memory is worth more to the decoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return features, num_cut


def sample_batches(
    model,
    features,
    unwanted,
    context_sizes,
    latent_TCHW,
    *,
    sampler,
    objective="flow_matching",
    shows=True,
):
    """Yield (numbers, normalised latents [B, T, C, H, W] on the CPU), a batch of prompts at a time.

    `features` maps the number of each sample, which keys its noise, to the prompt's: an encoder's name to its
    real tokens [L, width], as `unwanted` does: those of the empty prompt, or of what samples move away from.
    `latent_TCHW` is a shape, `objective` what the model was trained for.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    device, schedule, numbers = next(model.parameters()).device, sampler.times(), list(features)
    starts = range(0, len(numbers), sampler.batch_size)
    with Progress(*columns, TimeRemainingColumn(), disable=not shows) as progress:
        bar = progress.add_task("", total=len(starts) * (len(schedule) - 1))
        for start in starts:
            rows = numbers[start : start + sampler.batch_size]
            noise_BTCHW = flow.draw_noise(latent_TCHW, sampler.seed, rows, [0] * len(rows))
            latent_BTCHW = sample_latents(
                model.velocity,
                noise_BTCHW.to(device),
                pad_contexts([features[row] for row in rows], context_sizes, device),
                pad_contexts([unwanted] * len(rows), context_sizes, device),
                schedule=schedule,
                guidance_scale=sampler.guidance_scale,
                step=step_of(objective, sampler.method),
                progress=lambda intervals: _counted(intervals, lambda: progress.advance(bar)),
            )
            yield rows, latent_BTCHW.cpu()


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


def _counted(items, advance):
    for item in items:
        yield item
        advance()
