"""What a run tells while it runs.

metrics.jsonl and TensorBoard, a line a step        unit
---------------------------------------------------- ----------------------------------------------------
train/loss                                           mean squared velocity error over real tokens
train/learning_rate                                  -
train/grad_norm                                      norm over all parameters before clipping
train/is_image                                       1 for an image iteration
train/skipped                                        bad steps so far whose update was left out
validation/loss                                      as train/loss, of held-out samples (validation.py)
validation/loss_t0.00-0.25, ... _t0.75-1.00          of it, that of a quarter of time; 0 is noise
validation/seconds                                   wall time of measuring it, no part of the step's
speed/step_seconds                                   wall time of the whole step
speed/data_seconds                                   of it, waiting for the loader
speed/tokens_per_second                              video tokens of the global batch, all ranks
"""

import time

import lightning.pytorch as pl

from nemo_moviegen.training.record import RunRecord


class Metrics(pl.Callback):
    """Writes the table above for every step and moves the progress bar; rank 0 only."""

    def __init__(self, recipe, data, guard, validation):
        self.recipe, self.data, self.guard, self.validation = recipe, data, guard, validation

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            name, folder = self.recipe.name, self.recipe.output
            self.record = RunRecord(name, folder, trainer.global_step, trainer.max_steps)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step, self.started = trainer.global_step, time.perf_counter()
        # the step's own: the end of the step has the next one
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        module.data_seconds = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not trainer.is_global_zero:
            return
        loss = float(outputs["loss"])  # waits for the GPU, so the seconds are the whole step's
        seconds = time.perf_counter() - self.started - self.validation.values.get("validation/seconds", 0)
        values = {
            "train/loss": loss,
            "train/learning_rate": self.learning_rate,
            "train/skipped": self.guard.detector.skipped,
            "train/is_image": int(self.data.order.kind(self.step) == "image"),
            "speed/step_seconds": seconds,
            "speed/data_seconds": module.data_seconds,
            "speed/tokens_per_second": self.data.num_tokens(self.step) / seconds,
            **self.validation.values,
        }
        if "grad_norm" in trainer.callback_metrics:
            values["train/grad_norm"] = float(trainer.callback_metrics["grad_norm"])
        self.record.write(trainer.global_step, values)
        facts = f"loss {loss:.4f}  {seconds:.3f} s/step  {values['speed/tokens_per_second']:,.0f} tokens/s"
        self.record.show(trainer.global_step, facts)
        trainer.last_metrics = values
        if trainer.global_step % self.recipe.log_every == 0:
            trainer.logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero and self.data.reader.quarantined:
            print(f"{self.data.reader.quarantined} damaged samples were left out: see quarantine.jsonl")

    def teardown(self, trainer, module, stage):
        if hasattr(self, "record"):
            self.record.close()
