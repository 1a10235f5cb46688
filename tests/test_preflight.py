"""What makes a node unfit to train on, by a stand-in for nvidia-smi and folders in place of the system's."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen import preflight
from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.preflight_network import network_faults, rounds

ROOT = Path(__file__).resolve().parents[1]
GOOD = (
    "{index}, NVIDIA H100 80GB HBM3, 81559, 4, 0, 700.00, 700.00, 16, 16, 550.54.15, Not Active, Not Active"
)
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


def seen(cluster):
    """Arguments of `gpu_faults`."""
    rows, said = preflight.gpu_rows()
    return rows, cluster, said


@pytest.mark.parametrize("reason", ["clocks_event_reasons", "clocks_throttle_reasons"])
def test_a_good_node_has_no_fault_whatever_its_driver_calls_a_slowdown(node, cluster, reason):
    node(reason=reason)
    rows, said = preflight.gpu_rows()
    assert len(rows) == 8 and not said
    assert preflight.gpu_faults(rows, cluster) == preflight.nvlink_faults(cluster) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("H100 80GB HBM3", "A100-SXM4-80GB", "GPU 3 is a NVIDIA A100-SXM4-80GB, cluster h100_512 has h100"),
        ("81559", "40960", "GPU 3 has 40.0 GiB, cluster h100_512 says 79"),
        (" 4, 0,", " 61440, 0,", "GPU 3 has 61,440 MiB in use"),
        (" 4, 0,", " 4, 12,", "GPU 3 has 12 uncorrected ECC errors"),
        ("700.00, 700.00", "400.00, 700.00", "GPU 3 is limited to 400 W of 700"),
        ("Not Active, Not", "Active, Not", "GPU 3 is slowed down by its hardware"),
        ("Active, Not Active", "Active, Active", "GPU 3 is slowed down by its driver (heat)"),
        ("16, 16", "8, 16", "GPU 3 has 8 of 16 PCIe lanes"),
    ],
)
def test_a_sick_gpu_is_named_with_what_it_has(node, cluster, old, new, said):
    node(3, old, new)
    (fault,) = preflight.gpu_faults(*seen(cluster))
    assert said in fault


def test_ecc_that_is_switched_off_is_no_fault(node, cluster):
    node(3, " 4, 0,", " 4, [N/A],")
    assert preflight.gpu_faults(*seen(cluster)) == []


def test_a_missing_gpu_and_a_missing_driver_are_counted(node, cluster, monkeypatch, tmp_path):
    del node.lines[5]
    node()
    assert preflight.gpu_faults(*seen(cluster)) == ["7 GPUs, cluster h100_512 has 8 a node"]
    monkeypatch.setenv("PATH", str(tmp_path))
    (fault,) = preflight.gpu_faults(*seen(cluster))
    assert fault == "0 GPUs, cluster h100_512 has 8 a node (nvidia-smi says nothing, or is not there)"


def test_what_a_broken_driver_says_is_passed_on(node, cluster, tmp_path):
    broken = "Failed to initialize NVML: Driver/library version mismatch"
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{broken}'\nexit 18\n")
    assert preflight.gpu_faults(*seen(cluster)) == [f"0 GPUs, cluster h100_512 has 8 a node ({broken})"]


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


@pytest.mark.parametrize(
    ("code", "changes", "said"),
    [
        (0, {}, ""),
        (0, {"gbyte_s": 90.0}, "an all-reduce over its ranks reaches 90 GB/s, 270 are needed"),
        (0, {"tflops": [700.0] * 7 + [310.0]}, "GPU 7 multiplies at 310 TFLOP/s, 494 are needed"),
        (0, {"on_gpu": False}, "torch (of CUDA 13.0) finds no GPU here"),
        (1, {}, "an all-reduce over its ranks failed: no route to host"),
    ],
)
def test_ranks_that_are_slow_or_fail_are_a_fault(monkeypatch, cluster, code, changes, said):
    facts = {"gbyte_s": 371.0, "ranks": 8, "on_gpu": True, "cuda": "13.0", "tflops": [700.0] * 8} | changes
    done = subprocess.CompletedProcess([], code, f"{json.dumps(facts)}\n", "no route to host\n")
    monkeypatch.setattr(preflight.subprocess, "run", lambda *args, **kwargs: done)
    faults, told = preflight.all_reduce_faults(cluster)
    assert (faults, told) == ([], "371.0 GB/s") if not said else said in faults[0]


def test_real_ranks_of_this_machine_that_are_slower_than_their_cluster_says_are_named():
    cluster = replace(read_cluster("cpu_2"), peak_dense_tflops=1e6, node_gbyte_s=1e6)
    faults, _ = preflight.all_reduce_faults(cluster)
    assert [fault.split(" at ")[0] for fault in faults[:2]] == ["GPU 0 multiplies", "GPU 1 multiplies"]
    assert "600000 are needed" in faults[2]


def test_a_node_with_other_packages_is_named(tmp_path, capsys):
    for host in ("n1", "n2", "n3"):
        versions = {"torch": "2.13.0", "driver": "550" if host != "n2" else "535"}
        (tmp_path / f"{host}.json").write_text(json.dumps(versions))
    assert preflight.main(["--compare", str(tmp_path)]) == preflight.REFUSED
    assert capsys.readouterr().err == "preflight: n2: driver is 535, most nodes have 550\n"
    (tmp_path / "n2.json").unlink()
    assert preflight.main(["--compare", str(tmp_path)]) == 0


@pytest.mark.parametrize("num_nodes", range(2, 9))
def test_every_node_meets_two_neighbours_and_one_at_a_time(num_nodes):
    met = Counter()
    for pairs in rounds(num_nodes):
        nodes = [node for pair in pairs for node in pair]
        assert len(set(nodes)) == len(nodes)
        met.update(frozenset(pair) for pair in pairs)
    assert set(met.values()) == {1}
    neighbours = Counter(node for pair in met for node in pair)
    assert neighbours == dict.fromkeys(range(num_nodes), 1 if num_nodes == 2 else 2)


def reports(cluster, num_nodes=5):
    """What ranks of good nodes report: their names and clocks, their rates."""
    ranks = range(num_nodes * cluster.ranks_per_node)
    here = [(f"n{rank // cluster.ranks_per_node}", 1000.0 + rank / 1000) for rank in ranks]
    return here, {(rank, number): 380.0 for rank in ranks for number in range(len(rounds(num_nodes)))}


def meeting(node, cluster, num_nodes=5):
    """(rank, round) of a node and of those that it meets."""
    for number, pairs in enumerate(rounds(num_nodes)):
        for pair in pairs:
            if node in pair:
                yield from ((m * cluster.ranks_per_node + 5, number) for m in pair)


def test_a_node_that_is_slow_to_all_is_named_and_its_neighbours_are_not(cluster):
    here, rates = reports(cluster)
    assert network_faults(here, rates, cluster) == ([], 380.0)
    rates.update(dict.fromkeys(meeting(2, cluster), 190.0))
    faults, slowest = network_faults(here, rates, cluster)
    assert faults == ["n2: rank 5 of it exchanges 190 Gbit/s with those of other nodes, 240 are needed"]
    assert slowest == 190.0


def test_a_node_that_never_answers_is_named(cluster):
    here, rates = reports(cluster)
    for key in meeting(2, cluster):
        del rates[key]
    (fault,) = network_faults(here, rates, cluster)[0]
    assert fault.startswith("n2: rank 5 of it and those of other nodes do not reach each other within 120 s")


def test_a_clock_that_is_off_is_named(cluster):
    here, rates = reports(cluster)
    here[8:16] = [("n1", clock - 30) for _, clock in here[8:16]]
    (fault,) = network_faults(here, rates, cluster)[0]
    assert fault == "n1: its clock is 30 s behind the other nodes': set it by NTP"


def test_two_nodes_on_this_machine_measure_what_lies_between_them(tmp_path):
    """Two launchers in place of two nodes, of two ranks each."""
    text = "accelerator: cpu\nnodes: 2\nranks_per_node: 2\nmemory_gib: 4\nnetwork_gbit_s: {}\n"

    def run(name, gbit_s):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"name: {name}\n{text.format(gbit_s)}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "nemo_moviegen.preflight", path, "--between", f"127.0.0.1:{port}"]
        nodes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"SLURMD_NODENAME": node},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in ("n1", "n2")
        ]
        told = [node.communicate(timeout=240) for node in nodes]
        return sorted(node.returncode for node in nodes), "".join(out + err for out, err in told)

    codes, said = run("slow", 0.001)
    assert codes == [0, 0] and "2 nodes, each rank" in said, said
    codes, said = run("fast", 1e6)
    assert codes == [0, preflight.REFUSED], "the first node tells"
    assert {line.split(":")[1] for line in said.splitlines()} == {" n1", " n2"}, said


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
