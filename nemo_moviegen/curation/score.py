"""What is measured of one video: facts, candidate clips, scores; each only where it is missing.

unreadable   one row, its reason
header       one row, no candidate: a filter on the header drops the video, or no scene is long enough
candidate    one row a clip, every column filled
"""

import importlib
import json
from functools import cache
from hashlib import blake2b

import numpy as np

from nemo_moviegen.curation import footage, look, scenes
from nemo_moviegen.curation.recipe import HEADER_COLUMNS
from nemo_moviegen.curation.scenes import Span

_STRIP_WIDTH_PX = 144
"""Of each of the frames that the report shows."""


class ScorerError(RuntimeError):
    """A scorer failed: no fault of the video, so nothing is noted about it and the run ends."""


def function_of(name):
    """The function called package.module:function. ValueError where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no function {name}: {error}") from None


@cache
def keys(recipe) -> dict[str, str]:
    """What each part of a row is made with, in short: clips, camera, embedding, and each scorer's column."""

    def function_key(name):
        version = getattr(function_of(name), "version", "")
        return _short(name, version, look.VERSION, vars(recipe.looking))

    return {
        "clips": _short(scenes.VERSION, vars(recipe.scenes), vars(recipe.sampling), recipe.seed),
        "camera": function_key("nemo_moviegen.curation.motion:camera_motion"),
        "embedding": function_key(recipe.embedding),
    } | {scorer.column: function_key(scorer.function) for scorer in recipe.scorers}


def file_key(video) -> str:
    """What a file was when it was read: its size, its time and how facts were taken from it."""
    return _short(footage.VERSION, video.num_bytes, video.mtime_ns)


def is_complete(video, rows, recipe) -> bool:
    """Whether nothing of the video has to be measured: its rows hold all that selection reads."""
    if not rows or rows[0]["file_key"] != file_key(video):
        return False
    if rows[0]["reason"] or not passes_header(rows[0], recipe):
        return True
    wanted = keys(recipe)
    return rows[0]["clips_key"] == wanted["clips"] and not any(_stale(row, wanted) for row in rows)


def passes_header(row, recipe) -> bool:
    """Whether no filter on a header's column drops the row."""
    return all(
        passes(entry, row[entry.column], row["kind"])
        for entry in recipe.filters
        if entry.column in HEADER_COLUMNS
    )


def passes(entry, values, kind):
    """Whether a `Filter` lets values pass: numbers or arrays, NaN never; `kind` image or video for each."""
    if entry.is_strict:
        inside = (values > entry.low) & (values < entry.high)
    else:
        inside = (values >= entry.low) & (values <= entry.high)
    return inside | ((kind == "image") & entry.videos_only)


def score_video(folder, video, rows, recipe) -> list[dict]:
    """Rows of the video with all that was missing measured; `rows` are those it had, possibly none.

    What is wrong with the file becomes the reason of its one row.
    """
    path = folder / video.name
    try:
        if not rows or rows[0]["file_key"] != file_key(video):
            rows = [_header_row(path, video)]
        if rows[0]["reason"] or not passes_header(rows[0], recipe):
            return rows
        if rows[0]["clips_key"] != keys(recipe)["clips"]:
            rows = _candidates(path, rows[0], recipe)
        return [_scored(path, row, recipe) for row in rows]
    except ScorerError:
        raise
    except Exception as error:  # whatever a file makes a library do, the next file is not to blame
        is_ours = isinstance(error, ValueError | OSError)
        reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        return [{"video": video.name, "file_key": file_key(video), "reason": reason}]


def _header_row(path, video):
    facts, frame_HWC = footage.read_facts(path)
    columns = facts.columns
    row = {"video": video.name, "file_key": file_key(video), "reason": "", "clips_key": ""}
    row |= {name: columns[name] for name in ("codec", "kind")}
    return row | {name: float(columns[name]) for name in HEADER_COLUMNS} | {"strip": _strip([frame_HWC])}


def _candidates(path, row, recipe):
    """A row for each clip that may be cut; one without a clip where none may."""
    base = {
        name: row[name] for name in (*HEADER_COLUMNS, "video", "file_key", "reason", "codec", "kind", "strip")
    }
    base |= {"clips_key": keys(recipe)["clips"]}
    if row["kind"] == "image":
        span = {"start_seconds": 0.0, "end_seconds": 0.0, "clip_seconds": 0.0}
        return [base | span | {"num_scenes": 1.0, "shots_per_second": np.nan}]
    found, fingerprint = scenes.find_scenes(path, row["fps"], recipe.scenes)
    base |= {"num_scenes": float(len(found)), "shots_per_second": len(found) / row["duration_seconds"]}
    spans = scenes.draw_spans(
        found, recipe.sampling, lambda scene: scenes.generator_of(recipe.seed, fingerprint, scene)
    )
    return [
        base | {"start_seconds": s.start, "end_seconds": s.end, "clip_seconds": s.seconds} for s in spans
    ] or [base | {"clip_seconds": np.nan}]


def _stale(row, wanted):
    """Columns of a candidate that are missing or made by someone else; a row without a clip has none."""
    if row.get("start_seconds") is None:
        return []
    return [name for name in wanted if name != "clips" and row.get(f"{name}_key") != wanted[name]]


def _scored(path, row, recipe):
    stale = _stale(row, keys(recipe))
    if not stale:
        return row
    frame_seconds = 1 / row["fps"]
    span = Span(row["start_seconds"], row["end_seconds"] or frame_seconds)
    seen = look.look_at(path, span, row["fps"], recipe.looking)
    functions = {scorer.column: scorer.function for scorer in recipe.scorers}
    row = row | {f"{name}_key": keys(recipe)[name] for name in stale}
    for name in stale:
        if name == "camera":
            row["camera"], row["camera_confidence"] = _call(
                "nemo_moviegen.curation.motion:camera_motion", seen
            )
        elif name == "embedding":
            row["embedding"] = np.asarray(_call(recipe.embedding, seen), np.float32).tolist()
        else:
            row[name] = float(_call(functions[name], seen))
    ends = (0, len(seen.frames_THWC) // 2, -1) if row["kind"] == "video" else (0,)
    return row | {"strip": _strip([seen.frames_THWC[n] for n in ends])}


def _call(name, seen):
    try:
        return function_of(name)(seen)
    except Exception as error:
        raise ScorerError(f"the scorer {name} failed: {type(error).__name__}: {error}") from error


def _strip(frames):
    """JPEG of frames side by side, for the report."""
    import cv2

    small = []
    for frame_HWC in frames:
        height, width = frame_HWC.shape[:2]
        size = (_STRIP_WIDTH_PX, max(1, round(_STRIP_WIDTH_PX * height / width)))
        small.append(cv2.resize(frame_HWC, size, interpolation=cv2.INTER_AREA))
    _, data = cv2.imencode(".jpg", np.hstack(small)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])
    return data.tobytes()


def _short(*parts):
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=9).hexdigest()
