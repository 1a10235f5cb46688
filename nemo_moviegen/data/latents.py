"""Latent shards: autoencoder latents and text features, encoded once and read by row while training.

    folder/NAME.tar ...        WebDataset tars, float16
    folder/NAME.parquet ...    beside each: its samples' places, checksums, sums, and their origin
    folder/statistics.json     mean and deviation of each latent channel over all samples
    folder/empty_prompt.npz    text features of the empty prompt, for classifier-free guidance
    folder/index.parquet       one row a sample, with its place in a shard; written last

Without an index nothing is read, so a killed writer leaves nothing that looks complete. `latent_writer.py`
writes all of it.

Why a reader of our own, and not one of DALI's or webdataset's. A training step asks for given rows: they are
a function of (seed, step), on any number of ranks. `fn.readers.webdataset` and the `webdataset` package
stream shards in file order and shuffle within a buffer; `fn.readers.numpy` wants one file a sample, a hundred
million of them; none checks what it read. A sample here is one contiguous span, which is what parallel file
systems do best. Two threads read it in pieces of 1 MiB, each summed up with XXH3 while it is in a core's
cache, into memory that is used again; its arrays are views of that. mmap is a copy less, and faster where all
pages are mapped already, but an input error behind a map is a SIGBUS that kills the rank, where `preadv`
returns an error and the sample is replaced. `moviegen bench loader` compares all of them.

On a GPU node `collate` normalises latents into pinned memory: it has to touch each number once anyway, and
what it makes is what the device needs. GPUDirect (kvikio) would spare the way through the host; no machine
here could show what that gives, at 9.4 MB a sample and seconds a step.

Ranks that share a sample (tensor and context parallel) read it each, with no collective between them: they
are the eight GPUs of one node, whose page cache has the bytes after the first, and a gloo broadcast took
twice as long (`bench/peers.py`). No rank waits for another inside a read, nor replaces a damaged sample by
another than its peers do.
"""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.data.clips import record_unusable
from nemo_moviegen.data.shards import END_OF_TAR, ShardFile, SpanRead, read_spans, unpack_sample

INDEX, STATISTICS, EMPTY_PROMPT = "index.parquet", "statistics.json", "empty_prompt.npz"
_WORTH_A_THREAD = 1 << 20  # bytes of a read: below, handing over costs more than it gives
_OPEN_SHARDS = 256  # a shell's usual limit is 1024 files


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


