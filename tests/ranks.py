"""Run a function on gloo ranks: forked, so torch and megatron are imported once; file store, so no ports."""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

MEETINGS = 3


class NoMeeting(Exception):
    """On a loaded machine gloo now and then closes a connection between ranks that are just starting."""


def run_on_ranks(fn, *args, world_size=2, timeout_seconds=120):
    """Call fn(*args) on every rank; results in rank order.

    Raises AssertionError with the traceback of the first rank that fails (the others, stuck in a collective,
    are killed), or with the stacks of the ranks still running when the time is up.
    """
    for _ in range(MEETINGS):
        with contextlib.suppress(NoMeeting):
            return _run_once(fn, args, world_size, timeout_seconds)
    raise AssertionError(f"{world_size} gloo ranks did not find each other in {MEETINGS} attempts")


def _run_once(fn, args, world_size, timeout_seconds):
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world_size):
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=_rank_main, args=(rank, world_size, Path(folder), send, fn, args))
            process.start()
            send.close()
            ranks.append(process)
            pipes.append(receive)
        results = {}
        try:
            _collect(results, pipes, ranks, Path(folder), time.monotonic() + timeout_seconds)
        finally:
            for process in ranks:
                process.join(timeout=10 if len(results) == world_size else 0)
                _kill_group(process)
    return [results[rank] for rank in range(world_size)]


def _collect(results, pipes, ranks, folder, deadline):
    waiting = dict(enumerate(pipes))
    while waiting:
        left = max(0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(waiting.values(), timeout=left)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} still running\n" + _stacks(folder, ranks, waiting))
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                succeeded, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            if succeeded is None:
                raise NoMeeting
            if not succeeded:
                raise AssertionError(f"rank {rank} of {len(ranks)} failed\n{value}")
            results[rank] = value


def _rank_main(rank, world_size, folder, send, fn, args):
    os.setpgrp()  # what this rank starts (megatron's checkpoint writer) ends with it
    torch.set_num_threads(1)
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115, open for as long as the rank lives
    faulthandler.register(signal.SIGHUP, file=stack, all_threads=True)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    except RuntimeError:
        send.send_bytes(pickle.dumps((None, None)))
        return
    try:
        # plain pickle: a pipe's own would share tensors through a rank that is about to end
        send.send_bytes(pickle.dumps((True, fn(*args))))
        dist.destroy_process_group()
    except BaseException:
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _stacks(folder, ranks, waiting):
    for rank in waiting:
        os.kill(ranks[rank].pid, signal.SIGHUP)
    time.sleep(0.5)
    return "\n".join(f"--- rank {r}\n" + (folder / f"stack{r}").read_text() for r in waiting)
