"""The Lightning callback that saves a run while it trains and puts it back where it was."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_moviegen.training.checkpoint import (
    CHECKPOINTS,
    PARTIAL,
    STATE,
    TENSORS,
    checkpoints,
    read_state,
    remove,
    superfluous,
    tidy,
)
from nemo_moviegen.training.record import set_learning_rate
from nemo_moviegen.training.starting import start_from
from nemo_moviegen.training.state import TrainingState, pieces
from nemo_moviegen.training.storage import BackgroundWriter, check_space, write_folder, write_json


class Checkpoints(pl.Callback):
    """checkpoints/step=N every `save_every` steps and at the end, written while training goes on.

    Starts the run from `own`, a checkpoint of its own, or from the weights of `other`.
    """

    def __init__(self, recipe, own=None, other=None):
        self.recipe, self.own, self.other = recipe, own, other
        self.folder = Path(recipe.output, CHECKPOINTS)
        self.guard = None
        """The run's `SkipBadSteps`: what it has seen is saved too, and no bad step is."""
        self.validation = None
        """The run's `ValidationLoss`: what it measured of the step that has just ended decides what stays."""
        self.plateau = None
        """The run's `PlateauDetector`, where the learning rate follows the validation loss."""
        self.data = None
        """`BatchOrder.contents` of the run's samples: a checkpoint goes on only where they are the same."""
        self.is_due, self.saved_step = False, -1

    def on_fit_start(self, trainer, module):
        chunk = trainer.strategy.megatron_parallel[0].module
        optimizer = trainer.strategy.optimizers[0].mcore_optimizer
        self.state = TrainingState(chunk, optimizer, self.recipe.ema_decay)
        self.writer = BackgroundWriter()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            tidy(self.recipe.output)
        if self.own:
            self._resume(trainer)
        elif self.other:
            told = start_from(self.state, self.other, self.recipe)
            if trainer.is_global_zero:
                print("\n  ".join([f"{self.recipe.name} starts from {self.other}:", *told]), flush=True)

    def _resume(self, trainer):
        told = self.read(self.own)
        _check_data(self.own, told.get("data"), self.data)
        if self.guard and "guard" in told:
            self.guard.detector.load_state(told["guard"])
        if self.plateau:
            self.plateau.load_state(told.get("plateau", {}))
        self.saved_step = told["step"]
        _start_at(trainer, told["step"])

    def read(self, folder) -> dict:
        """Weights, moments and EMA from a checkpoint; returns its state.json."""
        told = read_state(folder)
        if told["optimizer_steps"] is None:
            raise ValueError(f"{folder} holds weights alone: start a new run from it with init_from")
        self.state.read(folder / TENSORS, told["optimizer_steps"])
        return told

    def roll_back(self, trainer) -> str:
        """Weights, moments and EMA of the last checkpoint; step, schedule and data go on.

        Returns its name, "" where there is none yet.
        """
        self.writer.wait()
        torch.distributed.barrier(self.writer.group)  # it exists for all ranks once rank 0 has renamed it
        found = checkpoints(self.recipe.output)
        if not found:
            return ""
        self.read(found[max(found)])
        return found[max(found)].name

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.state.update_ema()
        self.writer.poll()
        self.is_due |= self.recipe.saves_at(trainer.global_step)
        if self.is_due and not (self.guard and self.guard.reason):
            self.save(trainer.global_step)

    def on_train_end(self, trainer, module):
        if self.recipe.save_every and self.saved_step != trainer.global_step:
            self.save(trainer.global_step)
        self.writer.wait()
        torch.distributed.barrier(self.writer.group)  # a launcher ends the others once one has ended

    def save(self, step):
        """Copy this rank's share and write it in the background."""
        tensors, owners = self.state.tensors(replica=0)
        check_space(self.folder, sum(t.nbytes for t in tensors.values()))
        copies = self.writer.copy(tensors)
        copied = {name: copies[name] for name in tensors}
        told = {
            "step": step,
            "recipe": self.recipe.name,
            "optimizer_steps": self.state.optimizer_steps,
            "validation_loss": self.validation.last_loss if self.validation else None,
        }
        if self.guard:
            told["guard"] = self.guard.detector.state()
        if self.plateau:
            told["plateau"] = self.plateau.state()
        if self.data:
            told["data"] = self.data
        self.writer.start(lambda group: self._write(group, step, pieces(copied, owners), told))
        self.is_due, self.saved_step = False, step

    def _write(self, group, step, parts, told):
        folder = self.folder / f"step={step}"
        partial = folder.with_name(folder.name + PARTIAL)
        write_folder(partial / TENSORS, parts, group)
        if torch.distributed.get_rank() == 0:
            write_json(partial / STATE, told)
            os.replace(partial, folder)
            self._remove_old()

    def _remove_old(self):
        found = checkpoints(self.recipe.output)
        losses = {step: read_state(folder)["validation_loss"] for step, folder in found.items()}
        kept = self.recipe
        for step in superfluous(
            losses, keep_last=kept.keep_last, keep_every=kept.keep_every, keep_best=kept.keep_best
        ):
            remove(found[step])


def _check_data(folder, saved, data):
    """ValueError where latents were added or taken away: the order of samples would be another."""
    if not saved or not data or saved == data:
        return
    was, now = (sum(row[-1] for row in rows) for rows in (saved, data))
    raise ValueError(
        f"{folder}: its {was} samples are now {now}, or of other shapes; the run would repeat some and skip "
        "others. Bring the old latents back, or start a new run from these weights: output=NEW init_from=this"
    )


def _start_at(trainer, step):
    """Make Lightning count from `step`: its loops, and the learning rate, a function of the step and of what
    the validation loss has left of it."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.ready = step
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    for count in (loop.batch_progress.total, loop.batch_progress.current):
        count.ready = count.started = count.processed = count.completed = step
    loop._batches_that_stepped = step
    set_learning_rate(trainer, step)
