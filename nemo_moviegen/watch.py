"""A command run with an eye on the memory of all its processes."""

import os
import subprocess
import time

SAMPLE_SECONDS = 0.25
"""How often it is looked at."""


def run_watched(command, threads=1) -> tuple[int, float, int]:
    """(exit code, seconds, peak bytes resident in all its processes) of a command on this terminal.

    Each of its processes computes with that many threads.
    """
    started, peak_bytes = time.perf_counter(), 0
    # warnings of foreign packages would bury what a stage says
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment)
    try:
        while True:
            try:
                code = process.wait(SAMPLE_SECONDS)
                return code, time.perf_counter() - started, peak_bytes
            except subprocess.TimeoutExpired:
                peak_bytes = max(peak_bytes, resident_bytes(process.pid))
    finally:
        if process.poll() is None:
            _end(process)


def resident_bytes(pid) -> int:
    """Resident memory of a process and all below it; pages they share count once for each."""
    import psutil

    total = 0
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # ended meanwhile
    return total


def _tree(pid):
    import psutil

    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _end(process):
    """After Ctrl-C the stage has had the signal too and may be saving: wait, then end what is left of it."""
    import psutil

    tree = _tree(process.pid)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.terminate()
    _, left = psutil.wait_procs(tree, timeout=5)
    for straggler in left:
        straggler.kill()
