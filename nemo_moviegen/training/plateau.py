"""Lowers the learning rate where the validation loss stops falling (s3.2; `optim.PlateauDetector` says when).

Only the measurements of every `validation.every` steps count, not those that a checkpoint or the end of a run
brings: so neither `save_every` nor a run that is made longer changes what the rate does.
"""

import lightning.pytorch as pl
import torch

from nemo_moviegen.training.record import set_learning_rate


class LowerOnPlateau(pl.Callback):
    """Shows the detector of a `FlowMatchingModule` each measurement, and gives the optimiser the lower rate.

    `validation` is the run's `ValidationLoss`, which goes before. Rank 0's number decides for all: sums over
    ranks may differ in their last bit from rank to rank, and no two ranks may step at different rates.
    """

    def __init__(self, recipe, validation):
        self.recipe, self.validation = recipe, validation

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % self.recipe.validation.every:
            return
        device = torch.cuda.current_device()
        loss = torch.tensor(self.validation.values["validation/loss"], dtype=torch.float64, device=device)
        torch.distributed.broadcast(loss, src=0)
        if module.plateau.observe(float(loss)):
            set_learning_rate(trainer, step)
            if trainer.is_global_zero:
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                print(
                    f"{self.recipe.name}: {self.recipe.optim.plateau.patience} validation losses not clearly "
                    f"below {module.plateau.best:.4f}: the learning rate is {rate:.3g} after step {step}",
                    flush=True,
                )
