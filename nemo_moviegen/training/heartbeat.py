"""A rank's pulse: how far it is, left on its node every few seconds by a thread (heartbeat.py reads it)."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_moviegen.heartbeat import (
    DUMP_SIGNAL,
    NODE_VARIABLE,
    Beat,
    Pulse,
    Watch,
    beat_seconds,
    describe_run,
    forget_heartbeats,
    node_folder,
    stack_file,
    this_host,
    write_pulse,
)
from nemo_moviegen.stopping import HUNG

_OURS = str(Path(__file__).resolve().parents[1])


class Heartbeat(pl.Callback):
    """Stands last: a step has ended when the others have done with it. `enters` makes what stands before."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.rank, self.host, self.pid = int(os.environ.get("RANK", 0)), this_host(), os.getpid()
        self.folder, self.over, self.watch = node_folder(), None, None
        self.phase, self.step, self.moved = "starting", 0, time.time()

    def setup(self, trainer, module, stage):
        if self.rank == 0:
            forget_heartbeats(self.recipe.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stacks = stack_file(self.folder, self.rank).open("w", encoding="utf-8")
        faulthandler.register(DUMP_SIGNAL, file=self.stacks, all_threads=True)
        self.main_thread, self.over = threading.get_ident(), threading.Event()
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            describe_run(self.folder, Path(self.recipe.output).absolute(), self.recipe.hang_minutes)
            if NODE_VARIABLE not in os.environ:
                self.watch = Watch(self.folder, end=lambda: os._exit(HUNG)).start()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.enter("training")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not getattr(module, "num_done", 0):  # else micro-batches of a step that has not ended
            self.step, self.moved = getattr(module, "step", trainer.global_step), time.time()
            self.phase = "training"

    def on_train_end(self, trainer, module):
        self.enter("stopping")

    def teardown(self, trainer, module, stage):
        self._stop()

    def on_exception(self, trainer, module, exception):
        self._stop()

    def enter(self, phase):
        """Note the phase this rank is in from now on."""
        if phase != self.phase:
            self.phase, self.moved = phase, time.time()

    def enters(self, phase) -> pl.Callback:
        """A callback to stand before the one that validates, or saves."""
        return _Enters(self, phase)

    def _run(self):
        while not self.over.wait(beat_seconds(60 * self.recipe.hang_minutes)):
            with contextlib.suppress(OSError):  # the node's disk is full: better late than dead
                self._beat()

    def _beat(self):
        beat = Beat(self.rank, self.host, self.step, self.moved, self.phase)
        write_pulse(self.folder, Pulse(beat, self.pid, _collectives(), self._where()))

    def _where(self) -> str:
        """The innermost line of ours that the main thread is in."""
        frame = sys._current_frames().get(self.main_thread)
        while frame is not None:
            if frame.f_code.co_filename.startswith(_OURS):
                name = os.path.relpath(frame.f_code.co_filename, os.path.dirname(_OURS))
                return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return ""

    def _stop(self):
        if self.over is None or self.over.is_set():
            return
        self.over.set()
        if self.watch:
            self.watch.stop()
        faulthandler.unregister(DUMP_SIGNAL)
        self.stacks.close()
        for path in (stack_file(self.folder, self.rank), self.folder / f"rank-{self.rank}.json"):
            path.unlink(missing_ok=True)


class _Enters(pl.Callback):
    def __init__(self, heartbeat, phase):
        self.heartbeat, self.phase = heartbeat, phase

    @property
    def state_key(self):
        return f"{type(self).__name__}-{self.phase}"

    def on_train_batch_end(self, *_):
        self.heartbeat.enter(self.phase)

    def on_train_end(self, *_):
        self.heartbeat.enter(self.phase)


def _collectives() -> int:
    """Collectives this rank has begun, in all its process groups; torch counts them for its messages."""
    if not torch.distributed.is_initialized():
        return 0
    total = 0
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        with contextlib.suppress(AttributeError, RuntimeError):  # a backend without a count
            total += group._get_sequence_number_for_group()
    return total
