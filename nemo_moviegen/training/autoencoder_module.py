"""The autoencoder as a Lightning module, and what its run folder is told while it runs.

metrics.jsonl and TensorBoard, a line a step         unit
---------------------------------------------------- ---------------------------------------------------
train/loss                                           weighted sum of all losses
train/l1                                             mean absolute error; video is in [-1, 1]
train/psnr_db                                        dB
train/kl                                             nats a latent value
train/outlier                                        outlier penalty (eq. 1) before its weight
train/grad_norm                                      over all parameters, before clipping
train/learning_rate                                  -
train/is_image                                       1 for an image step
heldout/psnr_db                                      dB of held-out clips, a line at each checkpoint
speed/step_seconds                                   wall time of the whole step
speed/data_seconds                                   of it, waiting for the loader
speed/frames_per_second                              frames of the global batch, all ranks
"""

import math
import os
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_moviegen.tae.losses import squared_error
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.autoencoder import CHECKPOINT_FILE, losses
from nemo_moviegen.training.record import RunRecord, learning_rate_factor

HELDOUT_CLIPS = 16
_HELDOUT_BATCH = 4


class AutoencoderModule(pl.LightningModule):
    """One micro-batch to its loss; `found` sums the losses of the micro-batches of a step."""

    def __init__(self, recipe, sample_ids):
        super().__init__()
        self.recipe, self.sample_ids = recipe, sample_ids
        self.autoencoder = TemporalAutoencoder(recipe.autoencoder)
        self.found = {}

    def training_step(self, batch, batch_idx):
        video_BTCHW, rows = batch
        ids = [self.sample_ids[row] for row in rows]
        found = losses(self.recipe, self.autoencoder, video_BTCHW.to(self.dtype), ids, self.global_step)
        for name, value in found.items():
            self.found[name] = self.found.get(name, 0) + value.detach() / self.trainer.accumulate_grad_batches
        self.found["frames"] = video_BTCHW.shape[1]
        return found["loss"]

    def configure_optimizers(self):
        optim = self.recipe.optim
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        factor = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, optim, self.recipe.num_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.found["grad_norm"] = torch.nn.utils.get_total_norm(gradients)


class RunFolder(pl.Callback):
    """Metrics, a progress bar and checkpoints. A checkpoint appears under its name only when it is whole."""

    def __init__(self, recipe, data):
        self.recipe, self.data = recipe, data
        self.folder = Path(recipe.output)

    def on_train_start(self, trainer, module):
        self.step_start, self.data_seconds, self.unsaved = None, 0.0, False
        if trainer.is_global_zero:
            self.record = RunRecord(self.recipe.name, self.folder, trainer.global_step, trainer.max_steps)
        self.asked = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now = time.perf_counter()
        self.data_seconds += now - self.asked
        self._save_if_due(trainer, module)
        if self.step_start is None:  # the first micro-batch of a step
            self.step_start = time.perf_counter() - (now - self.asked)
            self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > self.step:
            self._end_step(trainer, module)
        self.asked = time.perf_counter()

    def _end_step(self, trainer, module):
        names = ("loss", "l1", "squared_error", "kl", "outlier")
        # each rank saw its share of the batch
        mean = trainer.strategy.reduce(
            torch.stack([module.found[n].double() for n in names]), reduce_op="mean"
        )
        found = dict(zip(names, mean.tolist(), strict=True))
        seconds = time.perf_counter() - self.step_start
        kind = self.data.kind(self.step)
        values = {
            "train/loss": found["loss"],
            "train/l1": found["l1"],
            "train/psnr_db": 10 * math.log10(4 / max(found["squared_error"], 1e-10)),
            "train/kl": found["kl"],
            "train/outlier": found["outlier"],
            "train/grad_norm": float(module.found["grad_norm"]),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/is_image": int(kind == "image"),
            "speed/step_seconds": seconds,
            "speed/data_seconds": self.data_seconds,
            "speed/frames_per_second": module.found["frames"] * self.data.batch_size[kind] / seconds,
        }
        module.found = {}
        self.step_start, self.data_seconds = None, 0.0
        trainer.last_metrics = values
        self.unsaved = True
        if trainer.is_global_zero:
            self._tell(trainer, values)

    def on_train_end(self, trainer, module):
        self._save_if_due(trainer, module)

    def _save_if_due(self, trainer, module):
        """Before the next micro-batch: in `on_train_batch_end` Lightning (2.4) has not yet counted the
        micro-batch that ends, and a resumed run would accumulate one too few.
        """
        step = trainer.global_step
        if not self.unsaved or (step % self.recipe.save_every and step != trainer.max_steps):
            return
        self.unsaved = False
        part = self.folder / f"{CHECKPOINT_FILE}.part"
        trainer.save_checkpoint(part)  # every rank takes part
        if trainer.is_global_zero:
            os.replace(part, self.folder / CHECKPOINT_FILE)
            found = heldout_psnr(module.autoencoder, self.data)
            if found:
                trainer.last_metrics |= found
                self.record.write(step, found)
                trainer.logger.log_metrics(found, step=step)

    def _tell(self, trainer, values):
        self.record.write(trainer.global_step, values)
        if trainer.global_step % self.recipe.log_every == 0:
            trainer.logger.log_metrics(values, step=trainer.global_step)
        facts = (
            f"l1 {values['train/l1']:.4f}  {values['train/psnr_db']:.1f} dB  "
            f"{values['speed/step_seconds']:.2f} s/step  {values['speed/frames_per_second']:.0f} frames/s"
        )
        self.record.show(trainer.global_step, facts)

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
