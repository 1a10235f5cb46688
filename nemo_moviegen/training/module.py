"""Training of a video model as NeMo Lightning wants it: model, optimiser, forward step, loss (s3.1.2)."""

import time

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule

from nemo_moviegen.optim import PlateauDetector
from nemo_moviegen.precision import is_mixed
from nemo_moviegen.training.record import learning_rate_factor
from nemo_moviegen.training.step import data_dtype, mean_loss, noisy_pair, token_loss
from nemo_moviegen.training_objective import OBJECTIVES
from nemo_moviegen.video.model import DTYPES, VideoTransformer, video_config


class FlowMatchingModule(pl.LightningModule):
    """A `VideoRecipe` as a Lightning module; `module` is the transformer once megatron's groups exist.

    A run that resumes needs no fresh weights (`is_fresh`): at 30B drawing them takes minutes on a CPU.
    """

    def __init__(self, recipe, *, uses_transformer_engine, is_fresh=True):
        super().__init__()
        self.recipe, self.is_fresh = recipe, is_fresh
        self.plateau = PlateauDetector(recipe.optim.plateau)
        """Lowers the learning rate where `optim.decay` says so; else nobody shows it a loss."""
        self.config = video_config(
            recipe.size,
            recipe.layout,
            recipe.precision,
            fp8=recipe.fp8,
            uses_transformer_engine=uses_transformer_engine,
            compiles=recipe.compiles and torch.cuda.is_available(),
        )
        self.data_dtype = data_dtype(recipe.precision)
        self.optim = MegatronOptimizerModule(
            config=optimizer_config(recipe),
            lr_scheduler=LearningRate(recipe.optim, recipe.num_steps, self.plateau),
            no_weight_decay_cond=_is_not_a_matrix,
        )
        self.optim.connect(self)
        self.start_counting()

    def start_counting(self):
        """Forget what was counted of the last step."""
        self.data_seconds = 0.0
        """Waiting for the loader."""
        self.num_prompts, self.text_tokens = 0, dict.fromkeys((c.name for c in self.recipe.size.contexts), 0)
        """Of this copy's share of the step: prompts, and their real tokens by text encoder."""

    def configure_model(self):
        """Lightning's hook once megatron's groups exist."""
        if not hasattr(self, "module"):
            # Transformer Engine's layers ask for megatron's streams of random numbers
            model_parallel_cuda_manual_seed(self.recipe.seed)
            self.module = VideoTransformer(self.config, self.recipe.seed if self.is_fresh else None)

    def data_step(self, dataloader_iter):
        """The next micro-batch on this rank's device."""
        started = time.perf_counter()
        batch, *_ = next(dataloader_iter)
        self.data_seconds += time.perf_counter() - started
        self.num_prompts += len(batch.sample_ids)
        for name, mask_BL in zip(self.text_tokens, batch.masks, strict=True):
            # still on the CPU, so nothing waits; by numpy, which keeps the interpreter's lock
            self.text_tokens[name] += int(np.count_nonzero(mask_BL.numpy()))
        return batch.to(torch.cuda.current_device(), self.data_dtype)

    def training_step(self, batch, batch_idx=None):
        """(tokens of this rank, what they should be, whole) of a `VideoBatch` or `PackedVideoBatch`."""
        x, target, t_B = noisy_pair(batch, self.recipe.seed, OBJECTIVES[self.recipe.objective])
        return self.module(x, t_B, batch.contexts, batch.masks), target

    def log(self, *_, **__):
        """Nothing: NeMo's strategy tells Lightning five values a step, at a millisecond each, of which
        training/callbacks.py has its own."""

    @property
    def loss_reduction(self):
        return FlowMatchingLoss(self.config)


class FlowMatchingLoss(MegatronLossReduction):
    """Squared error of the velocity, averaged over the real tokens of all ranks and micro-batches."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, batch, outputs):
        velocity_SBX, target = outputs
        loss = token_loss(velocity_SBX, target, self.config)
        return loss.loss_sum, loss.num_tokens, loss.sums

    def reduce(self, losses_reduced_per_micro_batch):
        return mean_loss(losses_reduced_per_micro_batch, self.config)


def optimizer_config(recipe) -> OptimizerConfig:
    """Megatron's AdamW: fp32 main weights and moments beside bf16 weights."""
    optim = recipe.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        bf16=is_mixed(recipe.precision),
        params_dtype=DTYPES[recipe.precision],
        use_distributed_optimizer=recipe.layout.sharding != "none",
    )


class LearningRate(LRSchedulerModule):
    """`learning_rate_factor` as NeMo's scheduler, times what a `PlateauDetector` has left of the rate."""

    def __init__(self, optim, num_steps, plateau):
        super().__init__()
        self.optim, self.num_steps, self.plateau = optim, num_steps, plateau

    def scheduler(self, model, optimizer):
        factor = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, self.optim, self.num_steps) * self.plateau.factor,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}


def _is_not_a_matrix(name, parameter):
    """Norms, biases and position tables take no weight decay."""
    return parameter.dim() < 2 or "positions" in name or "modulation_bias" in name
