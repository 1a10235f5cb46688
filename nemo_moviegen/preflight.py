"""Whether a node is fit to train on: slurm/preflight.sh runs it on each before the ranks start.

    python -m nemo_moviegen.preflight CLUSTER                       this node
    python -m nemo_moviegen.preflight --compare FOLDER              what the nodes of a job left there
    python -m nemo_moviegen.preflight CLUSTER --between HOST:PORT   what lies between them; on all at once

A fault is a line that names the node, what was found and what is needed; the exit code is then 3. A sick GPU
or a slow link holds up all ranks of a run, and a rank that dies of it an hour later costs more than this.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.heartbeat import node_name
from nemo_moviegen.writable import why_not_writable

REFUSED = 3
FOLDER_VARIABLE = "MOVIEGEN_PREFLIGHT"
"""Environment variable: the job's folder that nodes leave their versions in."""
PACKAGES = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformer-engine", "nemo_moviegen")
LINK_SHARE = 0.6
"""Of the cluster's node_gbyte_s, by an all-reduce of the node's ranks: rings reach 0.8, a lost link less."""
USED_MIB = 2048
"""Memory of a GPU that nobody trains on: its driver takes some hundred."""
COMPUTE_SHARE = 0.5
"""Of the cluster's peak_dense_tflops, by a product of large matrices: good GPUs reach 0.65 and more."""
FREE_GIB = {"root": 10.0, "/tmp": 1.0, "/dev/shm": 0.25}
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")
"""What a driver calls them from 535 on, and before."""
SLOWDOWNS = {"hw_slowdown": "hardware (heat or power)", "sw_thermal_slowdown": "driver (heat)"}
GPU_FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "power.limit",
    "power.default_limit",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "driver_version",
)


def main(arguments=None) -> int:
    """Check what was asked for; returns 0, or 3 after a line for each fault."""
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__.splitlines()[0])
    parser.add_argument("cluster", nargs="?", help="a name of recipes/clusters, or a YAML file")
    parser.add_argument("--compare", metavar="FOLDER", help="compare what nodes left there")
    parser.add_argument(
        "--between", metavar="HOST:PORT", help="measure what lies between the nodes; they meet there"
    )
    options = parser.parse_args(arguments)
    if options.compare:
        faults = different_nodes(options.compare)
        return _told(faults, "all nodes have the same packages and driver")
    try:
        cluster = read_cluster(options.cluster or "")
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    if options.between:
        return _told(*between_nodes(cluster, options.cluster, options.between))
    faults, facts = check_node(cluster)
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{node_name()}.json").write_text(json.dumps(facts["versions"]), encoding="utf-8")
    host = node_name()
    told = f"{host}: fit: {cluster.ranks_per_node} ranks of {cluster.accelerator}, all-reduce {facts['link']}"
    return _told([f"{host}: {fault}" for fault in faults], told)


def check_node(cluster) -> tuple[list[str], dict]:
    """(faults, {"versions": {package: version}, "link": what the all-reduce reached}) of this node."""
    versions = {name: _version(name) for name in PACKAGES}
    faults = disk_faults(cluster.root)
    if cluster.accelerator != "cpu":
        rows, said = gpu_rows()
        faults += gpu_faults(rows, cluster, said) + nvlink_faults(cluster) + card_faults(cluster)
        versions["driver"] = rows[0]["driver_version"] if rows else ""
    elif (cores := len(os.sched_getaffinity(0))) < cluster.ranks_per_node:
        faults.append(f"{cores} cores for {cluster.ranks_per_node} ranks: a rank needs one of its own")
    found, link = [], "not measured"
    if not faults:  # ranks on a sick node would only wait
        found, link = all_reduce_faults(cluster)
    return faults + found, {"versions": versions, "link": link}


