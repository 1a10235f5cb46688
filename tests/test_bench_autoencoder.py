"""The benchmark of autoencoders: every way gives the frames back, is counted, and one that fails is told."""

import json
import sys

import diffusers  # the children of the benchmark then need not import it
import pytest
import torch

from nemo_moviegen.bench import autoencoder as bench
from nemo_moviegen.sizes import AutoencoderSize

TINY = {
    "frames": 17,
    "size_px": 16,
    "ours": AutoencoderSize(base_width=8),
    "wan": {"base_dim": 8},
    "cogvideox": {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4},
}
LONG = {"frames": (8, 40), "size_px": 16, "ours": AutoencoderSize(base_width=8)}


def test_the_command_measures_every_way_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(bench, "LONG", LONG)
    told = []
    bench.bench_autoencoder(["small", "long"], rounds=1, output=tmp_path / "found.json", log=told.append)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["small"]["failed"] == {} and "production" not in found
    rows = {row["name"]: row for row in found["small"]["rows"]}
    assert list(rows) == [bench.STREAM, bench.TILES, bench.WHOLE, bench.WAN, bench.COGVIDEOX]
    assert rows[bench.STREAM]["ratio"] == 1
    for name, row in rows.items():
        encode, decode = row["encode_frames_per_second"], row["decode_frames_per_second"]
        assert 1 / row["frames_per_second"] == pytest.approx(1 / encode + 1 / decode, rel=0.3), name
        assert row["latent_channels"] == 16 and row["cpu_seconds_per_frame"] > 0 and row["growth_mib"] >= 0
        assert row["compression"] == ("4x8x8" if "diffusers" in name else "8x8x8")
    for growth in found["long"]["growth_mib"].values():
        assert list(growth) == ["8", "40"]
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert found["environment"]["packages"]["diffusers"] == diffusers.__version__
    assert told[1].row_count == 5 and told[2].row_count == 2


@pytest.mark.parametrize("case", [bench.PRODUCTION, bench.SMALL])
def test_models_that_are_compared_have_as_many_parameters(case):
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in make(case)[0].parameters())
            for make in (lambda case: bench._ours(case, None), bench._wan, bench._cogvideox)
        ]
    for count in counts[1:]:
        assert abs(count / counts[0] - 1) < 0.05


def test_a_way_that_fails_is_told_in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    found = bench.bench_models(TINY | {"frames": 9}, rounds=1)
    assert set(found["failed"]) == {bench.WAN, bench.COGVIDEOX}
    assert "diffusers" in found["failed"][bench.WAN] and len(found["rows"]) == 3
    assert bench.models_table("tiny", found).row_count == 5
