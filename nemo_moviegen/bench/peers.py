"""Two ranks of one model copy that need the same samples: each reads them, or one reads and broadcasts."""

import multiprocessing
import statistics
import tempfile
import time

import numpy as np

from nemo_moviegen.data.latents import LatentReader


def two_ranks(folder, num_samples, rounds) -> dict:
    """{"each reads": ms, "one reads, gloo broadcast": ms} a sample, medians of rounds taken in turns."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as meeting:
        told = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, f"{meeting}/store", folder, num_samples, rounds, told))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]}")
    return told.get()


def _rank(rank, store, folder, num_samples, rounds, told):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reader = LatentReader(folder, num_threads=1)
    rows = np.random.default_rng(0).integers(len(reader), size=num_samples)
    found = {"each reads": [], "one reads, gloo broadcast": []}
    for _ in range(rounds + 1):
        for name, take in zip(found, (_read, _broadcast), strict=True):
            dist.barrier()
            started = time.perf_counter()
            for row in rows:
                take(reader, row, rank)
            dist.barrier()
            found[name].append((time.perf_counter() - started) / num_samples * 1e3)
    if rank == 0:
        told.put({name: round(statistics.median(took[1:]), 3) for name, took in found.items()})
    dist.destroy_process_group()


def _read(reader, row, rank):
    return reader[row].latent_TCHW


def _broadcast(reader, row, rank):
    """The latent alone: a broadcast of the text, of varying length, would come on top."""
    import torch
    import torch.distributed as dist

    if rank == 0:
        latent_TCHW = torch.from_numpy(reader[row].latent_TCHW)
    else:
        frames, height, width = reader.latent_shapes[row].tolist()
        latent_TCHW = torch.empty(frames, len(reader.mean_C), height, width, dtype=torch.float16)
    dist.broadcast(latent_TCHW, 0)
    return latent_TCHW
