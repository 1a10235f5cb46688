"""What makes a node unfit to train on, by a stand-in for nvidia-smi and folders in place of the system's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen import preflight
from nemo_moviegen.cluster import read_cluster

ROOT = Path(__file__).resolve().parents[1]
GOOD = "{index}, NVIDIA H100 80GB HBM3, 81559, 4, 0, 700.00, 700.00, 550.54.15, Not Active"
"""A line of nvidia-smi --format=csv,noheader,nounits."""
LINK_UP = "\t Link {link}: 26.562 GB/s"


@pytest.fixture
def node(monkeypatch, tmp_path):
    """A node of eight H100s; `node(3, "old", "new")` changes the line of GPU 3."""
    lines = [GOOD.format(index=index) for index in range(8)]
    links = "\n".join(f"GPU {g}: NVIDIA H100 (UUID: x)\n" + LINK_UP.format(link=0) for g in range(8))

    def write(gpu=None, old="", new="", links=links, reason="clocks_event_reasons"):
        if gpu is not None:
            assert old in lines[gpu]
            lines[gpu] = lines[gpu].replace(old, new, 1)
        (tmp_path / "rows").write_text("\n".join(lines) + "\n")
        (tmp_path / "links").write_text(links + "\n")
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f'#!/bin/sh\ncase "$*" in\nnvlink*) cat {tmp_path}/links ;;\n*{reason}*) cat {tmp_path}/rows ;;\n'
            '*) echo "Field is not a valid field to query."; exit 2 ;;\nesac\n'
        )
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    write()
    write.lines = lines
    return write


@pytest.fixture
def cluster():
    return read_cluster("h100_512")


@pytest.mark.parametrize("reason", ["clocks_event_reasons", "clocks_throttle_reasons"])
def test_a_good_node_has_no_fault_whatever_its_driver_calls_a_slowdown(node, cluster, reason):
    node(reason=reason)
    rows = preflight.gpu_rows()
    assert len(rows) == 8
    assert preflight.gpu_faults(rows, cluster) == preflight.nvlink_faults(cluster) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("H100 80GB HBM3", "A100-SXM4-80GB", "GPU 3 is a NVIDIA A100-SXM4-80GB, cluster h100_512 has h100"),
        ("81559", "40960", "GPU 3 has 40.0 GiB, cluster h100_512 says 79"),
        (" 4, 0,", " 61440, 0,", "GPU 3 has 61,440 MiB in use"),
        (" 4, 0,", " 4, 12,", "GPU 3 has 12 uncorrected ECC errors"),
        ("700.00, 700.00", "400.00, 700.00", "GPU 3 is limited to 400 W of 700"),
        ("Not Active", "Active", "GPU 3 is slowed down by its hardware"),
    ],
)
def test_a_sick_gpu_is_named_with_what_it_has(node, cluster, old, new, said):
    node(3, old, new)
    (fault,) = preflight.gpu_faults(preflight.gpu_rows(), cluster)
    assert said in fault


def test_ecc_that_is_switched_off_is_no_fault(node, cluster):
    node(3, " 4, 0,", " 4, [N/A],")
    assert preflight.gpu_faults(preflight.gpu_rows(), cluster) == []


def test_a_missing_gpu_and_a_missing_driver_are_counted(node, cluster, monkeypatch, tmp_path):
    del node.lines[5]
    node()
    assert preflight.gpu_faults(preflight.gpu_rows(), cluster) == ["7 GPUs, cluster h100_512 has 8 a node"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.gpu_faults(preflight.gpu_rows(), cluster) == ["0 GPUs, cluster h100_512 has 8 a node"]


def test_a_link_that_is_down_is_named(node, cluster):
    node(links="GPU 2: NVIDIA H100 (UUID: x)\n\t Link 0: 26.562 GB/s\n\t Link 4: <inactive>")
    assert preflight.nvlink_faults(cluster) == ["NVLink is down: GPU 2 Link 4"]
    assert preflight.nvlink_faults(replace(cluster, node_gbyte_s=0.0)) == []


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["4: ACTIVE"] * 8, ""),
        (["4: ACTIVE"] * 7 + ["1: DOWN"], "7 of 8 network ports are active with 2800 Gbit/s together"),
        ([], "0 of 0 network ports"),
    ],
)
def test_network_ports_carry_what_the_cluster_says(cluster, tmp_path, states, said):
    for number, state in enumerate(states):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    faults = preflight.card_faults(cluster, tmp_path)
    assert (not faults) if not said else said in faults[0]
    assert preflight.card_faults(replace(cluster, nodes=1), tmp_path) == []


def test_a_full_or_missing_disk_is_named(monkeypatch, tmp_path):
    assert preflight.disk_faults(tmp_path) == []
    assert "can not be written" in preflight.disk_faults(tmp_path / "missing")[0]
    monkeypatch.setitem(preflight.FREE_GIB, "root", 1e9)
    assert "1e+09 are needed" in preflight.disk_faults(tmp_path)[0]


def test_an_all_reduce_that_is_slow_or_fails_is_a_fault(monkeypatch, cluster):
    def reaches(code, text):
        done = subprocess.CompletedProcess([], code, stdout=f"{text}\n", stderr="no route to host\n")
        monkeypatch.setattr(preflight.subprocess, "run", lambda *args, **kwargs: done)
        return preflight.all_reduce_faults(cluster)

    assert reaches(0, '{"gbyte_s": 371.0, "ranks": 8}') == ([], "371.0 GB/s")
    assert "reaches 90 GB/s, 270 are needed" in reaches(0, '{"gbyte_s": 90.0, "ranks": 8}')[0][0]
    assert "failed: no route to host" in reaches(1, "")[0][0]


def test_a_node_with_other_packages_is_named(tmp_path, capsys):
    for host in ("n1", "n2", "n3"):
        versions = {"torch": "2.13.0", "driver": "550" if host != "n2" else "535"}
        (tmp_path / f"{host}.json").write_text(json.dumps(versions))
    assert preflight.main(["--compare", str(tmp_path)]) == preflight.REFUSED
    assert capsys.readouterr().err == "preflight: n2: driver is 535, most nodes have 550\n"
    (tmp_path / "n2.json").unlink()
    assert preflight.main(["--compare", str(tmp_path)]) == 0


def test_the_script_passes_this_machine_for_two_cpu_ranks_and_refuses_it_as_a_gpu_node(tmp_path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOVIEGEN_ROOT": str(tmp_path),
        "MOVIEGEN_PREFLIGHT": str(tmp_path / "left"),
    }

    def run(cluster):
        command = ["bash", ROOT / "slurm" / "preflight.sh", cluster]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    fit = run("cpu_2")
    assert fit.returncode == 0, fit.stderr
    assert "fit: 2 ranks of cpu, all-reduce " in fit.stdout
    (left,) = (tmp_path / "left").iterdir()
    assert json.loads(left.read_text())["torch"]
    refused = run("h200_8")
    assert refused.returncode == preflight.REFUSED
    assert "0 GPUs, cluster h200_8 has 8 a node" in refused.stderr
    assert run("h200_9").returncode == 2
