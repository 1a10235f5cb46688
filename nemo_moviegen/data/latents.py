"""Latent shards: autoencoder latents and text features, encoded once and read by row while training.

    folder/shard-000000.tar ...   WebDataset tars, float16
    folder/statistics.json        mean and deviation of each latent channel over all samples
    folder/empty_prompt.npz       text features of the empty prompt, for classifier-free guidance
    folder/index.parquet          one row a sample, with its place in a shard; written last

Without an index nothing is read, so a killed writer leaves nothing that looks complete.
"""

import functools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.data.clips import record_unusable
from nemo_moviegen.data.shards import ShardFile, pack_sample, unpack_sample

INDEX, STATISTICS, EMPTY_PROMPT = "index.parquet", "statistics.json", "empty_prompt.npz"


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One clip or image as the transformer trains on it."""

    sample_id: int
    """`clips.sample_id` of the clip: unique, 63 bits."""
    clip_id: str
    caption: str
    fps: float
    """Frame rate the clip was encoded at."""
    latent_TCHW: np.ndarray
    """As encoded; float16 when read. `collate` normalises it."""
    contexts: dict[str, np.ndarray]
    """Features [L, width] of the real tokens, by text encoder, float16 when read; L may be 0."""


class LatentWriter:
    """Writes samples to shards; a context manager. Only `close` makes the folder readable.

    An exception inside `with` leaves no index. Opening a writer on a folder removes the index it had.
    """

    def __init__(self, folder, samples_per_shard=1000):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; use 1 or more")
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        for leftover in self.folder.glob("shard-*.tar*"):
            leftover.unlink()
        self._rows, self._shard, self._offset = [], None, 0
        self._ids = set()
        self._count, self._sum_C, self._squares_C = 0, 0.0, 0.0

    def add(self, sample):
        """Append one sample. ValueError for a repeated id, other channels, or values float16 cannot hold."""
        with np.errstate(over="ignore"):  # _check names the sample
            latent_TCHW = np.asarray(sample.latent_TCHW, np.float16)
            contexts = as_stored(sample.contexts)
        self._check(sample, latent_TCHW, contexts)
        if self._shard is None:
            self._open_shard()
        key = f"{sample.sample_id:019d}"
        facts = {"clip_id": sample.clip_id, "caption": sample.caption, "fps": sample.fps}
        span = pack_sample(key, latent_TCHW, contexts, facts | {"sample_id": sample.sample_id})
        self._shard.write(span)
        frames, channels, height, width = latent_TCHW.shape
        shape = {
            "latent_frames": frames,
            "channels": channels,
            "latent_height": height,
            "latent_width": width,
        }
        place = {
            "shard": self._shard_name,
            "offset": self._offset,
            "nbytes": len(span),
            "crc32": zlib.crc32(span),
        }
        self._rows.append({"sample_id": sample.sample_id, "clip_id": sample.clip_id} | shape | place)
        self._offset += len(span)
        self._ids.add(sample.sample_id)
        self._measure(latent_TCHW)
        if len(self._rows) % self.samples_per_shard == 0:
            self._close_shard()

    def close(self):
        """Finish the shards, then the statistics, then the index. ValueError where no sample was added."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            raise ValueError(f"{self.folder}: no sample was written; were all clips quarantined?")
        self._close_shard()
        mean_C = self._sum_C / self._count
        std_C = np.sqrt(np.maximum(self._squares_C / self._count - mean_C**2, 0))
        std_C[std_C < 1e-6] = 1.0  # a channel that never varies is centred, not blown up
        statistics = {"mean": mean_C.tolist(), "std": std_C.tolist(), "num_samples": len(self._rows)}
        _write_whole(self.folder / STATISTICS, lambda part: part.write_text(json.dumps(statistics, indent=1)))
        _write_whole(self.folder / INDEX, lambda part: pq.write_table(pa.Table.from_pylist(self._rows), part))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.close()

    def _open_shard(self):
        self._shard_name = f"shard-{len(self._rows) // self.samples_per_shard:06d}.tar"
        self._shard, self._offset = (self.folder / f"{self._shard_name}.part").open("wb"), 0

    def _close_shard(self):
        if self._shard is None:
            return
        self._shard.write(bytes(1024))  # the end of a tar
        self._shard.flush()
        os.fsync(self._shard.fileno())
        self._shard.close()
        os.replace(self.folder / f"{self._shard_name}.part", self.folder / self._shard_name)
        self._shard = None

    def _measure(self, latent_TCHW):
        values = latent_TCHW.astype(np.float64)
        self._count += values.size // values.shape[1]
        self._sum_C = self._sum_C + values.sum((0, 2, 3))
        self._squares_C = self._squares_C + (values**2).sum((0, 2, 3))

    def _check(self, sample, latent_TCHW, contexts):
        if latent_TCHW.ndim != 4 or not latent_TCHW.size:
            raise ValueError(
                f"sample {sample.clip_id}: latents of shape {latent_TCHW.shape} are not [T, C, H, W]"
            )
        if self._rows and latent_TCHW.shape[1] != self._rows[0]["channels"]:
            raise ValueError(
                f"sample {sample.clip_id}: {latent_TCHW.shape[1]} latent channels, those before it have "
                f"{self._rows[0]['channels']}; encode all with one autoencoder"
            )
        if sample.sample_id in self._ids:
            raise ValueError(
                f"sample {sample.clip_id}: its id {sample.sample_id} is there already; add a clip once"
            )
        for name, array in ({"latents": latent_TCHW} | contexts).items():
            if not np.isfinite(array).all():
                raise ValueError(f"sample {sample.clip_id}: {name} are not finite in float16 (largest 65504)")


