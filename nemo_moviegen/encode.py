"""Clips and captions to latent shards, once before training: `moviegen encode` (s3.1.1, s3.1.4).

    manifests -> frames in [-1, 1] -> TAE in tiles of time, mean of the posterior -.
              -> captions, FPS first -> text encoders -------------------------------+-> shards -> index

The plan of shards is a function of manifests and buckets alone (`data/shard_plan.py`). Each task of a job
array takes every N-th shard; one that is there, made from the same clips with the same weights, is left as it
is. So a job that is killed anywhere goes on where it was, with any number of tasks, and loses at most the
shards under way. Who finds all shards there writes the index over them, last of all.

The autoencoder sees two frames at a time, so only the frames themselves grow with a clip: one batch under
way and those the loader has ready. Of 256 frames at 768 px, 1.8 GB, a task was measured to hold 7.4 GB at
most, with a stand-in for the autoencoder.

Clips of the train split go to the output folder, held-out ones to a second folder beside it, so no training
run can read them by mistake.
"""

import contextlib
import json
import time

import torch

import nemo_moviegen
from nemo_moviegen.data.encoded import Encoded
from nemo_moviegen.data.latent_writer import ShardWriter, write_empty_prompt
from nemo_moviegen.data.latents import LatentSample
from nemo_moviegen.data.provenance import folder_fingerprint, weights_fingerprint
from nemo_moviegen.data.shard_plan import plan_shards
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.tae.tiling import Tiling, encode_tiled

_FORMAT = 1  # of a shard's bytes: another one makes all shards anew
_FRAME_BYTES = 2 << 30  # of decoded clips that are encoded at once: one of 256 frames at 768 px has 1.8e9


def encode(
    manifests,
    autoencoder_folder,
    encoders_folder,
    output,
    *,
    context_sizes,
    bucket=None,
    bucket_set=None,
    task=(0, 1),
    batch_size=8,
    num_threads=1,
    samples_per_shard=None,
    tiling=None,
) -> dict:
    """Write the latents of every clip and image of the manifests; returns what was done.

    A clip goes to `bucket`, whatever its length, or to its own of `bucket_set` (`buckets.BucketSet`), or is
    refused with a reason. Its frame rate there leads its caption; features are those of `context_sizes`.
    Held-out clips go to `heldout_folder(output)`, normalised like the training set; the folder gets no index
    where the manifests have none. `task` (I, N) is one of N that run anywhere, in any order: it takes every
    N-th shard, I first. Clips go through the autoencoder in tiles (`tae.tiling.Tiling`), the paper's by
    default. Runs on a GPU if there is one.

    Returned keys, of all shards that are there: train, heldout (samples), shapes (samples of each), refused
    (clips for each sort of reason), quarantined (ids of the clips left out for their file's fault), nbytes,
    missing (shards of other tasks; the folders are finished where it is 0); and of this run: encoded
    (samples), num_cut (prompts cut, by encoder), seconds.

    ValueError, with the latents that were there left alone, where a manifest, a folder of weights or a bucket
    does not serve; also where no training clip is readable, or the disk is full.
    """
    from nemo_moviegen.text_encoders import TextEncoders, encoder_device
    from nemo_moviegen.training.autoencoder_weights import load_autoencoder

    started, tiling = time.perf_counter(), tiling or Tiling()
    _check_task(task, batch_size, samples_per_shard)
    plan = plan_shards(manifests, bucket=bucket, bucket_set=bucket_set, samples_per_shard=samples_per_shard)
    _check_plan(manifests, plan)
    device, dtype = encoder_device()
    encoders = TextEncoders.load(encoders_folder, context_sizes, device=device, dtype=dtype)
    autoencoder = load_autoencoder(autoencoder_folder).to(device)
    made_with = {
        "format": _FORMAT,
        "autoencoder": weights_fingerprint(autoencoder),
        "text_encoders": folder_fingerprint(encoders_folder),
        "contexts": [(size.name, size.max_tokens) for size in context_sizes],
        "tiling": dict(vars(tiling)),
    }
    encoded = Encoded(plan, output, made_with)
    number = encode_shards(
        encoded,
        autoencoder,
        encoders,
        task,
        provenance=made_with | {"package": nemo_moviegen.__version__},
        batch_size=batch_size,
        num_threads=num_threads,
        tiling=tiling,
    )
    told = {"encoded": number, "num_cut": dict(encoders.num_cut), "seconds": time.perf_counter() - started}
    return encoded.finish() | told


