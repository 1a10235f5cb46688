"""Which seconds of which clips an evaluation looks at (Movie Gen s3.6.1: 200 held-out clips a duration).

Every run sees the same spans, and so does every number of ranks: they are a function of clips and seed.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nemo_moviegen.data.clips import Clip, Clips, read_manifest
from nemo_moviegen.data.cutting import probe_video

IMAGES = "images"
WHOLE = "whole clips"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The clips an evaluation may draw from, and which they are, in words."""

    clips: Clips
    told: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of the result: spans of one kind and duration."""

    name: str
    """2 s, whole clips, images."""
    spans: list[Clip] = field(default_factory=list)
    """Rows whose start and end are those of the frames to read."""
    num_frames: list[int] = field(default_factory=list)
    """Of each span."""
    note: str = ""
    """Why there are no spans, or why they are not those asked for."""


def read_source(path, output) -> Source:
    """Clips of a manifest (held-out ones where it has any), of a video, or of the videos of a folder.

    A file counts as one clip. `output` is left out of a folder. ValueError where there is nothing to read.
    """
    path = Path(path)
    if path.is_dir():
        from nemo_moviegen.curation.videos import list_videos

        names = [video.name for video in list_videos(path, output).videos]
        clips = Clips.of(whole_file(path / name, name) for name in names)
        return Source(clips=clips, told=f"all {len(names)} videos of the folder")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file or folder; give a Parquet manifest, a video or a folder of videos"
        )
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            return Source(clips=Clips.of([whole_file(path, path.name)]), told="one video")
    clips = read_manifest(path)
    is_heldout = clips.column("split") == "heldout"
    if is_heldout.any():
        return Source(
            clips=clips.select(is_heldout), told=f"the {is_heldout.sum()} held-out of {len(clips)} rows"
        )
    return Source(clips=clips, told=f"all {len(clips)} rows, seen in training perhaps: none is held out")


def choose_spans(clips, seconds, fps, limit, seed) -> list[Group]:
    """A group for each duration of `seconds`, and one of images, with at most `limit` spans each.

    Clips are cut into spans that do not overlap; each clip gives one before any gives a second, both drawn by
    `seed`. A duration that no clip has leaves a group without spans that says so. Where that is every
    duration, the clips are taken whole instead, each as long as it is. ValueError where nothing is left.
    """
    seconds = sorted(set(seconds))
    if not seconds or not seconds[0] > 0 or limit < 1:
        raise ValueError(
            f"durations {seconds}, {limit} clips of each: give seconds above 0 and 1 clip or more"
        )
    is_video = clips.column("kind") == "video"
    videos, images = clips.select(is_video), clips.select(~is_video)
    lengths_N = videos.column("end_seconds") - videos.column("start_seconds")
    longest = lengths_N.max(initial=0.0)
    groups = [_of_duration(videos, lengths_N, length, fps, limit, seed) for length in seconds]
    if len(videos) and not any(group.spans for group in groups):
        groups.append(_whole(videos, lengths_N, fps, limit, seed, f"none reaches {seconds[0]:g} s"))
    absent = f"no clip that long; the longest has {longest:.2f} s" if len(videos) else "no clip, only images"
    groups = [group if group.spans else replace(group, note=absent) for group in groups]
    chosen = _permutation(len(images), seed)[:limit]
    groups.append(
        Group(name=IMAGES, spans=[images[row] for row in chosen], num_frames=[1] * len(chosen))
        if len(images)
        else Group(name=IMAGES, note="none among the clips")
    )
    if not any(group.spans for group in groups):
        raise ValueError("there is no clip and no image to evaluate: the manifest is empty")
    return groups


def _of_duration(videos, lengths_N, seconds, fps, limit, seed):
    # a microsecond more or less is rounding: containers store times to a millisecond
    counts_N = np.floor(lengths_N / seconds + 1e-6).astype(np.int64)
    spans, turn = [], 0
    while len(spans) < limit and (counts_N > turn).any():
        rows = np.flatnonzero(counts_N > turn)
        for row in rows[_permutation(len(rows), seed, turn)][: limit - len(spans)]:
            clip = videos[row]
            index = _permutation(counts_N[row], seed, int(row), 1)[turn]
            start = clip.start_seconds + float(index) * seconds
            spans.append(replace(clip, start_seconds=start, end_seconds=start + seconds))
        turn += 1
    num_frames = max(1, math.floor(seconds * fps + 0.5))
    return Group(name=f"{seconds:g} s", spans=spans, num_frames=[num_frames] * len(spans))


def _whole(videos, lengths_N, fps, limit, seed, why):
    rows = _permutation(len(videos), seed)[:limit]
    frames = [max(1, math.floor(lengths_N[row] * fps + 1e-6)) for row in rows]
    shortest, most = min(frames), max(frames)
    each = f"{shortest}" if shortest == most else f"{shortest} to {most}"
    note = f"whole clips of {each} frames: {why}"
    return Group(name=WHOLE, spans=[videos[row] for row in rows], num_frames=frames, note=note)


def _permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count)


def whole_file(path, clip_id):
    info = probe_video(path)
    if not info.duration_seconds > 0 or not info.fps > 0:
        raise ValueError(f"{path}: its header tells no duration or frame rate; write it to another container")
    return Clip(
        clip_id=clip_id,
        path=str(path),
        kind="video",
        start_seconds=0.0,
        end_seconds=info.duration_seconds,
        source_fps=info.fps,
        width_px=info.width_px,
        height_px=info.height_px,
        codec=info.codec,
        caption="",
        split="heldout",
    )
