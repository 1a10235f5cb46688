"""What a run tells while it runs.

metrics.jsonl and TensorBoard, a line a step        unit
---------------------------------------------------- ----------------------------------------------------
train/loss                                           mean squared velocity error over real tokens
train/learning_rate                                  -
train/grad_norm                                      norm over all parameters before clipping
train/is_image                                       1 for an image iteration
speed/step_seconds                                   wall time of the whole step
speed/data_seconds                                   of it, waiting for the loader
speed/tokens_per_second                              video tokens of the global batch, all ranks
"""

import json
import os
import time
from pathlib import Path

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Metrics(pl.Callback):
    """Writes the table above for every step; rank 0 only."""

    def __init__(self, recipe, data):
        self.recipe, self.data = recipe, data
        self.path = Path(recipe.output) / "metrics.jsonl"

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _forget_after(self.path, trainer.global_step)
            self.file = self.path.open("a", buffering=1)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step, self.started = trainer.global_step, time.perf_counter()
        self.learning_rate = trainer.optimizers[0].param_groups[0][
            "lr"
        ]  # the end of the step has the next one
        module.data_seconds = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not trainer.is_global_zero:
            return
        loss = float(outputs["loss"])  # waits for the GPU, so the seconds are the whole step's
        seconds = time.perf_counter() - self.started
        values = {
            "train/loss": loss,
            "train/learning_rate": self.learning_rate,
            "train/is_image": int(self.data.order.kind(self.step) == "image"),
            "speed/step_seconds": seconds,
            "speed/data_seconds": module.data_seconds,
            "speed/tokens_per_second": self.data.num_tokens(self.step) / seconds,
        }
        if "grad_norm" in trainer.callback_metrics:
            values["train/grad_norm"] = float(trainer.callback_metrics["grad_norm"])
        self.file.write(json.dumps({"step": self.step + 1, **values}) + "\n")
        trainer.last_metrics = values
        if trainer.global_step % self.recipe.log_every == 0:
            trainer.logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            self.file.close()
            if self.data.reader.quarantined:
                print(f"{self.data.reader.quarantined} damaged samples were left out: see quarantine.jsonl")


class ProgressBar(pl.Callback):
    """A bar in a terminal, a line every tenth of the run elsewhere; rank 0 only."""

    def __init__(self, recipe):
        self.recipe = recipe

    def on_train_start(self, trainer, module):
        if not trainer.is_global_zero:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task(
            self.recipe.name, total=trainer.max_steps, completed=trainer.global_step, facts=""
        )
        self.progress.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not trainer.is_global_zero:
            return
        values = trainer.last_metrics
        facts = (
            f"loss {values['train/loss']:.4f}  {values['speed/step_seconds']:.3f} s/step  "
            f"{values['speed/tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self.task, completed=trainer.global_step, facts=facts)
        if (
            not self.progress.console.is_terminal
            and trainer.global_step % max(1, trainer.max_steps // 10) == 0
        ):
            print(f"{self.recipe.name} {trainer.global_step}/{trainer.max_steps}  {facts}", flush=True)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            self.progress.stop()


def _forget_after(path, step):
    """Drop lines past the checkpoint a run resumes from: they are written again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # the line a killed run was writing
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    os.replace(part, path)