def encode_shards(
    encoded, autoencoder, encoders, task=(0, 1), *, provenance, batch_size=8, num_threads=1, tiling=None
) -> int:
    """Write those of a task's shards that are not there yet; returns how many samples that were.

    `encoded` is a `data.encoded.Encoded`. An index over other shards is gone before the first of them.
    """
    index, num_tasks = task
    own = [shard for number, shard in enumerate(encoded.plan.shards) if number % num_tasks == index]
    waiting = [shard for shard in own if not encoded.table(shard)]
    if waiting:
        encoded.unfinish()
    empty_prompt = encoders.encode([""])[0]
    for folder in sorted({encoded.folder(shard) for shard in own}):
        write_empty_prompt(folder, empty_prompt)
    num_written, total = 0, sum(len(shard.rows) for shard in waiting)
    with _progress(encoded.folders["train"].name, total) as advance:
        for shard in waiting:
            num_written += encode_shard(
                *encoded.plan.clips_of(shard),
                shard,
                encoded.folder(shard),
                autoencoder,
                encoders,
                wanted=encoded.wanted[shard],
                provenance=provenance,
                batch_size=batch_size,
                num_threads=num_threads,
                tiling=tiling or Tiling(),
                advance=advance,
            )
    return num_written


@torch.no_grad()
def encode_shard(
    clips,
    fps,
    shard,
    folder,
    autoencoder,
    encoders,
    *,
    wanted,
    provenance,
    batch_size,
    num_threads,
    tiling,
    advance=lambda count: None,
) -> int:
    """One shard and its table in `folder`; returns how many samples it has.

    Latents are the mean of the autoencoder's posterior: sampling noise belongs to its training. A clip whose
    file cannot be used, or whose latents are no numbers, is left out and named in the table.
    """
    from nemo_moviegen.data.clips import record_unusable, sample_id
    from nemo_moviegen.data.dali import ClipLoader

    bucket, device = shard.bucket, next(autoencoder.parameters()).device
    with ShardWriter(folder, shard.name) as writer:
        quarantine = writer.part.with_suffix(".quarantine")
        quarantine.unlink(missing_ok=True)
        loader = ClipLoader(
            clips,
            bucket,
            batch_size=_clips_at_once(batch_size, bucket),
            order=range(len(clips)),
            device_id=device.index if device.type == "cuda" else None,
            num_threads=num_threads,
            quarantine=quarantine,
            fps=fps,
        )
        num_done = 0
        for video_BTCHW, rows in loader:
            latent_BTCHW = encode_tiled(autoencoder, video_BTCHW, tiling).float().cpu().numpy()
            contexts = encoders.encode([with_fps(clips[row].caption, fps[row]) for row in rows])
            for row, latent_TCHW, context in zip(rows, latent_BTCHW, contexts, strict=True):
                sample = LatentSample(
                    sample_id=sample_id(clips[row].clip_id),
                    clip_id=clips[row].clip_id,
                    caption=clips[row].caption,
                    fps=fps[row],
                    latent_TCHW=latent_TCHW,
                    contexts=context,
                )
                if problem := writer.problem(sample):
                    record_unusable(quarantine, sample.clip_id, clips[row].path, problem)
                else:
                    writer.add(sample, clips[row].source)
            num_done += len(rows)
            advance(len(rows))
        left_out = _take_lines(quarantine, {clip.clip_id: place for place, clip in enumerate(clips)})
        writer.finish(wanted, provenance | {"bucket": vars(bucket)}, left_out)
        advance(len(clips) - num_done)
        return len(writer)


def _clips_at_once(batch_size, bucket):
    frame_bytes = 4 * 3 * bucket.height_px * bucket.width_px
    return min(batch_size, max(1, _FRAME_BYTES // (frame_bytes * bucket.num_frames)))


def _take_lines(quarantine, places):
    """[clip_id, path, reason] out of a loader's quarantine file, in the order of the clips; the file goes."""
    if not quarantine.exists():
        return []
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    quarantine.unlink()
    entries.sort(key=lambda entry: places[entry["clip_id"]])
    return [[entry["clip_id"], entry["path"], entry["reason"]] for entry in entries]


def _check_task(task, batch_size, samples_per_shard):
    index, num_tasks = task
    if not 0 <= index < num_tasks:
        raise ValueError(f"task {index} of {num_tasks}: tasks count from 0 to {max(num_tasks - 1, 0)}")
    for name, number in (("batch_size", batch_size), ("samples_per_shard", samples_per_shard)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; use 1 or more")


def _check_plan(manifests, plan):
    from nemo_moviegen.tae.checks import COMPRESSION

    if not any(shard.split == "train" for shard in plan.shards):
        why = "".join(f"; {count} refused: {reason}" for reason, count in plan.refusals.items())
        raise ValueError(
            f"{', '.join(map(str, manifests))}: no clip of the split train to encode: mark some, or add some "
            f"(`moviegen cut`){why}"
        )
    for bucket in {shard.bucket for shard in plan.shards}:
        for name in ("height_px", "width_px"):
            if getattr(bucket, name) % COMPRESSION:
                raise ValueError(f"bucket.{name} is {getattr(bucket, name)}; use a multiple of {COMPRESSION}")


@contextlib.contextmanager
def _progress(name, total):
    """A bar of clips; yields the function that is told how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("encoding {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