def write_empty_prompt(folder, contexts):
    """Store the text features of the empty prompt, [L, width] by encoder, beside the shards."""
    arrays = as_stored(contexts)
    Path(folder).mkdir(parents=True, exist_ok=True)

    def write(part):
        with part.open("wb") as file:
            np.savez(file, **arrays)

    _write_whole(Path(folder) / EMPTY_PROMPT, write)


class LatentReader:
    """Samples of a folder by row number. Reads only the sample's own bytes.

    ValueError where the folder is not complete: no index, a shard missing or of another size than written.
    With `skip_damaged`, such shards wait until one of their samples is read, and `read` replaces that sample.
    """

    def __init__(self, folder, *, skip_damaged=False, quarantine=None):
        self.folder, self.skip_damaged = Path(folder), skip_damaged
        self.quarantine = quarantine
        index = _read_index(self.folder)
        self.sample_ids = np.array(index["sample_id"], np.int64)
        """int64 [N]."""
        self.latent_shapes = np.stack(
            [np.array(index[f"latent_{axis}"], np.int64) for axis in ("frames", "height", "width")], axis=1
        )
        """int64 [N, 3]: latent frames, height, width."""
        self._clip_ids, self._shards = index["clip_id"], index["shard"]
        self._places = list(zip(index["offset"], index["nbytes"], index["crc32"], strict=True))
        statistics = json.loads((self.folder / STATISTICS).read_text())
        self.mean_C, self.std_C = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
        self.statistics = self.mean_C, self.std_C
        """What `collate` normalises latents with."""
        self._open = functools.lru_cache(maxsize=64)(ShardFile)
        self._damaged = set()
        if not skip_damaged:
            self._check_sizes()

    def __len__(self):
        return len(self.sample_ids)

    @property
    def quarantined(self) -> int:
        """Samples found damaged so far."""
        return len(self._damaged)

    @functools.cached_property
    def empty_prompt(self) -> dict[str, np.ndarray]:
        """Features [L, width] of the empty prompt, by text encoder."""
        path = self.folder / EMPTY_PROMPT
        if not path.is_file():
            raise ValueError(f"{path} is missing: run `moviegen encode` again")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def __getitem__(self, row) -> LatentSample:
        """The sample as it was stored, float16.

        ValueError names shard and sample where the bytes are not those that were written.
        """
        offset, nbytes, crc32 = self._places[row]
        path = self.folder / self._shards[row]
        try:
            span = self._open(path).read(offset, nbytes)
        except OSError as error:
            raise self._damage(row, error.strerror) from None
        if len(span) < nbytes:
            raise self._damage(row, "the shard is truncated")
        if zlib.crc32(span) != crc32:
            raise self._damage(row, "its checksum does not match, the shard is corrupt")
        latent_TCHW, contexts, facts = unpack_sample(span)
        return LatentSample(latent_TCHW=latent_TCHW, contexts=contexts, **facts)

    def read(self, rows) -> list[LatentSample]:
        """The samples of these rows; with `skip_damaged`, a damaged one is replaced by the next of its shape.

        The replacement depends on the files alone, so every rank that reads the row gets the same. Damaged
        samples are logged, written to the quarantine file and counted once. ValueError where none is left.
        """
        return [self._read_or_replace(row) if self.skip_damaged else self[row] for row in rows]

    def _read_or_replace(self, row):
        same_shape = self._rows_of_shape[tuple(self.latent_shapes[row].tolist())]
        start = int(np.searchsorted(same_shape, row))
        for step in range(len(same_shape)):
            candidate = int(same_shape[(start + step) % len(same_shape)])
            if candidate in self._damaged:
                continue
            try:
                return self[candidate]
            except ValueError as error:
                self._reject(candidate, str(error))
        shape = "x".join(map(str, self.latent_shapes[row]))
        raise ValueError(
            f"{self.folder}: every sample of shape {shape} is damaged; run `moviegen encode` again"
        )

    @property
    def distinct_shapes(self) -> list[tuple[int, int, int]]:
        """(T, H, W) of the latents in the folder, each once, sorted."""
        return list(self._rows_of_shape)

    @functools.cached_property
    def _rows_of_shape(self):
        shapes, members, counts = np.unique(
            self.latent_shapes, axis=0, return_inverse=True, return_counts=True
        )
        rows = np.split(np.argsort(members.ravel(), kind="stable"), np.cumsum(counts)[:-1])
        return {tuple(shape): own for shape, own in zip(shapes.tolist(), rows, strict=True)}

    def _reject(self, row, reason):
        self._damaged.add(row)
        record_unusable(self.quarantine, self._clip_ids[row], self.folder / self._shards[row], reason)

    def _damage(self, row, what):
        return ValueError(
            f"{self.folder / self._shards[row]}: sample {self._clip_ids[row]} cannot be read: {what}; "
            "restore the shard or run `moviegen encode` again"
        )

    def _check_sizes(self):
        ends = {}
        for row, (shard, (offset, nbytes, _)) in enumerate(zip(self._shards, self._places, strict=True)):
            ends[shard] = max(ends.get(shard, (0, 0)), (offset + nbytes + 1024, row))
        for shard, (nbytes, row) in ends.items():
            path = self.folder / shard
            found = path.stat().st_size if path.is_file() else None
            if found != nbytes:
                what = (
                    "the shard is missing"
                    if found is None
                    else f"it has {found} bytes, {nbytes} were written"
                )
                raise self._damage(row, what)


def as_stored(contexts):
    """Text features [L, width] by encoder as a shard keeps them and a reader returns them: float16."""
    return {name: np.asarray(features, np.float16) for name, features in contexts.items()}


def _read_index(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(
            f"no finished latents in {folder} ({INDEX} is missing): run `moviegen encode` to its end"
        )
    try:
        return pq.read_table(path).to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `moviegen encode` again") from None


def _write_whole(path, write):
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
