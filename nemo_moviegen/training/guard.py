"""Skips the optimiser step of bad training steps, and rolls back after several of them (`spikes.Guard`).

A skipped step leaves weights, moments and the optimiser's step counts as they are, bit for bit; the learning
rate schedule and the data go on. Every rank decides by itself: the loss and the gradient norm it decides by
are already reduced over all ranks.
"""

import json
from pathlib import Path

import lightning.pytorch as pl

from nemo_moviegen.spikes import SpikeDetector
from nemo_moviegen.training.record import open_after

SKIPPED_FILE = "skipped.jsonl"
"""In the run folder, a line a skipped step: step (as in metrics.jsonl), sample_ids of all ranks, loss,
grad_norm and reason; after a rollback a line with its step and rolled_back_to, the name of the checkpoint."""


class SkipBadSteps(pl.Callback):
    """`rollback(trainer)` loads weights, moments and EMA of the last checkpoint on all ranks, leaving step
    count, schedule and data where they are, and returns its name.

    RuntimeError on every rank where a rollback is due and `guard.max_rollbacks` does not allow it.
    """

    def __init__(self, recipe, data, rollback):
        self.recipe, self.data, self.rollback = recipe, data, rollback
        self.detector = SpikeDetector(recipe.guard)
        self.loss = self.grad_norm = None
        """Of the last step, reduced over all ranks."""
        self.reason = ""
        """Why the last step was skipped, "" if it was not."""

    def on_train_start(self, trainer, module):
        self.trainer = trainer
        self._watch(trainer.optimizers[0].mcore_optimizer)
        if trainer.is_global_zero:
            open_after(Path(self.recipe.output, SKIPPED_FILE), trainer.global_step).close()

    def on_megatron_reduce_microbatches_end(self, reduced):
        """NeMo's event after a step's forward and backward passes; `reduced` is the loss of all ranks."""
        self.loss = float(reduced)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.reason:
            self._record(trainer, self._skipped(trainer.global_step))
            if self.detector.wants_rollback():
                self._record(trainer, {"rolled_back_to": self._roll_back(trainer)})

    def _watch(self, optimizer):
        """Have megatron's optimizer ask before it applies gradients whose norm it has just taken."""
        apply = optimizer.step_with_ready_grads

        def remember(take_norm):
            def taken(*args):
                self.grad_norm = take_norm(*args)
                return self.grad_norm

            return taken

        def step_with_ready_grads():
            kind = self.data.order.kind(self.trainer.global_step)
            self.reason = self.detector.judge(kind, self.loss, self.grad_norm)
            return False if self.reason else apply()

        # a chain of optimizers takes its norm by the first, a single one (of Megatron FSDP) by the second
        optimizer.get_grad_norm = remember(optimizer.get_grad_norm)
        optimizer.clip_grad_norm = remember(optimizer.clip_grad_norm)
        optimizer.step_with_ready_grads = step_with_ready_grads

    def _roll_back(self, trainer):
        guard = self.recipe.guard
        said = (
            f"{self.recipe.name}: {self.detector.in_a_row} steps in a row up to step {trainer.global_step} "
            f"were bad, the last because its {self.reason}"
        )
        if self.detector.rollbacks >= guard.max_rollbacks:
            raise RuntimeError(
                f"{said}; {guard.max_rollbacks} rollbacks without {guard.window} good steps between them did "
                f"not help: look at the samples in {self.recipe.output}/{SKIPPED_FILE}, then start again "
                "with a lower optim.learning_rate, a smaller optim.clip_grad, or, if none was bad, a larger "
                "guard.spike_mads"
            )
        checkpoint = self.rollback(trainer)
        self.detector.rolled_back()
        if trainer.is_global_zero:
            print(f"{said}; training goes on from the weights of {checkpoint}", flush=True)
        return checkpoint

    def _skipped(self, step):
        rows, _ = self.data.order.batch(step - 1)
        return {
            "sample_ids": self.data.reader.sample_ids[rows].tolist(),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "reason": self.reason,
        }

    def _record(self, trainer, values):
        if trainer.is_global_zero:
            with Path(self.recipe.output, SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")