def gpu_rows() -> tuple[list[dict[str, str]], str]:
    """(what nvidia-smi says of each GPU, by field; [] where it fails, what it said instead)."""
    fields, said = (*GPU_FIELDS, *SLOWDOWNS), ""
    for reasons in REASONS:
        query = ",".join([*GPU_FIELDS, *(f"{reasons}.{slowdown}" for slowdown in SLOWDOWNS)])
        out = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
        lines = [[value.strip() for value in line.split(",")] for line in out.splitlines()]
        rows = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
        if rows:
            return rows, ""
        said = next((line.strip() for line in out.splitlines() if line.strip()), said)
    return [], said or "nvidia-smi says nothing, or is not there"


def gpu_faults(rows, cluster, said="") -> list[str]:
    """What is wrong with the GPUs of the node; `said` is why there are no rows."""
    wanted, faults = cluster.ranks_per_node, []
    if len(rows) != wanted:
        why = f" ({said})" if said else ""
        faults.append(f"{len(rows)} GPUs, cluster {cluster.name} has {wanted} a node{why}")
    for row in rows:
        gpu = f"GPU {row['index']}"
        if cluster.accelerator.lower() not in row["name"].lower():
            faults.append(f"{gpu} is a {row['name']}, cluster {cluster.name} has {cluster.accelerator}")
        if _number(row["memory.total"], 1e9) / 1024 < cluster.memory_gib:
            gib = _number(row["memory.total"]) / 1024
            faults.append(f"{gpu} has {gib:.1f} GiB, cluster {cluster.name} says {cluster.memory_gib:g}")
        if (used := _number(row["memory.used"])) > USED_MIB:
            faults.append(f"{gpu} has {used:,.0f} MiB in use: another process is on it (nvidia-smi names it)")
        if errors := _number(row["ecc.errors.uncorrected.volatile.total"]):
            faults.append(f"{gpu} has {errors:.0f} uncorrected ECC errors: reset or replace it")
        for slowdown, by in SLOWDOWNS.items():
            if row[slowdown] == "Active":
                faults.append(f"{gpu} is slowed down by its {by}: look at its cooling")
        lanes, most = _number(row["pcie.link.width.current"]), _number(row["pcie.link.width.max"])
        if 0 < lanes < most:
            faults.append(f"{gpu} has {lanes:.0f} of {most:.0f} PCIe lanes: seat or replace it")
        limit, default = _number(row["power.limit"]), _number(row["power.default_limit"])
        if limit < 0.95 * default:
            faults.append(f"{gpu} is limited to {limit:.0f} W of {default:.0f}: nvidia-smi --power-limit")
    return faults


def nvlink_faults(cluster) -> list[str]:
    """Links between the GPUs of the node that are down."""
    if not cluster.node_gbyte_s or cluster.ranks_per_node == 1:
        return []
    down = gpu = ""
    for line in _output("nvidia-smi", "nvlink", "--status").splitlines():
        if line.startswith("GPU "):
            gpu = line.split(":")[0]
        elif "inactive" in line.lower():
            down += f"{', ' if down else ''}{gpu} {line.split(':')[0].strip()}"
    return [f"NVLink is down: {down}"] if down else []


def card_faults(cluster, folder="/sys/class/infiniband") -> list[str]:
    """Network cards that do not carry what the cluster's file says."""
    if cluster.nodes == 1 or not cluster.network_gbit_s:
        return []
    rates = [_rate(port) for port in Path(folder).glob("*/ports/*")]
    wanted = cluster.network_gbit_s * cluster.ranks_per_node
    if sum(rates) >= 0.99 * wanted:
        return []
    up = sum(rate > 0 for rate in rates)
    return [
        f"{up} of {len(rates)} network ports are active with {sum(rates):.0f} Gbit/s together, cluster "
        f"{cluster.name} says {cluster.network_gbit_s:g} for each of {cluster.ranks_per_node} GPUs"
    ]


def disk_faults(root) -> list[str]:
    """Folders that are missing, full, or not to be written."""
    faults = []
    for folder, needed in FREE_GIB.items():
        path = Path(root if folder == "root" else folder)
        if problem := why_not_writable(path):
            faults.append(f"{path} can not be written ({problem})")
        elif (free := shutil.disk_usage(path).free / 2**30) < needed:
            faults.append(f"{path} has {free:.2f} GiB left, {needed:g} are needed")
    return faults


