"""Latent shards to samples and batches: our reader, `cat`, DALI's readers, webdataset, a plain DataLoader.

All read the same samples, in an order of their own where they can shuffle; the files are in the page cache.
Ours, alone, takes any order of rows and checks every byte. `moviegen bench loader` runs it.
"""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.bench.measure import measure, summarise, table
from nemo_moviegen.data.collate import collate
from nemo_moviegen.data.latent_writer import LatentWriter
from nemo_moviegen.data.latents import INDEX, STATISTICS, LatentReader, LatentSample
from nemo_moviegen.sizes import VIDEO_5B, VIDEO_TINY

CAT = "cat shards > /dev/null"
"""What ratios are taken to."""
PRODUCTION = {"latent": (32, 16, 96, 96), "size": VIDEO_5B, "samples": 64, "batch": 1, "passes": 4}
"""73,728 tokens: 256 frames at 768 px, with the features of full-length prompts; one is a micro-batch."""
DEMO = {"latent": (2, 16, 8, 8), "size": VIDEO_TINY, "samples": 4096, "batch": 16, "passes": 2}


def bench_all(folder, rounds=5, log=print) -> dict:
    """Every figure about latents; writes 2 GB to `folder`, and tells `log` each table as it is ready.

    Keys: production and demo (see `bench_latents`), open_seconds, resident_mib, peers_ms.
    """
    folder, found = Path(folder), {}
    for name, what in (("production", PRODUCTION), ("demo", DEMO)):
        write_samples(folder / name, what)
        found[name] = bench_latents(folder / name, what, rounds)
        title = (
            f"latents, {name}: {found[name]['sample_megabytes']:.3f} MB a sample, batches of {what['batch']}"
        )
        log(table(title, found[name]["rows"], found[name]["failed"]))
    found["open_seconds"] = bench_start(folder / "index")
    found["resident_mib"] = bench_memory(folder / "production")
    found["peers_ms"] = bench_peers(folder / "production", rounds=rounds)
    log({name: found[name] for name in ("open_seconds", "resident_mib", "peers_ms")})
    return found


