"""Whether a node is fit to train on: slurm/preflight.sh runs it on each before the ranks start.

    python -m nemo_moviegen.preflight CLUSTER             this node
    python -m nemo_moviegen.preflight --compare FOLDER    what the nodes of a job left there

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
from nemo_moviegen.heartbeat import this_host

REFUSED = 3
FOLDER_VARIABLE = "MOVIEGEN_PREFLIGHT"
"""Environment variable: the job's folder that nodes leave their versions in."""
PACKAGES = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformer-engine", "nemo_moviegen")
LINK_SHARE = 0.6
"""Of the cluster's node_gbyte_s, by an all-reduce of the node's ranks: rings reach 0.8, a lost link less."""
USED_MIB = 2048
"""Memory of a GPU that nobody trains on: its driver takes some hundred."""
FREE_GIB = {"root": 10.0, "/tmp": 1.0, "/dev/shm": 0.25}
SLOWDOWN = ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown")
"""Its name from driver 535 on, and before."""
GPU_FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "power.limit",
    "power.default_limit",
    "driver_version",
)


def main(arguments=None) -> int:
    """Check what was asked for; returns 0, or 3 after a line for each fault."""
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__.splitlines()[0])
    parser.add_argument("cluster", nargs="?", help="a name of recipes/clusters, or a YAML file")
    parser.add_argument("--compare", metavar="FOLDER", help="compare what nodes left there")
    options = parser.parse_args(arguments)
    if options.compare:
        faults = different_nodes(options.compare)
        return _told(faults, "all nodes have the same packages and driver")
    try:
        cluster = read_cluster(options.cluster or "")
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    faults, facts = check_node(cluster)
    if folder := os.environ.get(FOLDER_VARIABLE):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{this_host()}.json").write_text(json.dumps(facts["versions"]), encoding="utf-8")
    host = this_host()
    told = f"{host}: fit: {cluster.ranks_per_node} ranks of {cluster.accelerator}, all-reduce {facts['link']}"
    return _told([f"{host}: {fault}" for fault in faults], told)


def check_node(cluster) -> tuple[list[str], dict]:
    """(faults, {"versions": {package: version}, "link": what the all-reduce reached}) of this node."""
    versions = {name: _version(name) for name in PACKAGES}
    faults = disk_faults(cluster.root)
    if cluster.accelerator != "cpu":
        rows = gpu_rows()
        faults += gpu_faults(rows, cluster) + nvlink_faults(cluster) + card_faults(cluster)
        versions["driver"] = rows[0]["driver_version"] if rows else ""
    elif (cores := len(os.sched_getaffinity(0))) < cluster.ranks_per_node:
        faults.append(f"{cores} cores for {cluster.ranks_per_node} ranks: a rank needs one of its own")
    found, link = [], "not measured"
    if not faults:  # ranks on a sick node would only wait
        found, link = all_reduce_faults(cluster)
    return faults + found, {"versions": versions, "link": link}


def gpu_rows() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, by field; [] where it is not there or fails."""
    for slowdown in SLOWDOWN:
        query, fields = f"--query-gpu={','.join(GPU_FIELDS)},{slowdown}", (*GPU_FIELDS, "slowdown")
        out = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
        lines = [[value.strip() for value in line.split(",")] for line in out.splitlines()]
        rows = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
        if rows:
            return rows
    return []


def gpu_faults(rows, cluster) -> list[str]:
    """What is wrong with the GPUs of the node."""
    wanted, faults = cluster.ranks_per_node, []
    if len(rows) != wanted:
        faults.append(f"{len(rows)} GPUs, cluster {cluster.name} has {wanted} a node")
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
        if row["slowdown"] == "Active":
            faults.append(f"{gpu} is slowed down by its hardware (heat or power): look at its cooling")
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
        try:
            probe = path / f".preflight-{this_host()}-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            free = shutil.disk_usage(path).free / 2**30
        except OSError as error:
            faults.append(f"{path} can not be written ({error.strerror})")
            continue
        if free < needed:
            faults.append(f"{path} has {free:.2f} GiB left, {needed:g} are needed")
    return faults


def all_reduce_faults(cluster) -> tuple[list[str], str]:
    """(faults, what was reached) of an all-reduce over the node's ranks, started as training starts them."""
    ranks = f"--nproc-per-node={cluster.ranks_per_node}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
    command += ["-m", "nemo_moviegen.preflight_link"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return ["its ranks do not reach each other: an all-reduce took more than 180 s"], "-"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"an all-reduce over its ranks failed: {last}"], "-"
    reached = json.loads(done.stdout.strip().splitlines()[-1])["gbyte_s"]
    needed = LINK_SHARE * cluster.node_gbyte_s
    if cluster.ranks_per_node > 1 and reached < needed:
        return [f"an all-reduce over its ranks reaches {reached:.0f} GB/s, {needed:.0f} are needed"], "-"
    return [], f"{reached:.1f} GB/s"


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
    if not faults:
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