class LatentReader:
    """Samples of a folder by row number. Reads only the sample's own bytes, and checks them all.

    ValueError where the folder is not complete: no index, a shard missing or of another size than written.
    With `skip_damaged`, such shards wait until one of their samples is read, and `read` replaces that sample.
    """

    def __init__(self, folder, *, skip_damaged=False, quarantine=None, num_threads=2):
        self.folder, self.skip_damaged, self.quarantine = Path(folder), skip_damaged, quarantine
        self.num_threads = num_threads
        index = _read_index(self.folder)
        self.sample_ids = index["sample_id"].to_numpy()
        """int64 [N]."""
        self.latent_shapes = np.stack(
            [index[f"latent_{axis}"].to_numpy() for axis in ("frames", "height", "width")], axis=1
        )
        """int64 [N, 3]: latent frames, height, width."""
        self._offset_N, self._nbytes_N = (index[name].to_numpy() for name in ("offset", "nbytes"))
        self._checksum_N, self._clip_ids = index["checksum"].to_numpy(), index["clip_id"]
        shards = index["shard"].combine_chunks().dictionary_encode()
        self._shard_N, self._shards = shards.indices.to_numpy(), shards.dictionary.to_pylist()
        statistics = json.loads((self.folder / STATISTICS).read_text())
        self.mean_C, self.std_C = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
        self.statistics = self.mean_C, self.std_C
        """What `collate` normalises latents with."""
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(ShardFile)
        self._damaged = set()
        if not skip_damaged:
            self._check_sizes()

    def __len__(self):
        return len(self.sample_ids)

    @property
    def quarantined(self) -> int:
        """Samples found damaged so far."""
        return len(self._damaged)

    @property
    def distinct_shapes(self) -> list[tuple[int, int, int]]:
        """(T, H, W) of the latents in the folder, each once, sorted."""
        firsts = np.unique(self._shape_keys, return_index=True)[1]
        return [tuple(shape) for shape in self.latent_shapes[firsts].tolist()]

    @functools.cached_property
    def empty_prompt(self) -> dict[str, np.ndarray]:
        """Features [L, width] of the empty prompt, by text encoder."""
        path = self.folder / EMPTY_PROMPT
        if not path.is_file():
            raise ValueError(f"{path} is missing: run `moviegen encode` again")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def __getitem__(self, row) -> LatentSample:
        """The sample as it was stored, float16; its arrays are views of one buffer of its own.

        ValueError names shard and sample where the bytes are not those that were written.
        """
        return self._samples([int(row)])[0]

    def read(self, rows) -> list[LatentSample]:
        """The samples of these rows; with `skip_damaged`, a damaged one is replaced by the next of its shape.

        The replacement depends on the files alone, so every rank that reads the row gets the same. Damaged
        samples are logged, written to the quarantine file and counted once. ValueError where none is left.
        """
        samples = self._samples([int(row) for row in rows], skip_damaged=self.skip_damaged)
        return [self._next_whole(row) if s is None else s for row, s in zip(rows, samples, strict=True)]

    def _samples(self, rows, skip_damaged=False):
        """The samples; None in place of a damaged one where those are skipped."""
        spans = [self._span(row) for row in rows]
        whole = [span for span in spans if isinstance(span, SpanRead)]
        helpers = min(self.num_threads - 1, sum(len(span.starts) for span in whole) - 1)
        if helpers > 0 and self._nbytes_N[rows].sum() >= _WORTH_A_THREAD:
            read_spans(whole, _pool(os.getpid()).submit, helpers)
        else:
            read_spans(whole)
        return [self._sample(row, span, skip_damaged) for row, span in zip(rows, spans, strict=True)]

    def _span(self, row):
        """The sample's bytes, to be read; what is wrong where it has no shard."""
        if row in self._damaged:
            return "it is damaged"
        try:
            return SpanRead(self._open(self._path(row)), int(self._offset_N[row]), int(self._nbytes_N[row]))
        except OSError as error:
            return error.strerror

    def _sample(self, row, span, skip_damaged):
        problem = span if isinstance(span, str) else span.problem(self._checksum_N[row])
        if not problem:
            latent_TCHW, contexts, facts = unpack_sample(span.span)
            return LatentSample(latent_TCHW=latent_TCHW, contexts=contexts, **facts)
        if not skip_damaged:
            raise self._damage(row, problem)
        self._reject(row, str(self._damage(row, problem)))
        return None

    def _next_whole(self, row):
        """In place of a damaged sample: the next of its shape that is whole, around the end."""
        same_shape = np.flatnonzero(self._shape_keys == self._shape_keys[row])
        place = int(np.searchsorted(same_shape, row))
        for candidate in np.concatenate([same_shape[place + 1 :], same_shape[:place]]).tolist():
            if (sample := self._samples([candidate], skip_damaged=True)[0]) is not None:
                return sample
        shape = "x".join(map(str, self.latent_shapes[row]))
        raise ValueError(
            f"{self.folder}: every sample of shape {shape} is damaged; run `moviegen encode` again"
        )

    @functools.cached_property
    def _shape_keys(self):
        """One number for each row's shape, ordered as shapes are."""
        return self.latent_shapes @ np.array([1 << 40, 1 << 20, 1])

    def _reject(self, row, reason):
        if row not in self._damaged:
            self._damaged.add(row)
            record_unusable(self.quarantine, self._clip_ids[row].as_py(), self._path(row), reason)

    def _path(self, row):
        return self.folder / self._shards[self._shard_N[row]]

    def _damage(self, row, what):
        return ValueError(
            f"{self._path(row)}: sample {self._clip_ids[row].as_py()} cannot be read: {what}; "
            "restore the shard or run `moviegen encode` again"
        )

    def _check_sizes(self):
        ends_N = self._offset_N + self._nbytes_N
        ends_S = np.zeros(len(self._shards), np.int64)
        np.maximum.at(ends_S, self._shard_N, ends_N)
        for shard, (name, end) in enumerate(zip(self._shards, ends_S.tolist(), strict=True)):
            path, written = self.folder / name, end + len(END_OF_TAR)
            found = path.stat().st_size if path.is_file() else None
            if found != written:
                row = int(np.flatnonzero((self._shard_N == shard) & (ends_N == end))[0])
                what = f"it has {found} bytes, {written} were written"
                raise self._damage(row, "the shard is missing" if found is None else what)


@functools.lru_cache(maxsize=1)
def _pool(process):
    """Threads of this process, for all its readers; those of one it was forked from did not come along."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "latent-reader")


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
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `moviegen encode` again") from None
    if "checksum" not in table.column_names:
        raise ValueError(f"{path} is of another version of this package: run `moviegen encode` again")
    return table
