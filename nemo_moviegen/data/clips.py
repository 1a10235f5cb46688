"""Clips and their manifest: which seconds of which file are a training sample, and what they show (s3.2.1).

A manifest is a Parquet table, one row a clip. Cutting a video adds rows; it never re-encodes. In memory it
stays a table: a million clips are read, checked and chosen from column by column, and become `Clip` objects
one at a time where one is asked for.
"""

import hashlib
import json
import logging
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

logger = logging.getLogger(__name__)

BIG_BUCK_BUNNY = Path(__file__).parent / "assets" / "bigbuckbunny.mp4"
"""Five seconds of real video (H.264, 1280x720, 25 fps); see ATTRIBUTION beside it."""
BIG_BUCK_BUNNY_CAPTION = "a big gray cartoon rabbit at its burrow on a green meadow"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One training sample before decoding: a span of a video file, or one frame of it."""

    clip_id: str
    """Unique in a data set; `sample_id` of it keys the sample's randomness."""
    path: str
    """Video file; absolute once read from a manifest."""
    kind: str
    """video or image."""
    start_seconds: float
    end_seconds: float
    """Exclusive end of the span; equal to the start for an image."""
    source_fps: float
    width_px: int
    height_px: int
    codec: str
    """FFmpeg's name: vp9, h264, ..."""
    caption: str
    split: str = "train"
    """train or heldout."""
    attributes: str = ""
    """JSON of what is known about the clip, empty where nothing is."""
    source: str = ""
    """Collection the clip came from, empty where there is one only."""

    def __post_init__(self):
        if self.kind not in ("video", "image"):
            raise ValueError(f"clip {self.clip_id}: kind is {self.kind!r}; use video or image")
        if self.split not in ("train", "heldout"):
            raise ValueError(f"clip {self.clip_id}: split is {self.split!r}; use train or heldout")
        start, end = self.start_seconds, self.end_seconds
        if not 0 <= start <= end < math.inf or (self.kind == "image") != (start == end):
            raise ValueError(
                f"clip {self.clip_id}: seconds {start}..{end} are no {self.kind}: "
                "a video ends after it starts, an image ends where it starts"
            )


