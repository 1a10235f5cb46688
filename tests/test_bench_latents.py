"""The benchmark of latents: every way runs, and all read the same samples."""

import numpy as np

from nemo_moviegen.bench.latents import (
    CAT,
    DEMO,
    bench_latents,
    bench_memory,
    bench_peers,
    bench_start,
    write_samples,
)
from nemo_moviegen.data.dali_readers import numpy_batches, webdataset_batches
from nemo_moviegen.data.latents import LatentReader

TINY = DEMO | {"samples": 16, "batch": 4, "passes": 2}


def test_every_way_reads_every_sample_of_every_pass(tmp_path):
    written = write_samples(tmp_path, TINY)
    found = bench_latents(tmp_path, TINY, rounds=1)
    assert found["failed"] == {} and len(found["rows"]) == 8
    assert found["rows"][0]["name"] == CAT and found["rows"][0]["ratio"] == 1
    assert found["sample_megabytes"] == written / 16 / 1e6
    for row in found["rows"]:
        per_sample = row["megabytes_per_second"] / row["samples_per_second"] * 1e6
        if "latents only" in row["name"]:
            assert abs(per_sample - (2 * 2 * 16 * 8 * 8 + 128)) < 1, "a latent and the header of its file"
        else:
            assert abs(per_sample - written / 16) < 1


def test_a_pass_of_dalis_readers_is_every_sample_once(tmp_path):
    """So that their rates are of the same work as ours."""
    write_samples(tmp_path, TINY)
    wanted = sorted(sample.latent_TCHW.tobytes() for sample in LatentReader(tmp_path).read(range(16)))
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    names = sorted(path.name for path in (tmp_path / "npy").iterdir())
    for passes in (
        webdataset_batches(shards, ["latent.npy", "json"], 4),
        numpy_batches(tmp_path / "npy", names, 4),
    ):
        for _ in range(2):
            batches = [[np.array(one) for one in found[0]] for found in next(passes)]
            assert [len(batch) for batch in batches] == [4] * 4
            found = sorted(array.tobytes()[-len(wanted[0]) :] for batch in batches for array in batch)
            assert found == wanted


def test_folders_open_memory_and_peers_are_measured(tmp_path):
    write_samples(tmp_path / "latents", TINY)
    assert [*bench_start(tmp_path / "index", (1000, 2000))] == [1000, 2000]
    memory = bench_memory(tmp_path / "latents", num_samples=600, warm_up=100)
    assert memory["most"] >= memory["warm"] > 0
    assert len(bench_peers(tmp_path / "latents", num_samples=4, rounds=1)) == 2
