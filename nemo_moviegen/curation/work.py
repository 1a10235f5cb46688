"""The scoring stage: chunks of videos shared out over tasks, each scoring exactly what is missing.

A chunk is the videos whose names hash to its number, so neither the number of tasks nor other files move a
video to another. Killed at any time, a task loses at most a minute: its chunk is written anew by then.
"""

import time
from collections import defaultdict
from pathlib import Path

from nemo_moviegen.curation.score import is_complete, score_video
from nemo_moviegen.curation.store import chunk_path, read_chunk, write_chunk
from nemo_moviegen.curation.videos import chunk_of

_FLUSH_SECONDS = 60
_LARGE = ("embedding", "strip")


def chunks_of(listing, recipe, task=(0, 1)) -> dict[int, list]:
    """Videos of each chunk that task `I` of `N` works on: those with a number of remainder I."""
    index, count = task
    found = defaultdict(list)
    for video in listing.videos:
        chunk = chunk_of(video.name, recipe.num_chunks)
        if chunk % count == index:
            found[chunk].append(video)
    return dict(sorted(found.items()))


def score_missing(listing, output, recipe, task=(0, 1), advance=lambda video: None) -> int:
    """Score what the task's chunks lack; returns the number of videos that something was measured of.

    `advance` is called with each video that is done. ValueError where the disk is full.
    """
    num_scored = 0
    for chunk, videos in chunks_of(listing, recipe, task).items():
        path = chunk_path(output, chunk, recipe.num_chunks)
        rows = rows_by_video(read_chunk(path, recipe, without=_LARGE))
        todo = [video for video in videos if not is_complete(video, rows.get(video.name), recipe)]
        for video in set(videos) - set(todo):
            advance(video)
        if not todo:
            continue
        rows = rows_by_video(read_chunk(path, recipe))
        due = time.monotonic() + _FLUSH_SECONDS
        for video in todo:
            rows[video.name] = score_video(listing.folder, video, rows.get(video.name), recipe)
            num_scored += 1
            advance(video)
            started = time.monotonic()
            if video is todo[-1] or started > due:
                _write(path, videos, rows, recipe)
                # a large chunk takes long to write: no more than a twentieth of the time goes there
                due = time.monotonic() + max(_FLUSH_SECONDS, 20 * (time.monotonic() - started))
    return num_scored


def scored_table(listing, output, recipe):
    """Rows of all videos as one pyarrow table, in order of video and time, and the videos that lack some.

    Without the frames for the report. The table is None where nothing is scored.
    """
    import pyarrow as pa

    tables, missing = [], []
    for chunk, videos in chunks_of(listing, recipe).items():
        table = read_chunk(chunk_path(output, chunk, recipe.num_chunks), recipe, without=("strip",))
        rows = rows_by_video(table.drop_columns(list(_LARGE)) if table else None)
        missing += [video for video in videos if not is_complete(video, rows.get(video.name), recipe)]
        if table:
            listed = pa.array([video.name for video in videos])
            tables.append(table.filter(pa.compute.is_in(table["video"], value_set=listed)))
    if not tables:
        return None, missing
    whole = pa.concat_tables(tables)
    return whole.sort_by([("video", "ascending"), ("start_seconds", "ascending")]), missing


def read_strips(output, names, recipe) -> dict[tuple, bytes]:
    """JPEGs of the frames kept of these videos, by video and start of the clip (None where none was cut)."""
    found = {}
    for chunk in sorted({chunk_of(name, recipe.num_chunks) for name in names}):
        table = read_chunk(chunk_path(Path(output), chunk, recipe.num_chunks), recipe)
        for row in table.select(["video", "start_seconds", "strip"]).to_pylist() if table else ():
            found[row["video"], row["start_seconds"]] = row["strip"]
    return found


def rows_by_video(table) -> dict[str, list[dict]]:
    """Rows of a table of scores, as dicts, by video."""
    found = defaultdict(list)
    for row in table.to_pylist() if table is not None else ():
        found[row["video"]].append(row)
    return dict(found)


def _write(path, videos, rows, recipe):
    listed = [row for video in videos for row in rows.get(video.name, ())]
    write_chunk(path, listed, recipe)
