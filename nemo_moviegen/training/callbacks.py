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
validation/loss_32x96x96_t0.00-0.25, ...             of it, that of latents of 32 frames of 96 x 96
validation/seconds                                   wall time of measuring it, no part of the step's
samples/seconds                                      of sampling from the fixed prompts, no part of it either
speed/step_seconds                                   wall time of the whole step
speed/data_seconds                                   of it, waiting for the loader (rank 0)
speed/data_wait                                      the same as a share of the step
speed/tokens_per_second                              video tokens of the global batch, all ranks
speed/tflops_per_gpu                                 model TFLOP/s of a rank (utilisation.py)
speed/mfu, speed/hfu                                 shares of the cluster's dense peak, where that is known;
                                                     hfu counts what layout.recompute computes again
memory/peak_gib                                      on GPUs, torch's most allocated so far (rank 0)
memory/resident_gib                                  on CPUs, the resident set of rank 0

Model FLOPs are those of the step's own latent shapes, with the real text tokens of the prompts that the first
copy of the model saw, taken for all.
"""

import time

import lightning.pytorch as pl

from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.training.record import RunRecord, memory
from nemo_moviegen.utilisation import real_text_tokens, step_flops, utilisation


class Metrics(pl.Callback):
    """Writes the table above for every step and moves the progress bar; rank 0 only."""

    def __init__(self, recipe, data, guard, validation, samples):
        self.recipe, self.data, self.guard = recipe, data, guard
        self.validation, self.samples = validation, samples
        self.peak_tflops = read_cluster(recipe.cluster).peak_dense_tflops

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            name, folder = self.recipe.name, self.recipe.output
            self.record = RunRecord(name, folder, trainer.global_step, trainer.max_steps)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step, self.started = trainer.global_step, time.perf_counter()
        # the step's own: the end of the step has the next one
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        module.start_counting()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not trainer.is_global_zero:
            return
        loss = float(outputs["loss"])  # waits for the GPU, so the seconds are the whole step's
        asides = {**self.validation.values, **self.samples.values}
        seconds = time.perf_counter() - self.started
        seconds -= asides.get("validation/seconds", 0) + asides.get("samples/seconds", 0)
        values = {
            "train/loss": loss,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": float(self.guard.grad_norm),
            "train/skipped": self.guard.detector.skipped,
            "train/is_image": int(self.data.order.kind(self.step) == "image"),
            **self.speed(module, seconds, trainer.world_size),
            **memory(),
            **asides,
        }
        self.record.write(trainer.global_step, values)
        facts = f"loss {loss:.4f}  {seconds:.3f} s/step  {values['speed/tokens_per_second']:,.0f} tokens/s"
        self.record.show(trainer.global_step, facts)
        trainer.last_metrics = values
        if trainer.global_step % self.recipe.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def speed(self, module, seconds, num_ranks) -> dict[str, float]:
        """What speed/... says of the step that has just ended."""
        size, counts = self.recipe.size, self.data.order.shape_counts(self.step)
        model, again = step_flops(
            size,
            counts,
            self.recipe.layout.recompute,
            real_text_tokens(module.text_tokens, module.num_prompts),
        )
        num_tokens = sum(count * size.num_tokens(shape) for shape, count in counts.items())
        return {
            "speed/step_seconds": seconds,
            "speed/data_seconds": module.data_seconds,
            "speed/data_wait": module.data_seconds / seconds,
            "speed/tokens_per_second": num_tokens / seconds,
            **utilisation(model, again, seconds, num_ranks, self.peak_tflops),
        }

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero and self.data.reader.quarantined:
            print(f"{self.data.reader.quarantined} damaged samples were left out: see quarantine.jsonl")

    def teardown(self, trainer, module, stage):
        if hasattr(self, "record"):
            self.record.close()