def all_reduce_faults(cluster) -> tuple[list[str], str]:
    """(faults, what was reached) of an all-reduce over the node's ranks, started as training starts them.

    Each also multiplies matrices, which shows a GPU that is slow for whatever reason.
    """
    found, said = _on_ranks(cluster, ["--standalone"], "preflight_link", seconds=180)
    if not found:
        return [f"an all-reduce over its ranks failed: {said}"], "-"
    if cluster.accelerator != "cpu" and not found["on_gpu"]:
        return [f"torch (of CUDA {found['cuda']}) finds no GPU here: its CUDA and the driver do not fit"], "-"
    needed, faults = COMPUTE_SHARE * cluster.peak_dense_tflops, []
    for gpu, tflops in enumerate(found["tflops"]):
        if tflops < needed:
            faults.append(
                f"GPU {gpu} multiplies at {tflops:.3g} TFLOP/s, {needed:.0f} are needed: see its clocks"
            )
    reached, needed = found["gbyte_s"], LINK_SHARE * cluster.node_gbyte_s
    if cluster.ranks_per_node > 1 and reached < needed:
        faults.append(f"an all-reduce over its ranks reaches {reached:.0f} GB/s, {needed:.0f} are needed")
    return faults, f"{reached:.1f} GB/s"


def between_nodes(cluster, name, endpoint) -> tuple[list[str], str]:
    """(faults, what to say without any) of an exchange between all nodes, known on the first alone.

    Every node of the job calls it with the same `endpoint`, where they meet.
    """
    meet = [f"--nnodes={cluster.nodes}", "--rdzv-backend=c10d", "--rdzv-id=preflight"]
    meet += [f"--rdzv-endpoint={endpoint}"]
    found, said = _on_ranks(cluster, meet, "preflight_network", name, seconds=900)
    if said:
        return [f"{node_name()}: an exchange with the other nodes failed: {said}"], ""
    if not found:  # not the first
        return [], ""
    return found["faults"], f"{cluster.nodes} nodes, each rank {found['gbit_s']:.3g} Gbit/s or more to others"


def _on_ranks(cluster, meet, program, *arguments, seconds) -> tuple[dict, str]:
    """({} or the JSON that `program` printed last on this node's ranks, why it failed or "")."""
    command = [sys.executable, "-m", "torch.distributed.run", *meet]
    command += [f"--nproc-per-node={cluster.ranks_per_node}", "-m", f"nemo_moviegen.{program}", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"not done within {seconds} s"
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or ["no message"])[-1]
    printed = done.stdout.strip().splitlines()
    return json.loads(printed[-1]) if printed else {}, ""


def different_nodes(folder) -> list[str]:
    """Nodes whose packages or driver are not those of most nodes."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    faults = []
    for name in sorted({name for versions in found.values() for name in versions}):
        (most, _), *others = Counter(v.get(name, "") for v in found.values()).most_common()
        if others:
            odd = [
                f"{host}: {name} is {v.get(name) or 'missing'}"
                for host, v in found.items()
                if v.get(name, "") != most
            ]
            faults += [f"{line}, most nodes have {most or 'none'}" for line in odd]
    return faults


def _told(faults, fit) -> int:
    for fault in faults:
        print(f"preflight: {fault}", file=sys.stderr)
    if not faults and fit:
        print(f"preflight: {fit}")
    return REFUSED if faults else 0


def _output(*command) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _number(text, otherwise=0.0) -> float:
    """What nvidia-smi prints as a number; `otherwise` for [N/A]."""
    try:
        return float(text)
    except ValueError:
        return otherwise


def _rate(port) -> float:
    """Gbit/s of a port that is active, else 0."""
    try:
        is_active = "ACTIVE" in (port / "state").read_text()
        return _number((port / "rate").read_text().split()[0]) if is_active else 0.0
    except (OSError, IndexError):
        return 0.0


def _version(package) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
