"""What is trained for: the names of a video model's objectives, an autoencoder's losses (s3.1.1). No torch.

The paper gives the weight of the outlier penalty and its r; all other numbers are our default (LDM's).
"""

import math
from dataclasses import dataclass

VIDEO_OBJECTIVES = ("flow_matching", "v_prediction")
"""The paper's (s3.1.2), and the diffusion it is compared with (s3.6.2)."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLosses:
    """Weights of the losses; those of weight 0 are not computed."""

    l1: float = 1.0
    squared_error_steps: int = 0
    """First steps that take the squared error in place of L1: L1 from fresh weights learns the background."""
    perceptual: float = 0.0
    """LPIPS of each frame; needs `vgg_weights`. 1.0 in production."""
    vgg_weights: str = ""
    """Local file of VGG16's weights as torchvision saves them (.pth, .safetensors): nothing is downloaded."""
    adversarial: float = 0.0
    """Of the discriminator's verdict, times the weight that levels both gradients. 0.1 in production."""
    adversarial_from_step: int = 0
    """First step with a discriminator: before, reconstructions differ from video by their blur alone."""
    kl: float = 1e-6
    outlier: float = 1e5
    """Of the outlier penalty (eq. 1)."""
    outlier_from_step: int = 0
    """First step with the penalty."""
    outlier_scale: float = 3.0
    """r of eq. 1: standard deviations a latent may leave the mean."""

    def __post_init__(self):
        for name in ("l1", "perceptual", "adversarial", "kl", "outlier", "outlier_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"loss.{name} is {value}; use 0 or more")
        for name in ("squared_error_steps", "adversarial_from_step", "outlier_from_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; use 0 or more steps")
        if self.perceptual and not self.vgg_weights:
            raise ValueError(
                "loss.perceptual is LPIPS, which compares features of VGG16: set loss.vgg_weights to a local "
                "file of its weights (torchvision's vgg16-397923af.pth), or loss.perceptual=0"
            )


@dataclass(frozen=True, kw_only=True)
class DiscriminatorSettings:
    """Patch discriminators of frames (2D) and of clips (3D), trained beside the autoencoder."""

    frames: bool = True
    """One that judges each frame alone."""
    clips: bool = True
    """One that sees how frames follow each other; images do not come before it."""
    width: int = 64
    levels: int = 3
    learning_rate: float = 1e-4
    """Of its own AdamW, betas 0.5 and 0.9; warm-up and decay are those of `optim`."""

    def __post_init__(self):
        if not (self.frames or self.clips):
            raise ValueError(
                "discriminator.frames and discriminator.clips are both off: switch one on, or train without "
                "any by loss.adversarial=0"
            )
        for name in ("width", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"discriminator.{name} is {getattr(self, name)}; use 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"discriminator.learning_rate is {self.learning_rate}; use a number above 0")
