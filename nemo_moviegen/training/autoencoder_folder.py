"""What the run folder of an autoencoder is told while it trains: metrics and checkpoints.

metrics.jsonl and TensorBoard, a line a step         unit
---------------------------------------------------- ---------------------------------------------------
train/loss                                           weighted sum of all losses but the discriminator's
train/l1                                             mean absolute error; video is in [-1, 1]
train/psnr_db                                        dB
train/kl                                             nats a latent value
train/outlier                                        outlier penalty (eq. 1) before its weight
train/perceptual                                     LPIPS, where it is on
train/adversarial                                    minus the discriminator's mean logit, where it is on
train/adversarial_weight                             adaptive weight of it, from the step before
train/discriminator                                  its hinge loss
train/grad_norm                                      over the autoencoder's parameters, before clipping
train/learning_rate                                  of the autoencoder
train/is_image                                       1 for an image step
heldout/psnr_db                                      dB of held-out clips, a line at each checkpoint
speed/step_seconds                                   wall time of the whole step
speed/data_seconds                                   of it, waiting for the loader
speed/data_wait                                      the same as a share of the step
speed/frames_per_second                              frames (crops of them) of the global batch, all ranks
memory/peak_gib, memory/resident_gib                 as in callbacks.py
"""

import math
import os
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_moviegen.tae.losses import squared_error
from nemo_moviegen.training.autoencoder_step import ALWAYS
from nemo_moviegen.training.autoencoder_weights import CHECKPOINT_FILE
from nemo_moviegen.training.record import RunRecord, memory

HELDOUT_CLIPS = 16
_HELDOUT_BATCH = 4


class RunFolder(pl.Callback):
    """Metrics, a progress bar and checkpoints. A checkpoint appears under its name only when it is whole."""

    def __init__(self, recipe, data):
        self.recipe, self.data = recipe, data
        self.folder = Path(recipe.output)

    def on_train_start(self, trainer, module):
        self.step_start, self.data_seconds = None, 0.0
        if trainer.is_global_zero:
            self.record = RunRecord(self.recipe.name, self.folder, module.step, self.recipe.num_steps)
        self.asked = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now = time.perf_counter()
        self.data_seconds += now - self.asked
        if self.step_start is None:  # the first micro-batch of a step
            self.step_start, self.step = self.asked, module.step
            self.num_frames = batch[0].shape[1]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.step > self.step:
            self._end_step(trainer, module)
        self.asked = time.perf_counter()

    def _end_step(self, trainer, module):
        names = [*ALWAYS, *sorted(set(module.found) - set(ALWAYS))]
        # each rank saw its share of the batch
        mean = trainer.strategy.reduce(
            torch.stack([module.found[n].double() for n in names]), reduce_op="mean"
        )
        found = dict(zip(names, mean.tolist(), strict=True))
        seconds = time.perf_counter() - self.step_start
        extra = {f"train/{n}": found[n] for n in names if n not in ALWAYS}
        if "adversarial" in found:
            extra["train/adversarial_weight"] = float(module.adversarial_weight)
        values = {
            "train/loss": found["loss"],
            "train/l1": found["l1"],
            "train/psnr_db": 10 * math.log10(4 / max(found["squared_error"], 1e-10)),
            "train/kl": found["kl"],
            "train/outlier": found["outlier"],
            **extra,
            "train/grad_norm": float(module.grad_norm),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/is_image": int(self.data.kind(self.step) == "image"),
            "speed/step_seconds": seconds,
            "speed/data_seconds": self.data_seconds,
            "speed/data_wait": self.data_seconds / seconds,
            "speed/frames_per_second": self.num_frames * self.data.num_samples(self.step) / seconds,
            **memory(),
        }
        module.found = {}
        self.step_start, self.data_seconds = None, 0.0
        trainer.last_metrics = values
        if trainer.is_global_zero:
            self._tell(trainer, module.step, values)
            if self.recipe.saves_at(module.step):
                self._save(module)
                self._measure(trainer, module)
            elif trainer.should_stop:
                self._save(module)

    def _save(self, module):
        part = self.folder / f"{CHECKPOINT_FILE}.part"
        torch.save(module.state(), part)
        os.replace(part, self.folder / CHECKPOINT_FILE)

    def _measure(self, trainer, module):
        found = heldout_psnr(module.measured, self.data)
        if found:
            trainer.last_metrics |= found
            self.record.write(module.step, found)
            for logger in trainer.loggers:
                logger.log_metrics(found, step=module.step)

    def _tell(self, trainer, step, values):
        self.record.write(step, values)
        if step % self.recipe.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
        facts = (
            f"l1 {values['train/l1']:.4f}  {values['train/psnr_db']:.1f} dB  "
            f"{values['speed/step_seconds']:.2f} s/step  {values['speed/frames_per_second']:.0f} frames/s"
        )
        self.record.show(step, facts)

    def teardown(self, trainer, module, stage):
        if hasattr(self, "record"):
            self.record.close()


def heldout_psnr(autoencoder, data) -> dict:
    """heldout/psnr_db over the first held-out clips, from posterior means; empty where there are none."""
    if not data.heldout:
        return {}
    rows = range(min(HELDOUT_CLIPS, len(data.heldout)))
    parameter = next(autoencoder.parameters())
    errors = []
    with torch.no_grad():
        for video_BTCHW, _ in data.loader(data.heldout, rows, _HELDOUT_BATCH):
            video_BTCHW = video_BTCHW.to(parameter)
            latent_BTCHW = autoencoder.encode(video_BTCHW).mean_BTCHW
            rebuilt_BTCHW = autoencoder.decode(latent_BTCHW, num_frames=video_BTCHW.shape[1]).clamp(-1, 1)
            errors += [squared_error(r, v) for r, v in zip(rebuilt_BTCHW, video_BTCHW, strict=True)]
    return {"heldout/psnr_db": 10 * math.log10(4 / float(torch.stack(errors).mean()))}
