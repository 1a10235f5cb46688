"""Scores on disk: a Parquet file a chunk, each replaced as a whole, a row a candidate clip.

A row knows what it was made from: the file's size and time, how its candidates were found, and who filled
each column. So a task sees what is missing by comparing, and a score that holds is never made again.
"""

import contextlib
import os
import secrets
import time
from pathlib import Path

from nemo_moviegen.curation.recipe import HEADER_COLUMNS

FOLDER = "scores"
_OLD_SECONDS = 24 * 3600

TEXTS = ("video", "file_key", "reason", "codec", "kind", "clips_key", "camera", "camera_key", "embedding_key")
"""video: name below the folder; reason: why it cannot be used; *_key: what the values were made with."""
NUMBERS = (
    *HEADER_COLUMNS,
    "start_seconds",
    "end_seconds",
    "clip_seconds",
    "num_scenes",
    "shots_per_second",
    "camera_confidence",
)


def chunk_path(output, chunk, num_chunks) -> Path:
    """File of a chunk's scores."""
    return Path(output, FOLDER, f"chunk-{chunk:06d}-of-{num_chunks:06d}.parquet")


def schema(recipe):
    """pyarrow schema of a chunk: what is known of every row, then a column and its key for each scorer."""
    import pyarrow as pa

    columns = [(name, pa.string()) for name in TEXTS]
    columns += [(name, pa.float64()) for name in NUMBERS]
    for scorer in recipe.scorers:
        columns += [(scorer.column, pa.float64()), (f"{scorer.column}_key", pa.string())]
    columns += [("embedding", pa.list_(pa.float32())), ("strip", pa.binary())]
    return pa.schema(columns)


def read_chunk(path, recipe, without=()):
    """The chunk's rows as a pyarrow table of `schema`, columns it lacks or `without` null; None for no file.

    A file that cannot be read is as good as none: it is scored again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = schema(recipe)
    try:
        present = set(pq.read_schema(path).names)
        names = [n for n in wanted.names if n in present and n not in without]
        table = pq.read_table(path, columns=names)
        for name in wanted.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), wanted.field(name).type))
        return table.select(wanted.names).cast(wanted)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException):
        return None


def write_chunk(path, rows, recipe):
    """Write rows (dicts) as the chunk's file. ValueError where the disk is full: the old file stays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=schema(recipe))
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd")


@contextlib.contextmanager
def replacing(path):
    """A name beside `path` to write to, which takes its place at the end; whoever else does so does no harm.

    ValueError where writing fails, as on a full disk: nothing half written stays.
    """
    path = Path(path)
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({os.strerror(error.errno) if error.errno else error}): make room and "
            "start again; what is scored stays"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sweep(folder):
    """Remove what killed writers left in a folder a day ago or earlier."""
    for part in Path(folder).glob(".part-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _OLD_SECONDS:
                part.unlink()
