"""Several ways to do the same work, timed in turns, each in a process of its own: rates, CPU time, memory.

round 1:  ours  plain  one thread        every way once, then again in another order: what else the
round 2:  plain  one thread  ours        machine does falls on all of them, and ratios are taken
round 3:  one thread  ours  plain        within a round
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way, once."""

    seconds: float
    cpu_seconds: float
    """Of the process and all it started."""
    peak_mib: float
    """Resident, summed over the process and all it started; pages they share count once (Linux's PSS)."""
    counts: dict
    """What was done in that time: {"samples": 64, "frames": 4096}."""


def measure(ways, rounds=5, warm_up=1) -> tuple[dict, dict]:
    """({name: [Measured, one a round]}, {name: why it could not run}) of `ways`, taken in turns.

    `ways` maps a name to a function without arguments that returns an iterator over counts, one dict a batch,
    such as {"samples": 4, "frames": 64}. It is called in a forked process; its first `warm_up` batches are
    not timed. A way that raises is left out from then on, and its error is told.
    """
    measured, failed = {name: [] for name in ways}, {}
    names = list(ways)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            if name in failed:
                continue
            found = _in_child(ways[name], warm_up)
            if isinstance(found, str):
                failed[name] = found
            else:
                measured[name].append(found)
    return {name: found for name, found in measured.items() if name not in failed}, failed


def summarise(measured, reference, units=("samples", "frames")) -> list[dict]:
    """One row a way: name, medians of UNIT_per_second, cpu_seconds_per_sample, peak_mib, and `ratio`.

    `ratio` is the median over rounds of this way's samples a second to that of the way named `reference`.
    """
    rows = []
    for name, found in measured.items():
        rates = {unit: [one.counts[unit] / one.seconds for one in found] for unit in units}
        base = [one.counts["samples"] / one.seconds for one in measured[reference]]
        per_sample = [one.cpu_seconds / one.counts["samples"] for one in found]
        ratios = [own / other for own, other in zip(rates["samples"], base, strict=True)]
        rows.append(
            {"name": name}
            | {f"{unit}_per_second": statistics.median(rates[unit]) for unit in units}
            | {"cpu_seconds_per_sample": statistics.median(per_sample)}
            | {"peak_mib": statistics.median(one.peak_mib for one in found)}
            | {"ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios]}
        )
    return rows


def table(title, rows, failed=()):
    """A rich table of `summarise`'s rows, then a line for each way that could not run, with its reason."""
    units = [key for key in rows[0] if key.endswith("_per_second")] if rows else []
    rates = [unit.replace("_per_second", "/s") for unit in units]
    made = empty_table(title, "way", *rates, "CPU ms/sample", "peak MiB", "ratio")
    for row in rows:
        numbers = [f"{row[unit]:,.1f}" for unit in units]
        made.add_row(
            row["name"],
            *numbers,
            f"{row['cpu_seconds_per_sample'] * 1e3:,.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    return with_failures(made, failed)


def empty_table(title, first, *headings):
    """A rich table of names in the column `first` and numbers in the others."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    made.add_column(first)
    for heading in headings:
        made.add_column(heading, justify="right")
    return made


def with_failures(made, failed):
    """The table with a line for each way that could not run, {name: reason}."""
    for name in failed:
        made.add_row(name, f"did not run: {failed[name]}")
    return made


def growth_mib(before) -> float:
    """By how many MiB the resident memory of this process exceeded at most `before` bytes since its start."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20  # Linux: KiB


def environment(*packages) -> dict:
    """Machine, load, time and versions (of `packages` too): what a timing cannot be read without."""
    versions = {}
    for package in ("torch", "numpy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": versions,
    }


def write_json(path, content) -> Path:
    """`content` as JSON at `path`, readable by people."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def resident_mib(process) -> float:
    """Memory of a psutil process and all it started, in MiB; pages they share count once."""
    import psutil

    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended meanwhile
    return total / 2**20


def _in_child(way, warm_up):
    """Measured, or the reason why not."""
    import psutil

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(way, warm_up, sender))
    child.start()
    sender.close()
    peak = 0.0
    try:
        process = psutil.Process(child.pid)
        while True:
            peak = max(peak, resident_mib(process))
            if receiver.poll(_POLL_SECONDS):
                break
        found = receiver.recv()
    except (EOFError, psutil.NoSuchProcess):
        child.join()
        return f"its process ended with code {child.exitcode}"
    child.join()
    return found if isinstance(found, str) else Measured(peak_mib=peak, **found)


def _work(way, warm_up, sender):
    try:
        batches = iter(way())
        for _ in range(warm_up):
            next(batches)
        counts, started, cpu = {}, time.perf_counter(), _cpu_seconds()
        for batch in batches:
            # while the workers live: their times are lost with them
            seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu
            for unit, number in batch.items():
                counts[unit] = counts.get(unit, 0) + number
        if not counts:
            raise ValueError(f"no batch is left to time after {warm_up} to warm up")
        sender.send({"seconds": seconds, "cpu_seconds": cpu_seconds, "counts": counts})
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}"[:300])


def _cpu_seconds():
    import psutil

    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
