"""The autoencoder, its discriminator and their two optimisers as a Lightning module.

Gradients of all micro-batches are summed, then averaged over the ranks, then both optimisers step: so a step
is the same for any number of ranks and any micro-batch. That holds for the adaptive weight of the adversarial
loss too. VQGAN takes it from the micro-batch at hand; here it is that of the whole batch of the step before.
"""

import copy

import lightning.pytorch as pl
import torch

from nemo_moviegen.tae.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.autoencoder_step import average_over_ranks, reconstruct
from nemo_moviegen.training.muon import optimizer_of
from nemo_moviegen.training.record import learning_rate_factor


class AutoencoderModule(pl.LightningModule):
    """One micro-batch to its gradients, the last of a step to an optimiser step.

    `found` sums the losses of the micro-batches of the step under way; `step` counts finished ones.
    """

    def __init__(self, recipe, accumulate):
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.accumulate = recipe, accumulate
        self.autoencoder = TemporalAutoencoder(recipe.autoencoder)
        self.autoencoder.recompute(recipe.layout.recompute != "none")
        loss, settings = recipe.loss, recipe.discriminator
        self.discriminator = self.perceptual = self.average = None
        if loss.adversarial:
            self.discriminator = Discriminator(
                settings.width, settings.levels, frames=settings.frames, clips=settings.clips
            )
        if loss.perceptual:
            from nemo_moviegen.tae.perceptual import PerceptualLoss

            self.perceptual = PerceptualLoss(loss.vgg_weights)
        self.adversarial_weight = torch.zeros(())
        self.step, self.num_done, self.grad_norm = 0, 0, 0.0
        self.found, self._gradients, self._optimizer_states = {}, {}, ()

    def keep_average(self):
        """Start the moving average where the weights stand; after they were loaded."""
        if self.recipe.ema_decay:
            self.average = copy.deepcopy(self.autoencoder).requires_grad_(False).eval()

    @property
    def measured(self) -> TemporalAutoencoder:
        """What is loaded from this run: the average where there is one."""
        return self.autoencoder if self.average is None else self.average

    @property
    def networks(self) -> list:
        """What the optimisers train, in their order."""
        return [self.autoencoder] + ([] if self.discriminator is None else [self.discriminator])

    def configure_optimizers(self):
        settings = self.recipe.discriminator
        optimizers = [optimizer_of(self.autoencoder, self.recipe.optim)]
        if self.discriminator is not None:
            betas, rate = (0.5, 0.9), settings.learning_rate
            optimizers.append(
                torch.optim.AdamW(self.discriminator.parameters(), rate, betas, weight_decay=0.0)
            )
        return optimizers

    def training_step(self, batch, batch_idx):
        video_BTCHW, ids = batch
        video_BTCHW = video_BTCHW.to(self.dtype)
        made = reconstruct(self.recipe, self.autoencoder, video_BTCHW, ids, self.step, self.perceptual)
        found = dict(made.losses)
        judged = self.discriminator is not None and self.step >= self.recipe.loss.adversarial_from_step
        if judged:
            found["adversarial"] = self._verdict(made)
            weight = self.recipe.loss.adversarial * self.adversarial_weight.to(found["loss"])
            found["loss"] = found["loss"] + weight * found["adversarial"]
        self.manual_backward(found["loss"] / self.accumulate)
        if judged:
            found["discriminator"] = self._train_discriminator(made)
        for name, value in found.items():
            self.found[name] = self.found.get(name, 0) + value.detach() / self.accumulate
        self.num_done += 1
        if self.num_done == self.accumulate:
            self._end_step()

    def _verdict(self, made):
        """What the discriminator thinks of the reconstruction; sums both gradients of the last layer."""
        self.discriminator.requires_grad_(False)
        verdict = generator_loss(self.discriminator(made.rebuilt_BTCHW))
        self.discriminator.requires_grad_(True)
        if verdict.requires_grad:  # an image is no clip: a discriminator of clips alone says nothing
            last = self._last_layer()
            for name, loss in (("likeness", made.likeness), ("adversarial", verdict)):
                (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
                self._gradients[name] = self._gradients.get(name, 0) + gradient / self.accumulate
        return verdict

    def _train_discriminator(self, made):
        real_logits = self.discriminator(made.video_BTCHW)
        loss = hinge_discriminator_loss(real_logits, self.discriminator(made.rebuilt_BTCHW.detach()))
        if loss.requires_grad:
            self.manual_backward(loss / self.accumulate)
        return loss

    def _last_layer(self):
        conv = self.autoencoder.decoder.conv_out
        return conv.space.weight if conv.time is None else conv.time.conv.weight

    def _end_step(self):
        factor = learning_rate_factor(self.step, self.recipe.optim, self.recipe.num_steps)
        optimizers = self.trainer.optimizers
        for network, optimizer in zip(self.networks, optimizers, strict=True):
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            average_over_ranks(gradients)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), self.recipe.optim.clip_grad)
            if network is self.autoencoder:
                self.grad_norm = norm
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            if gradients:
                optimizer.step()
            optimizer.zero_grad()
        if self._gradients:
            average_over_ranks(list(self._gradients.values()))
            self.adversarial_weight = adaptive_weight(
                self._gradients["likeness"], self._gradients["adversarial"]
            )
            self._gradients = {}
        self.step, self.num_done = self.step + 1, 0
        if self.average is not None:
            self._update_average()

    @torch.no_grad()
    def _update_average(self):
        # Short runs too have one worth having: the first steps count less than `ema_decay` says.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        average, weights = list(self.average.parameters()), list(self.autoencoder.parameters())
        torch._foreach_lerp_(average, weights, 1 - decay)

    def state(self) -> dict:
        """All a run needs to go on: step, weights, average, discriminator, optimisers."""
        state = {"step": self.step, "autoencoder": self.autoencoder.state_dict()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict()}
            state |= {"adversarial_weight": self.adversarial_weight}
        return state | {"optimizers": [optimizer.state_dict() for optimizer in self.trainer.optimizers]}

    def load_state(self, state):
        """Go on from what `state` returned; before the optimisers are made."""
        self.step = state["step"]
        self.autoencoder.load_state_dict(state["autoencoder"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.adversarial_weight = state["adversarial_weight"]
        self._optimizer_states = state["optimizers"]

    def on_train_start(self):
        for optimizer, state in zip(self.trainer.optimizers, self._optimizer_states, strict=False):
            optimizer.load_state_dict(state)
