"""Curation from end to end: `moviegen curate` (s3.2.1, App. B).

OUT/scores/chunk-*.parquet   what was measured, a row a candidate clip
OUT/manifest.parquet         the clips that stay
OUT/report.html, funnel.json what each step left
OUT/quarantine.jsonl         files that could not be used, each with its reason
"""

import contextlib
import json
import logging
import os
import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_moviegen.curation.captions import Caption, caption_reader
from nemo_moviegen.curation.funnel import funnel_of
from nemo_moviegen.curation.score import function_of, keys
from nemo_moviegen.curation.select import chance, select
from nemo_moviegen.curation.store import FOLDER, replacing, sweep
from nemo_moviegen.curation.videos import list_videos
from nemo_moviegen.curation.work import chunks_of, score_missing, scored_table
from nemo_moviegen.curation.workers import score_in_workers
from nemo_moviegen.data.clips import Clip, write_manifest
from nemo_moviegen.data.cutting import image_of

logger = logging.getLogger(__name__)

MANIFEST, REPORT, FUNNEL, QUARANTINE = "manifest.parquet", "report.html", "funnel.json", "quarantine.jsonl"


def curate(folder, output, recipe, task=None, workers=1) -> dict:
    """Score what is missing of the videos below `folder`, then select; returns what was done.

    With `task` (I, N), only the I-th of N parts is scored, and the selection is made by whoever finds that
    nothing is missing any more. `workers` processes share what is to be scored. Returned keys: num_scored,
    num_missing (videos that other tasks still owe), and, where the selection was made, num_clips and
    num_refused. ValueError says what the user can change.
    """
    index, count = task or (0, 1)
    if not 0 <= index < count:
        raise ValueError(f"task {index}/{count}: tasks count from 0, so use 0/{count} to {count - 1}/{count}")
    if workers < 1:
        raise ValueError(f"{workers} workers: use 1, or as many as this task has cores")
    keys(recipe)  # names every function of the recipe that is not there, before anything is scored
    if recipe.captioner:
        function_of(recipe.captioner)
    import cv2

    cv2.setNumThreads(1)  # tasks share the cores out
    listing, output = list_videos(folder, output), Path(output)
    sweep(output / FOLDER)
    mine = sum(len(videos) for videos in chunks_of(listing, recipe, (index, count)).values())
    with _progress(f"scoring {index}/{count}", mine) as advance:
        score = score_missing if workers == 1 else partial(score_in_workers, workers=workers)
        num_scored = score(listing, output, recipe, (index, count), advance=advance)
    table, missing = scored_table(listing, output, recipe)
    done = {"num_scored": num_scored, "num_missing": len(missing)}
    if missing:
        if task is None:
            raise ValueError(f"{len(missing)} videos changed while they were scored: start again")
        return done
    return done | write_selection(listing, output, recipe, table)


def write_selection(listing, output, recipe, table) -> dict:
    """Select among scored rows and write manifest, report and quarantine; returns num_clips, num_refused.

    Two who do it at once write the same files, each replaced as a whole.
    """
    import pyarrow.compute as pc

    from nemo_moviegen.curation.report import write_report

    is_bad = pc.not_equal(table["reason"], "")
    refused = dict(listing.refused)
    bad = table.filter(is_bad)
    refused |= dict(zip(bad["video"].to_pylist(), bad["reason"].to_pylist(), strict=True))
    table = table.filter(pc.invert(is_bad))
    selection = select(table, recipe, caption_reader(listing.folder))
    clips = make_clips(listing.folder, table, selection, recipe, output)
    refused |= selection.refused
    lines = [
        json.dumps({"clip_id": name, "path": str(listing.folder / name), "reason": reason})
        for name, reason in sorted(refused.items())
    ]
    _write_text(output / QUARANTINE, "".join(f"{line}\n" for line in lines))
    funnel = funnel_of(listing, table, selection, refused, recipe, num_bad=len(set(bad["video"].to_pylist())))
    _write_text(output / FUNNEL, json.dumps(funnel, indent=1) + "\n")
    write_report(output / REPORT, funnel, table, selection, output, recipe)
    # last, since it is what others wait for; under a name of its own first, for its writer has one for all
    own = write_manifest(output / f".manifest-{secrets.token_hex(4)}.parquet", clips)
    os.replace(own, output / MANIFEST)
    return {"num_clips": sum(clip.kind == "video" for clip in clips), "num_refused": len(refused)} | {
        "num_images": sum(clip.kind == "image" for clip in clips)
    }


def make_clips(folder, table, selection, recipe, output) -> list[Clip]:
    """The rows kept as clips, in order of name and time, with captions; the recipe may add middle frames."""
    names = (
        "video",
        "kind",
        "start_seconds",
        "end_seconds",
        "fps",
        "width_px",
        "height_px",
        "codec",
        "camera",
    )
    rows = table.select(names).take(selection.kept).to_pylist()
    captions = [selection.captions[int(row)] for row in selection.kept]
    folder = os.path.abspath(folder)
    clips = [_clip(folder, row, caption, recipe) for row, caption in zip(rows, captions, strict=True)]
    if recipe.captioner:
        clips = _with_captions(clips, recipe, output)
    made = []
    for clip, row, caption in zip(clips, rows, captions, strict=True):
        text = caption.image_caption or caption.caption or clip.caption
        if recipe.camera_prefix and row["camera"] and clip.kind == "video":
            clip = replace(clip, caption=f"{row['camera']}, {clip.caption}")
        made.append(replace(clip, caption=text) if clip.kind == "image" else clip)
        if recipe.images and clip.kind == "video":
            made.append(image_of(clip, (clip.start_seconds + clip.end_seconds) / 2, text))
    return made


def clip_id(video, start_seconds, end_seconds) -> str:
    """`folder/a.mp4@3.500-19.500`: the file's whole name and the span, so no two clips share one."""
    return f"{video}@{start_seconds:.3f}-{end_seconds:.3f}"


def _clip(folder, row, caption: Caption, recipe):
    is_heldout = chance(recipe.seed, "heldout", row["video"]) < recipe.heldout_share
    return Clip(
        clip_id=clip_id(row["video"], row["start_seconds"], row["end_seconds"]),
        path=os.path.join(folder, row["video"]),
        kind=row["kind"],
        start_seconds=row["start_seconds"],
        end_seconds=row["end_seconds"],
        source_fps=row["fps"],
        width_px=int(row["width_px"]),
        height_px=int(row["height_px"]),
        codec=row["codec"],
        caption=caption.caption,
        # clips of one video stay together, or a run would be tested on what it was trained on
        split=caption.split or ("heldout" if is_heldout else "train"),
        attributes=caption.attributes,
        source=caption.source,
    )


def _with_captions(clips, recipe, output):
    """Clips without a caption get the captioner's, kept in captions.jsonl so that none is asked for twice."""
    path = output / f"captions-{recipe.captioner.replace(':', '.')}.jsonl"
    known = {}
    if path.is_file():
        known = dict(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    captioner = function_of(recipe.captioner)
    told = {c.clip_id: known.get(c.clip_id) or captioner(c) for c in clips if not c.caption}
    if told.keys() - known.keys():
        lines = (json.dumps(pair) for pair in sorted((known | told).items()))
        _write_text(path, "".join(f"{line}\n" for line in lines))
    return [replace(clip, caption=clip.caption or told[clip.clip_id]) for clip in clips]


def _write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _progress(name, total):
    """A bar of videos; yields the function that is told of each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total)
        yield lambda video: progress.advance(task)