def write_samples(folder, what, seed=0):
    """Latent shards of random samples, and each latent as a .npy file in `folder`/npy; returns the bytes."""
    rng = np.random.default_rng(seed)
    (folder / "npy").mkdir(parents=True, exist_ok=True)
    with LatentWriter(folder, samples_per_shard=max(16, what["samples"] // 8)) as writer:
        for number in range(what["samples"]):
            latent_TCHW = rng.standard_normal(what["latent"], np.float32).astype(np.float16)
            contexts = {
                size.name: rng.standard_normal((size.max_tokens, size.width), np.float32)
                for size in what["size"].contexts
            }
            np.save(folder / "npy" / f"{number:06d}.npy", latent_TCHW)
            writer.add(
                LatentSample(
                    sample_id=number,
                    clip_id=f"clip{number}",
                    caption="a caption of the length that many captions have, in some detail",
                    fps=16.0,
                    latent_TCHW=latent_TCHW,
                    contexts=contexts,
                )
            )
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def bench_latents(folder, what, rounds=5) -> dict:
    """Samples a second of each way over shards that `write_samples` wrote: {"rows": ..., "failed": ...}."""
    reads = _Reads(Path(folder), what)
    ways = {
        CAT: reads.cat,
        "moviegen: read, checksums": lambda: reads.ours(2),
        "moviegen: the same, one thread": lambda: reads.ours(1),
        "moviegen: to a float32 batch": lambda: reads.ours(2, to_batch=True),
        "DALI fn.readers.webdataset": reads.dali_webdataset,
        "DALI fn.readers.numpy, latents only": reads.dali_numpy,
        "webdataset package": reads.webdataset,
        "PyTorch DataLoader over .npy, 2 workers, latents only": reads.data_loader,
    }
    measured, failed = measure(ways, rounds)
    return {
        "latent": list(what["latent"]),
        "sample_megabytes": reads.nbytes / what["samples"] / 1e6,
        "samples": what["samples"],
        "batch": what["batch"],
        "rounds": rounds,
        "rows": summarise(measured, CAT, units=("samples", "megabytes")),
        "failed": failed,
    }


def bench_start(folder, counts=(100_000, 1_000_000)) -> dict:
    """Seconds to open a folder of so many samples; its index is synthetic, its shards are not there."""
    seconds = {}
    for count in counts:
        write_index(Path(folder), count)
        started = time.perf_counter()
        reader = LatentReader(folder, skip_damaged=True)
        shapes = reader.distinct_shapes
        seconds[count] = time.perf_counter() - started
        assert len(reader) == count and len(shapes) == 4
    return seconds


def write_index(folder, count):
    """An index of `count` samples of four shapes over shards of a hundred, and statistics."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.arange(count)
    columns = {"sample_id": rows * 7919, "offset": rows % 100 * 10**7, "nbytes": np.full(count, 10**7)}
    columns |= {"checksum": (rows * 2654435761).astype(np.uint64), "channels": np.full(count, 16)}
    columns |= {"latent_frames": np.array([1, 16, 24, 32])[rows % 4]}
    columns |= {f"latent_{axis}": np.full(count, 96) for axis in ("height", "width")}
    columns |= {"clip_id": [f"clip{row}" for row in rows], "source": [""] * count}
    columns |= {"shard": [f"256x768x768-{row // 100:06d}.tar" for row in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / INDEX)
    (folder / STATISTICS).write_text(json.dumps({"mean": [0.0] * 16, "std": [1.0] * 16}))


def bench_memory(folder, num_samples=10_000, batch=4, warm_up=500) -> dict:
    """Resident MiB while that many samples are read in random order: after the warm-up, and at most then."""
    import psutil

    reader, process = LatentReader(folder), psutil.Process()
    rng, resident = np.random.default_rng(0), []
    for first in range(0, num_samples, batch):
        reader.read(rng.integers(len(reader), size=batch))
        if first >= warm_up and first % 100 < batch:
            resident.append(process.memory_info().rss / 2**20)
    return {"samples": num_samples, "warm": resident[0], "most": max(resident), "last": resident[-1]}


def bench_peers(folder, num_samples=64, rounds=5) -> dict:
    """Milliseconds a sample for two ranks that need the same ones: each reads, or one and a broadcast."""
    from nemo_moviegen.bench.peers import two_ranks

    return two_ranks(folder, num_samples, rounds)


class _Reads:
    """Each way as an iterator over passes, of which the first is to warm up; yields what a pass has read."""

    def __init__(self, folder, what):
        self.folder, self.what = folder, what
        self.shards = sorted(str(path) for path in folder.glob("*.tar"))
        self.nbytes = sum(os.path.getsize(shard) for shard in self.shards)
        self.npy = sorted(path.name for path in (folder / "npy").glob("*.npy"))
        self.npy_bytes = sum((folder / "npy" / name).stat().st_size for name in self.npy)

    def cat(self):
        command = ["sh", "-c", 'cat "$@" > /dev/null', "cat", *self.shards]
        command += 9 * self.shards  # all of them ten times: starting a process is not what is measured
        for counts in self._passes(lambda order: subprocess.run(command, check=True)):
            yield {unit: 10 * number for unit, number in counts.items()}

    def ours(self, num_threads, to_batch=False):
        reader = LatentReader(self.folder, num_threads=num_threads)
        contexts, statistics = self.what["size"].contexts, reader.statistics

        def read(order):
            for rows in order.reshape(-1, self.what["batch"]):
                samples = reader.read(rows)
                if to_batch:
                    collate(samples, [0] * len(rows), contexts, statistics=statistics)
                del samples

        return self._passes(read)

    def dali_webdataset(self):
        from nemo_moviegen.data.dali_readers import webdataset_batches

        endings = ["latent.npy", *(f"{size.name}.npy" for size in self.what["size"].contexts), "json"]
        return self._passes(_all_of(webdataset_batches(self.shards, endings, self.what["batch"])))

    def dali_numpy(self):
        from nemo_moviegen.data.dali_readers import numpy_batches

        batches = numpy_batches(self.folder / "npy", self.npy, self.what["batch"])
        return self._passes(_all_of(batches), self.npy_bytes)

    def webdataset(self):
        import webdataset

        samples = webdataset.WebDataset(self.shards, shardshuffle=False, empty_check=False).decode()
        return self._passes(lambda order: [None for _ in samples])

    def data_loader(self):
        dataset = _NpyFiles([self.folder / "npy" / name for name in self.npy])
        loader = torch.utils.data.DataLoader(
            dataset, self.what["batch"], shuffle=True, num_workers=2, persistent_workers=True
        )
        return self._passes(lambda order: [None for _ in loader], self.npy_bytes)

    def _passes(self, read, nbytes=None):
        for number in range(self.what["passes"] + 1):
            read(np.random.default_rng(number).permutation(self.what["samples"]))
            yield {"samples": self.what["samples"], "megabytes": (nbytes or self.nbytes) / 1e6}


def _all_of(passes):
    """Reads the next of endless passes, each an iterator over batches, to its end."""

    def read(order):
        for _ in next(passes):
            pass

    return read


class _NpyFiles(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, place):
        return torch.from_numpy(np.load(self.paths[place]))
