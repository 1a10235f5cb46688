"""Writes what `latents.py` reads: shards, each with a table of its own beside it, then the index over all.

A shard appears whole or not at all: it is written beside and renamed, its table after it. So a table says
that its shard is done, what was wanted of it, and what came of it; who has all tables can write the index.
"""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.data.latents import EMPTY_PROMPT, INDEX, STATISTICS, as_stored
from nemo_moviegen.data.shards import (
    END_OF_TAR,
    checksum,
    named_if_full,
    pack_sample,
    part_of,
    write_whole,
)

_FACTS = b"moviegen"  # key of the table's own metadata
_TOO_LARGE = 65520  # what float16 rounds to infinity


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """What lies beside a shard."""

    rows: object
    """pyarrow.Table, one row a sample: sample_id, clip_id, source, latent_frames, channels, latent_height,
    latent_width, shard, offset, nbytes, checksum."""
    wanted: str
    """Fingerprint of what the shard was made from."""
    provenance: dict
    quarantined: list
    """[clip_id, path, reason] of each clip that was left out."""
    sums: dict
    """Over all elements of a channel: count, sum [C] and squares [C]."""
    nbytes: int
    """Of the shard; 0 where every clip was left out, and there is none."""


class ShardWriter:
    """Writes one shard; a context manager. Only `finish` makes it be there.

    ValueError where the disk is full, naming the file; nothing is left of it then.
    """

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"{name}.tar"
        self.part = part_of(self._path)
        """Where it is written until it is whole."""
        with named_if_full(self._path, self.part):
            self._file = self.part.open("wb")
        self._rows, self._offset = [], 0
        self._count, self._sum_C, self._squares_C = 0, 0.0, 0.0

    def __len__(self):
        return len(self._rows)

    def problem(self, sample) -> str:
        """Why `add` refuses a sample: it holds what float16 cannot; "" where it does not."""
        for part, array in ({"latents": sample.latent_TCHW} | sample.contexts).items():
            if not np.abs(array).max(initial=0) < _TOO_LARGE:
                return f"sample {sample.clip_id}: {part} are not finite in float16 (largest 65504)"
        return ""

    def add(self, sample, source=""):
        """Append one sample. ValueError for other channels, or values float16 cannot hold."""
        self._check(sample)
        latent_TCHW, contexts = np.asarray(sample.latent_TCHW, np.float16), as_stored(sample.contexts)
        facts = {"clip_id": sample.clip_id, "caption": sample.caption, "fps": sample.fps}
        key = f"{sample.sample_id:019d}"
        span = pack_sample(key, latent_TCHW, contexts, facts | {"sample_id": sample.sample_id})
        with named_if_full(self._path, self.part):
            self._file.write(span)
        axes = ("latent_frames", "channels", "latent_height", "latent_width")
        self._rows.append(
            {"sample_id": sample.sample_id, "clip_id": sample.clip_id, "source": source}
            | dict(zip(axes, latent_TCHW.shape, strict=True))
            | {"shard": self._path.name, "offset": self._offset, "nbytes": len(span)}
            | {"checksum": checksum(span)}
        )
        self._offset += len(span)
        values = latent_TCHW.astype(np.float64)
        self._count += values.size // values.shape[1]
        self._sum_C = self._sum_C + values.sum((0, 2, 3))
        self._squares_C = self._squares_C + (values**2).sum((0, 2, 3))

    def finish(self, wanted="", provenance=None, quarantined=()):
        """Put the shard and its table in their place. No shard where no sample was added."""
        if self._rows:
            with named_if_full(self._path, self.part):
                self._file.write(END_OF_TAR)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.part, self._path)
        else:
            self._file.close()
            self.part.unlink()
            self._path.unlink(missing_ok=True)
        facts = {
            "wanted": wanted,
            "provenance": provenance or {},
            "quarantined": [list(entry) for entry in quarantined],
            "sums": {
                "count": self._count,
                "sum": np.ravel(self._sum_C).tolist(),
                "squares": np.ravel(self._squares_C).tolist(),
            },
            "nbytes": self._offset + len(END_OF_TAR) if self._rows else 0,
        }
        write_whole(self._path.with_suffix(".parquet"), _table_bytes(self._rows, facts))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(OSError):  # what does not fit the disk now did not before
            self._file.close()
        self.part.unlink(missing_ok=True)

    def _check(self, sample):
        name, latent_TCHW = f"sample {sample.clip_id}", sample.latent_TCHW
        if latent_TCHW.ndim != 4 or not latent_TCHW.size:
            raise ValueError(f"{name}: latents of shape {latent_TCHW.shape} are not [T, C, H, W]")
        if self._rows and latent_TCHW.shape[1] != self._rows[0]["channels"]:
            raise ValueError(
                f"{name}: {latent_TCHW.shape[1]} latent channels, those before it have "
                f"{self._rows[0]['channels']}; encode all with one autoencoder"
            )
        if problem := self.problem(sample):
            raise ValueError(problem)


