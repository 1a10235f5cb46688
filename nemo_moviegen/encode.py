"""Clips and captions to latent shards, once before training: `moviegen encode` (s3.1.1, s3.1.4).

    manifest -> frames in [-1, 1] -> TAE, mean of the posterior -.
             -> captions, FPS first -> text encoders -------------+-> shards

Clips of the train split go to the output folder, held-out ones to a second folder beside it, so no training
run can read them by mistake. A folder is readable only once it is whole: a killed run leaves no index.
"""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

import torch

from nemo_moviegen.prompts import with_fps
from nemo_moviegen.validation import heldout_folder

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
"""In the output folder: one line for each clip that was left out."""


def encode(
    manifest,
    autoencoder_folder,
    encoders_folder,
    output,
    *,
    bucket,
    context_sizes,
    batch_size=8,
    num_threads=1,
    samples_per_shard=1000,
) -> dict:
    """Write the latents of every clip and image of a manifest; returns what was done.

    Frames are those of `bucket`, its rate leads every caption; features are those of `context_sizes`.
    Held-out clips go to `heldout_folder(output)`, normalised like the training set, and are absent where the
    manifest has none. Returned keys: train, heldout (samples written), quarantined (ids of the clips left
    out for their file's fault), num_cut (prompts cut, by encoder), seconds. Runs on a GPU if there is one.

    ValueError, with the latents that were there left alone, where the manifest, a folder of weights or the
    bucket does not serve; also where no training clip is readable.
    """
    from nemo_moviegen.data.clips import read_manifest
    from nemo_moviegen.text_encoders import TextEncoders, encoder_device
    from nemo_moviegen.training.autoencoder import load_autoencoder

    started = time.perf_counter()
    clips = read_manifest(manifest)
    splits = {split: [clip for clip in clips if clip.split == split] for split in ("train", "heldout")}
    _check(manifest, splits, bucket, batch_size)
    device, dtype = encoder_device()
    encoders = TextEncoders.load(encoders_folder, context_sizes, device=device, dtype=dtype)
    autoencoder = load_autoencoder(autoencoder_folder).to(device)

    folders = {"train": Path(output), "heldout": heldout_folder(output)}
    _invalidate(folders.values())
    summary = {"train": 0, "heldout": 0, "quarantined": []}
    for split, folder in folders.items():
        if splits[split]:
            num_written, quarantined = encode_clips(
                splits[split],
                autoencoder,
                encoders,
                folder,
                bucket=bucket,
                batch_size=batch_size,
                num_threads=num_threads,
                samples_per_shard=samples_per_shard,
            )
            summary[split] = num_written
            summary["quarantined"] += quarantined
    if summary["heldout"]:
        _share_statistics(folders["train"], folders["heldout"])
    return summary | {"num_cut": dict(encoders.num_cut), "seconds": time.perf_counter() - started}


@torch.no_grad()
def encode_clips(
    clips, autoencoder, encoders, folder, *, bucket, batch_size=8, num_threads=1, samples_per_shard=1000
) -> tuple[int, list[str]]:
    """Latent shards of these clips in `folder`; returns the number written and the ids of those left out.

    Latents are the mean of the autoencoder's posterior: sampling noise belongs to its training. ValueError
    where nothing is readable.
    """
    from nemo_moviegen.data.clips import sample_id
    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
    from nemo_moviegen.data.latents import LatentSample

    device = next(autoencoder.parameters()).device
    loader = ClipLoader(
        clips,
        bucket,
        batch_size=batch_size,
        order=range(len(clips)),
        device_id=device.index if device.type == "cuda" else None,
        num_threads=num_threads,
        quarantine=folder / QUARANTINE,
    )
    num_written = 0
    with LatentWriter(folder, samples_per_shard) as writer, _progress(folder.name, len(clips)) as advance:
        (folder / QUARANTINE).unlink(missing_ok=True)  # that of an earlier run
        write_empty_prompt(folder, encoders.encode([""])[0])
        for video_BTCHW, rows in loader:
            latent_BTCHW = autoencoder.encode(video_BTCHW.to(device)).mean_BTCHW.float().cpu().numpy()
            contexts = encoders.encode([with_fps(clips[row].caption, bucket.fps) for row in rows])
            for row, latent_TCHW, context in zip(rows, latent_BTCHW, contexts, strict=True):
                writer.add(
                    LatentSample(
                        sample_id=sample_id(clips[row].clip_id),
                        clip_id=clips[row].clip_id,
                        caption=clips[row].caption,
                        fps=bucket.fps,
                        latent_TCHW=latent_TCHW,
                        contexts=context,
                    )
                )
            num_written += len(rows)
            advance(num_written + loader.quarantined)
    quarantined = [clips[row].clip_id for row in sorted(loader.bad_rows)]
    if quarantined:
        logger.warning(
            "%d of %d clips were left out, see %s: %s",
            len(quarantined),
            len(clips),
            folder / QUARANTINE,
            ", ".join(quarantined[:10]) + (", ..." if len(quarantined) > 10 else ""),
        )
    return num_written, quarantined


def _check(manifest, splits, bucket, batch_size):
    from nemo_moviegen.tae.model import COMPRESSION

    if not splits["train"]:
        raise ValueError(
            f"{manifest} has no clip of the split train: mark some, or add some (`moviegen cut`)"
        )
    for name in ("height_px", "width_px"):
        if getattr(bucket, name) % COMPRESSION:
            raise ValueError(f"bucket.{name} is {getattr(bucket, name)}; use a multiple of {COMPRESSION}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use 1 or more")


def _invalidate(folders):
    """Both splits come from one autoencoder: with the first sample of a new one, neither old set is whole."""
    from nemo_moviegen.data.latents import INDEX

    for folder in folders:
        (folder / INDEX).unlink(missing_ok=True)


def _share_statistics(train, heldout):
    """Held-out latents are normalised by the training set's statistics, as its model was."""
    from nemo_moviegen.data.latents import STATISTICS

    part = heldout / f"{STATISTICS}.part"
    shutil.copyfile(train / STATISTICS, part)
    os.replace(part, heldout / STATISTICS)


@contextlib.contextmanager
def _progress(name, total):
    """A bar of clips; yields the function that is told how many are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("encoding {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)
