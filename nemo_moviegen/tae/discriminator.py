"""Patch discriminators and the adversarial losses of the temporal autoencoder (Movie Gen s3.1.1).

The paper trains with an adversarial loss and does not describe its discriminator. These are the
PatchGAN of LDM's autoencoder (hinge loss, one logit a patch) for single frames, and the same network
with convolutions over time for clips:

    video [B, T, 3, H, W]                                     width 64, levels 3
      4x4, stride 2                      LeakyReLU                  64      H/2
      4x4, stride 2, group norm,         LeakyReLU                 128      H/4
      4x4, stride 2, group norm,         LeakyReLU                 256      H/8
      3x3,           group norm,         LeakyReLU                 512      H/8
      3x3                                                            1      H/8   logits

Against LDM: group norm in place of batch norm, whose logits depend on how a batch is split over ranks
and micro-batches; and 3x3 in place of 4x4 where the stride is 1, so a small frame keeps its patches
(LDM's has none left at 8 px).

Names: B clips, T frames, C channels, H W height and width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nemo_moviegen.tae.layers import float32_on_cpu


class PatchDiscriminator(nn.Module):
    """One logit a patch, high where the patch looks real; of each frame alone, or of clips if `temporal`."""

    def __init__(self, width: int = 64, levels: int = 3, temporal: bool = False):
        super().__init__()
        self.temporal = temporal
        self.smallest_px = 2**levels
        widths = [3, *(width * min(2**level, 8) for level in range(levels + 1))]  # LDM stops at 8 * width
        layers = []
        for level in range(levels + 1):
            inputs, outputs = widths[level : level + 2]
            layers.append(conv(inputs, outputs, temporal, stride=2 if level < levels else 1))
            if level:
                # At least four channels a group: the smallest frames leave one pixel, and a group of a
                # single value is always zero.
                layers.append(nn.GroupNorm(max(1, min(32, outputs // 4)), outputs))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, conv(widths[-1], 1, temporal, stride=1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """DCGAN's and LDM's: convolutions N(0, 0.02), scales of group norms N(1, 0.02), biases zero."""
        for module in self.layers:
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.GroupNorm):
                nn.init.normal_(module.weight, float(isinstance(module, nn.GroupNorm)), 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Logits [B, T', H/2^levels, W/2^levels] of video in [-1, 1]; ValueError below 2^levels px.

        T' is T, or ceil(T/2^levels) if temporal.
        """
        height, width = video_BTCHW.shape[3:]
        if min(height, width) < self.smallest_px:
            raise ValueError(
                f"frames are {width}x{height} px; this discriminator halves them down to one patch and needs "
                f"{self.smallest_px} px or more: train on a larger bucket, or give it fewer levels"
            )
        if self.temporal:
            with float32_on_cpu(video_BTCHW):
                return self.layers(video_BTCHW.transpose(1, 2)).squeeze(1)
        return self.layers(video_BTCHW.flatten(0, 1)).squeeze(1).unflatten(0, video_BTCHW.shape[:2])


class Discriminator(nn.Module):
    """A discriminator of frames, one of clips, or both; the losses weigh them equally."""

    def __init__(self, width: int, levels: int, frames: bool, clips: bool):
        super().__init__()
        if not frames and not clips:
            raise ValueError(
                "the discriminator judges neither frames nor clips: turn on one of them, or both"
            )
        self.frames = PatchDiscriminator(width, levels) if frames else None
        self.clips = PatchDiscriminator(width, levels, temporal=True) if clips else None

    def forward(self, video_BTCHW: Tensor) -> list[Tensor]:
        """Logits of each discriminator that has an opinion: an image is no clip, so the list may be empty."""
        logits = []
        if self.frames is not None:
            logits.append(self.frames(video_BTCHW))
        if self.clips is not None and video_BTCHW.shape[1] > 1:
            logits.append(self.clips(video_BTCHW))
        return logits


def hinge_discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """What the discriminator minimises: half of mean(relu(1 - real)) + mean(relu(1 + fake)), as LDM.

    Means over the patches of a discriminator, then over discriminators. A scalar >= 0: 1 for a fresh one,
    0 when every real logit is above 1 and every fake one below -1. Fake logits are those of a detached
    reconstruction. Nothing judged is a plain 0 without gradient.
    """
    return mean_of(
        [
            0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            for real, fake in zip(real_logits, fake_logits, strict=True)
        ]
    )


def generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """What the autoencoder minimises: minus the mean logit of its reconstruction.

    Mean over the patches of a discriminator, then over discriminators. Nothing judged is a plain 0 without
    gradient.
    """
    return mean_of([-fake.mean() for fake in fake_logits])


def adaptive_weight(
    reconstruction_gradient: Tensor | Sequence[Tensor], adversarial_gradient: Tensor | Sequence[Tensor]
) -> Tensor:
    """Weight in [0, 1e4] under which both losses pull equally at the decoder's last layer (VQGAN eq. 7).

    Takes the gradients of the two losses for that layer: its weight, or a list of its parameters. Returns
    the ratio of their norms, a scalar without gradient.
    """
    reconstruction, adversarial = (
        get_total_norm([gradient] if isinstance(gradient, Tensor) else list(gradient))
        for gradient in (reconstruction_gradient, adversarial_gradient)
    )
    return (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


def mean_of(losses: list[Tensor]) -> Tensor:
    """Mean of scalars; 0 where there are none."""
    return torch.stack(losses).mean() if losses else torch.zeros(())


def conv(inputs: int, outputs: int, temporal: bool, *, stride: int) -> nn.Module:
    """Halves (rounding down) height and width with a stride of 2, and if `temporal` also frames, rounding up.

    Over time the kernel is 3, centred on its frame: any length works, and past and future count alike.
    """
    kernel = 4 if stride == 2 else 3
    if temporal:
        return nn.Conv3d(inputs, outputs, (3, kernel, kernel), stride, padding=1)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
