"""Reconstructions of held-out clips, in numbers and pictures, of one run or several (Movie Gen s3.6.1).

    clips -> spans of 2, 4, 6, 8 s, and images -> each run: encode, decode, compare
          -> metrics.json, side_by_side.mp4, latent_dots.png, report.html

A clip is read, measured by every run and let go while the next one is read: memory does not grow with their
number. Ranks that torchrun started share the clips, rank r takes r::n; where there are fewer clips than
ranks, all work on each and share its tiles. Rank 0 gathers and writes.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nemo_moviegen.data.ahead import ahead
from nemo_moviegen.data.fit import WHITE
from nemo_moviegen.data.frames import read_clip
from nemo_moviegen.evaluation.features import RANDOM, find_features
from nemo_moviegen.evaluation.measuring import PIXELS_PER_LATENT, Found, load_runs, measure, together
from nemo_moviegen.evaluation.parts import all_parts, read_part, write_part
from nemo_moviegen.evaluation.pictures import latent_dots, side_by_side
from nemo_moviegen.evaluation.report import write_report
from nemo_moviegen.evaluation.rows import result_rows
from nemo_moviegen.evaluation.spans import choose_spans, read_source
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.recipe import RECIPE_FILE, read_recipe
from nemo_moviegen.tae.tiling import Tiling
from nemo_moviegen.training.place import joined_world

METRICS, VIDEO, DOTS, REPORT = "metrics.json", "side_by_side.mp4", "latent_dots.png", "report.html"


def evaluate_autoencoder(
    run_folder,
    clips,
    output,
    *,
    against=(),
    seconds=(2, 4, 6, 8),
    size=None,
    fps=None,
    limit=200,
    features=RANDOM,
    tiling=None,
    fit=False,
    seed=0,
    task=(0, 1),
) -> dict | None:
    """Measure a run, and those it is compared with, on the same frames; returns what metrics.json holds.

    `clips` is a manifest, a video or a folder of videos (see `read_source`); `size` (height, width) in pixels
    and `fps` are those of the run's bucket unless given. A size that is no multiple of 8 is refused, or, with
    `fit`, read as asked and cropped in the middle to the next smaller one.

    PSNR and SSIM: mean over frames, then over clips, of reconstructions that are clamped but not rounded.
    FID: over all frames of a row, as bytes. Outliers: of the posterior's mean. Ranks but 0 return None.
    `task` (I, N) measures every Nth clip from the Ith (parts.py); all but the last to end return None.
    ValueError for what cannot be measured: a folder without an autoencoder, a clip that cannot be read, a run
    that decodes to NaN.
    """
    with _ranks() as (rank, num_ranks):
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        bucket, crop = _frames_wanted(run_folder, size, fps, fit)
        network = find_features(features, device)
        source = read_source(clips, output)
        groups = choose_spans(source.clips, seconds, bucket.fps, limit, seed)
        runs = load_runs([run_folder, *against], device)
        tiling = tiling or Tiling()
        jobs = [
            (group.name, clip, num_frames)
            for group in groups
            for clip, num_frames in zip(group.spans, group.num_frames, strict=True)
        ]
        settings = {
            "runs": {run.label: run.folder for run in runs},
            "clips": str(clips),
            "drawn_from": source.told,
            "seconds": sorted(set(seconds)),
            "height_px": crop[0],
            "width_px": crop[1],
            "read_height_px": bucket.height_px,
            "read_width_px": bucket.width_px,
            "fps": bucket.fps,
            "limit": limit,
            "features": network.name,
            "features_comparable": network.is_comparable,
            "tiling": dict(vars(tiling)),
            "seed": seed,
            "device": device.type,
            "ranks": num_ranks,
        }
        found = read_part(output, task, settings) if task[1] > 1 else None
        if found is None:
            mine = range(task[0], len(jobs), task[1])
            shares = dist.group.WORLD if len(mine) < num_ranks else None  # of the tiles of each clip
            found, mine = Found(), mine if shares else mine[rank::num_ranks]
            videos = ahead((_read(*jobs[job][1:], bucket, crop) for job in mine), 1)
            for job, video_TCHW in zip(_tracked(mine, rank), videos, strict=True):
                name, clip, _ = jobs[job]
                measure(found, job, name, clip, video_TCHW.to(device), runs, network, tiling, shares)
            if shares is None:
                found = _gathered(found, rank, num_ranks)
        if rank:
            return None
        if task[1] > 1:
            write_part(output, task, settings, found)
            found, missing = all_parts(output, task[1], settings)
            if missing:
                print(f"task {task[0]}/{task[1]} is done; other tasks owe {missing}, the last of them writes")
                return None
        compressions = {run.label: run.compression for run in runs}
        rows = result_rows(groups, compressions, found.clips, found.moments, network.name)
        metrics = {"settings": settings, "rows": rows, "clips": found.clips}
        _write(Path(output), metrics, found)
    return metrics


def _frames_wanted(run_folder, size, fps, fit):
    """The bucket to read, of one frame, and (height, width) to crop it to."""
    file = Path(run_folder, RECIPE_FILE)
    data = read_recipe(file).data if file.is_file() else None
    if not hasattr(data, "bucket"):
        raise ValueError(
            f"{run_folder} is no run folder of an autoencoder: name one that `moviegen train` wrote"
        )
    sides = size or (data.bucket.height_px, data.bucket.width_px)
    crop = tuple(side // PIXELS_PER_LATENT * PIXELS_PER_LATENT for side in sides)
    if crop != tuple(sides) and not fit:
        asked, smaller = "x".join(map(str, sides)), "x".join(map(str, crop))
        larger = "x".join(str(-(-side // PIXELS_PER_LATENT) * PIXELS_PER_LATENT) for side in sides)
        raise ValueError(
            f"frames of {asked} px (height x width) hold no whole latents of 8x8 px: use --size {smaller} or "
            f"{larger}, or --fit to crop them to {smaller}"
        )
    return Bucket(num_frames=1, height_px=sides[0], width_px=sides[1], fps=fps or data.bucket.fps), crop


def _read(clip, num_frames, bucket, crop):
    """Frames [T, C, H, W] of a span, float32 in [-1, 1]."""
    wanted = Bucket(**vars(bucket) | {"num_frames": num_frames})
    pictures_TCHW = read_clip(clip, 0, wanted, bucket.fps).pictures_TCHW
    top, left = (bucket.height_px - crop[0]) // 2, (bucket.width_px - crop[1]) // 2
    pictures_TCHW = pictures_TCHW[..., top : top + crop[0], left : left + crop[1]]
    return torch.from_numpy(pictures_TCHW.astype(np.float32) / np.float32(WHITE / 2) - 1)


def _write(output, metrics, found):
    output.mkdir(parents=True, exist_ok=True)
    labels = list(metrics["settings"]["runs"])
    side_by_side(found.shown, ["original", *labels], output / VIDEO, metrics["settings"]["fps"])
    latent_dots(found.dots, labels, output / DOTS)
    (output / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    write_report(metrics, output / REPORT, video=output / VIDEO, dots=output / DOTS)


@contextlib.contextmanager
def _ranks():
    """(rank, number of ranks), of those torchrun started."""
    with joined_world():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gathered(found, rank, num_ranks):
    """On rank 0 what all ranks found."""
    if num_ranks == 1:
        return found
    parts = [None] * num_ranks if rank == 0 else None
    dist.gather_object(found, parts)
    return together(parts) if rank == 0 else found


def _tracked(jobs, rank):
    from rich.console import Console
    from rich.progress import track

    shows = rank == 0 and sys.stderr.isatty()
    return track(jobs, "measuring", disable=not shows, console=Console(stderr=True), transient=True)