def sample_id(clip_id) -> int:
    """63-bit hash of the clip's id, the same on every machine and in any row order."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big") >> 1


class Clips(Sequence):
    """Clips of a manifest, in row order, as columns: `clips[row]` is a `Clip`, a slice is again `Clips`.

    Made by `read_manifest` or from any iterable of `Clip` by `Clips.of`; `+` joins two. Equal to a list of
    equal clips.
    """

    def __init__(self, table):
        self.table = table
        """pyarrow.Table with a column for each field of `Clip`, nothing in it missing."""

    @classmethod
    def of(cls, clips) -> "Clips":
        """The same clips as columns; those that are columns already, as they are."""
        import pyarrow as pa

        if isinstance(clips, cls):
            return clips
        rows = [vars(clip) for clip in clips]
        for row in rows:
            _check_text(row)
        return cls(pa.Table.from_pylist(rows, schema=_schema()))

    def column(self, name):
        """Values of one field as numpy array [N]; Python strings (dtype object) where the field is text."""
        return self.table.column(name).to_numpy()

    def select(self, rows) -> "Clips":
        """The clips of these rows, in that order; `rows` are numbers, or a boolean for each clip."""
        import numpy as np

        rows = np.asarray(rows)
        chosen = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return Clips(self.table.take(chosen))

    def __len__(self):
        return self.table.num_rows

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.select(range(*row.indices(len(self))))
        row = operator.index(row)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} clips")
        return Clip(**{name: self.table.column(name)[row].as_py() for name in self.table.column_names})

    def __iter__(self):
        for batch in self.table.to_batches(max_chunksize=4096):
            # twice as fast as pyarrow's to_pylist
            columns = [column.to_numpy(zero_copy_only=False).tolist() for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield Clip(**dict(zip(self.table.column_names, values, strict=True)))

    def __add__(self, clips):
        import pyarrow as pa

        return Clips(pa.concat_tables([self.table, Clips.of(clips).table]))

    def __eq__(self, other):
        if isinstance(other, Clips):
            return self.table.equals(other.table)
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None


def write_manifest(path, clips) -> Path:
    """Manifest at `path` with a row for each clip, in order; files below its folder are named relative to it.

    Written beside and renamed: a killed writer leaves the old manifest. ValueError if two clips share an id.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    table = Clips.of(clips).table
    _check_unique(path, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.path.join(os.path.abspath(path.parent), "")
    part = path.with_name(path.name + ".part")
    pq.write_table(_with_paths(table, lambda file: os.path.abspath(file).removeprefix(folder)), part)
    os.replace(part, path)
    return path


def read_manifest(path, *, with_twins=False) -> Clips:
    """Clips of the manifest in row order, paths absolute. ValueError says what is wrong with the file.

    Two clips of one id are wrong too, unless `with_twins` leaves them to the caller.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no clip manifest at {path}; write one with `moviegen shapes` or `moviegen cut`")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet manifest: {error}") from None
    missing = [name for name in _schema().names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"manifest {path} lacks the columns {', '.join(missing)}; write it again with `write_manifest`"
        )
    table = _checked_columns(path, table.select(_schema().names))
    _check_rows(path, table)
    if not with_twins:
        _check_unique(path, table)
    folder = str(path.parent.resolve())
    return Clips(_with_paths(table, lambda file: os.path.normpath(os.path.join(folder, file))))


def record_unusable(quarantine, clip_id, path, reason):
    """Log a warning; append clip_id, path and reason as JSON to the file `quarantine`, if there is one."""
    logger.warning("left out: %s", reason)
    if quarantine:
        quarantine = Path(quarantine)
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"clip_id": clip_id, "path": str(path), "reason": reason})
        with quarantine.open("a") as file:  # one short append: ranks may share the file
            file.write(line + "\n")


def _schema():
    import pyarrow as pa

    # large strings: the captions of ten million clips do not fit the 2 GiB of a plain string column
    types = {str: pa.large_string(), float: pa.float64(), int: pa.int64()}
    return pa.schema([(field.name, types[field.type]) for field in fields(Clip)])


def _check_text(row):
    for name, value in row.items():
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"clip {row['clip_id']!a}: {name} {value!a} is not text; give it in UTF-8"
            ) from None


def _checked_columns(path, table):
    """The table with the columns' types; ValueError names the first row of a value that is none."""
    import pyarrow as pa

    for name in table.column_names:
        column = table.column(name)
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise ValueError(
                f"manifest {path}: row {row} has no {name}; write an empty text where none is known"
            )
        try:
            column = column.cast(_schema().field(name).type)
            column.validate(full=True)  # text is UTF-8
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"manifest {path}: column {name} cannot be used: {error}") from None
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _check_rows(path, table):
    """What `Clip` checks, of all rows at once; its own words for the first that fails."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    def among(name, values):
        return pc.is_in(table.column(name), value_set=pa.array(values, pa.large_string())).to_numpy()

    start_N, end_N = (table.column(f"{name}_seconds").to_numpy() for name in ("start", "end"))
    spans = (start_N >= 0) & (start_N <= end_N) & (end_N < np.inf)
    good = spans & (among("kind", ["image"]) == (start_N == end_N))
    good &= among("kind", ["video", "image"]) & among("split", ["train", "heldout"])
    for row in np.flatnonzero(~good)[:1]:
        try:
            Clips(table)[row]
        except ValueError as error:
            raise ValueError(f"manifest {path}: {error}") from None
        raise AssertionError(f"row {row}: refused as a row and not as a Clip")


def _check_unique(path, table):
    import pyarrow.compute as pc

    ids = table.column("clip_id")
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twin = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    raise ValueError(f"manifest {path}: two clips are called {twin!r}; give each its own clip_id")


def _with_paths(table, change):
    """The table with `change` done to the path of every file; a file of many clips is changed once."""
    import pyarrow as pa

    paths = table.column("path").combine_chunks().dictionary_encode()
    changed = pa.array([change(file) for file in paths.dictionary.to_pylist()], pa.large_string())
    index = table.column_names.index("path")
    return table.set_column(index, "path", changed.take(paths.indices))
