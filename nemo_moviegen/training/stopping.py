"""Ends a run early, on all ranks at the same step and with everything saved, when one of them is asked to.

Ranks agree by one all-reduce of one number a step. Lightning's own answer to SIGTERM, to leave the loop on
the rank that got it, would leave the others waiting; its handler is replaced while the run trains.
"""

import contextlib
import signal
import threading

import lightning.pytorch as pl
import torch

from nemo_moviegen.stopping import SIGNALS, STOP_FILE, TO_GO_ON, Stopped, forget_stop, stop_asked


class StopWhenAsked(pl.Callback):
    """Sets `trainer.should_stop`; stands before the callback that saves, which saves because of it."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.guard = None
        """The run's `SkipBadSteps`: after a bad step the run goes on, to a good one or to a rollback."""
        self.signal_name = ""
        self.code, self.step, self.said = 0, 0, ""

    def on_train_start(self, trainer, module):
        self._listen()  # Lightning has put its own handler before ours
        if trainer.received_sigterm:
            self.signal_name = "SIGTERM"
            trainer._signal_connector.received_sigterm = False
        if trainer.is_global_zero:
            forget_stop(self.recipe.output)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if getattr(module, "num_done", 0):  # micro-batches of a step that has not ended
            return
        step = getattr(module, "step", trainer.global_step)
        code = self._agreed(trainer)
        if code and step < self.recipe.num_steps and not (self.guard and self.guard.reason):
            self.code, self.step = code, step
            trainer.should_stop = True

    def on_train_end(self, trainer, module):
        if self.code and torch.distributed.is_initialized():
            torch.distributed.barrier()  # no rank ends before what rank 0 saves is whole

    def _agreed(self, trainer) -> int:
        """The largest exit code any rank was asked for; 0 = go on."""
        asked, who = (TO_GO_ON, self.signal_name) if self.signal_name else (0, "")
        if trainer.is_global_zero:
            asked, who = max((asked, who), stop_asked(self.recipe.output))
        self.said = who
        if trainer.world_size == 1:
            return asked
        agreed = torch.tensor(asked, dtype=torch.int32, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        return int(agreed)

    @contextlib.contextmanager
    def listening(self):
        """While this lasts, signals of `SIGNALS` ask for a stop and end nothing. In the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal_name = signal.Signals(number).name


def fit(trainer, module, data):
    """`trainer.fit` of a trainer with a `StopWhenAsked`; raises Stopped on all ranks where one was asked."""
    stopping = next(callback for callback in trainer.callbacks if isinstance(callback, StopWhenAsked))
    with stopping.listening():
        trainer.fit(module, data)
    if stopping.code:
        recipe = stopping.recipe
        again = "goes on from there when it is started again"
        if stopping.code != TO_GO_ON:
            again += f" (which removes {STOP_FILE})"
        raise Stopped(
            f"{recipe.name} stopped after step {stopping.step} of {recipe.num_steps} "
            f"({stopping.said or 'a signal to another rank'}); its checkpoint is written and it {again}",
            stopping.code,
        )