class LatentWriter:
    """Writes a whole folder of samples at hand; a context manager. Only `close` makes the folder readable.

    An exception inside `with` leaves no index. Opening a writer on a folder removes what was in it.
    """

    def __init__(self, folder, samples_per_shard=1000):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; use 1 or more")
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        (self.folder / INDEX).unlink(missing_ok=True)
        for leftover in self.folder.glob("shard-*"):
            leftover.unlink()
        self._names, self._shard, self._ids = [], None, set()

    def add(self, sample):
        """Append one sample. ValueError as `ShardWriter.add`, and for a repeated id."""
        if sample.sample_id in self._ids:
            raise ValueError(
                f"sample {sample.clip_id}: its id {sample.sample_id} is there already; add a clip once"
            )
        if self._shard is None:
            self._names.append(f"shard-{len(self._names):06d}")
            self._shard = ShardWriter(self.folder, self._names[-1])
        self._shard.add(sample)
        self._ids.add(sample.sample_id)
        if len(self._shard) == self.samples_per_shard:
            self._finish_shard()

    def close(self):
        """Finish the shards, then statistics and index. ValueError where no sample was added."""
        self._finish_shard()
        finish_folder(self.folder, self._names)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.__exit__(kind, error, trace)

    def _finish_shard(self):
        if self._shard is not None:
            self._shard.finish()
            self._shard = None


def read_table(folder, name) -> ShardTable | None:
    """What lies beside the shard `name`; None where either is missing, damaged, or the shard is cut off."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = Path(folder) / f"{name}.tar"
    try:
        rows = pq.ParquetFile(shard.with_suffix(".parquet")).read()  # read_table takes ten times as long
        table = ShardTable(rows=rows.replace_schema_metadata(), **json.loads(rows.schema.metadata[_FACTS]))
    except (FileNotFoundError, pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None
    found = shard.stat().st_size if shard.is_file() else 0
    return table if found == table.nbytes else None


def finish_folder(folder, names, statistics_of=None):
    """Write statistics and index over these shards, in order of their names; returns the number of samples.

    With `statistics_of`, a folder that is finished, its statistics count here too. ValueError where a shard
    is not there whole, where two hold one sample, where their channels differ or no sample was written.
    """
    import pyarrow as pa

    folder = Path(folder)
    tables = [(name, read_table(folder, name)) for name in sorted(names)]
    for name, table in tables:
        if table is None:
            raise ValueError(f"{folder / name}.tar is missing or damaged: run `moviegen encode` again")
    tables = [table for _, table in tables if len(table.rows)]
    if not tables:
        raise ValueError(f"{folder}: no sample was written; were all clips quarantined?")
    rows = pa.concat_tables([table.rows for table in tables])
    _check_rows(folder, rows)
    if statistics_of is None:
        statistics = json.dumps(_statistics([table.sums for table in tables], len(rows)), indent=1).encode()
    else:
        statistics = (Path(statistics_of) / STATISTICS).read_bytes()
    write_whole(folder / STATISTICS, statistics)
    write_whole(folder / INDEX, _parquet(rows))
    return len(rows)


def write_empty_prompt(folder, contexts):
    """Store the text features of the empty prompt, [L, width] by encoder, beside the shards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **as_stored(contexts))
    write_whole(Path(folder) / EMPTY_PROMPT, buffer.getvalue())


def _statistics(sums, num_samples):
    count = sum(part["count"] for part in sums)
    mean_C = np.sum([part["sum"] for part in sums], axis=0) / count
    squares_C = np.sum([part["squares"] for part in sums], axis=0) / count
    std_C = np.sqrt(np.maximum(squares_C - mean_C**2, 0))
    std_C[std_C < 1e-6] = 1.0  # a channel that never varies is centred, not blown up
    return {"mean": mean_C.tolist(), "std": std_C.tolist(), "num_samples": num_samples}


def _check_rows(folder, rows):
    ids, counts = np.unique(rows["sample_id"].to_numpy(), return_counts=True)
    if len(ids) < len(rows):
        where = np.flatnonzero(rows["sample_id"].to_numpy() == ids[counts > 1][0])
        raise ValueError(
            f"{folder}: sample {rows['clip_id'][int(where[0])]} is in two shards; add a clip once"
        )
    channels = rows["channels"].unique().to_pylist()
    if len(channels) > 1:
        raise ValueError(f"{folder}: shards of {channels} latent channels; encode all with one autoencoder")


def _table_bytes(rows, facts):
    import pyarrow as pa

    whole = pa.int64()
    types = {"clip_id": pa.large_string(), "source": pa.large_string(), "shard": pa.string()}
    names = ("sample_id", "clip_id", "source", "latent_frames", "channels", "latent_height", "latent_width")
    fields = [(name, types.get(name, whole)) for name in (*names, "shard", "offset", "nbytes")]
    schema = pa.schema([*fields, ("checksum", pa.uint64())], metadata={_FACTS: json.dumps(facts).encode()})
    return _parquet(pa.Table.from_pylist(rows, schema=schema))


def _parquet(table):
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
