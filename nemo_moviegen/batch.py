"""What the data rooms hand to the training rooms: every field with shape, type and range."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class VideoBatch:
    """Latents of one shape with their prompts. B clips, T C H W latent axes, L text tokens of one encoder."""

    latent_BTCHW: torch.Tensor
    """Normalised TAE latents, about zero mean and unit deviation per channel."""
    contexts: tuple[torch.Tensor, ...]
    """Features [B, L, width] of each text encoder, in the order of the recipe's `size.contexts`."""
    masks: tuple[torch.Tensor, ...]
    """Bool [B, L] for each encoder: True where a token is real, False where it is padding."""
    sample_ids: torch.Tensor
    """int64 [B], unique in the data set: what noise and time are keyed by."""
    epochs: torch.Tensor
    """int64 [B]: how often the sample was seen before."""
    noise_BTCHW: torch.Tensor | None = None
    """The samples' noise, where it was drawn with them (`training.step.with_noise`), and their times."""
    t_B: torch.Tensor | None = None
    """fp64 in (0, 1), 0 being noise."""

    @property
    def is_image(self) -> bool:
        """Whether the samples are one latent frame long (s3.1: an image is a one-frame video)."""
        return self.latent_BTCHW.shape[1] == 1

    def rows(self, start, stop) -> "VideoBatch":
        """Samples start..stop-1: a micro-batch."""
        return VideoBatch(
            latent_BTCHW=self.latent_BTCHW[start:stop],
            contexts=tuple(c[start:stop] for c in self.contexts),
            masks=tuple(m[start:stop] for m in self.masks),
            sample_ids=self.sample_ids[start:stop],
            epochs=self.epochs[start:stop],
            noise_BTCHW=None if self.noise_BTCHW is None else self.noise_BTCHW[start:stop],
            t_B=None if self.t_B is None else self.t_B[start:stop],
        )

    def to(self, device, dtype=None) -> "VideoBatch":
        """The batch on `device`, its floating-point tensors as `dtype` where given."""
        return VideoBatch(
            latent_BTCHW=self.latent_BTCHW.to(device, dtype),
            contexts=tuple(c.to(device, dtype) for c in self.contexts),
            masks=tuple(m.to(device) for m in self.masks),
            sample_ids=self.sample_ids.to(device),
            epochs=self.epochs.to(device),
            noise_BTCHW=None if self.noise_BTCHW is None else self.noise_BTCHW.to(device, dtype),
            t_B=None if self.t_B is None else self.t_B.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class PackedVideoBatch:
    """N clips of any shapes with their prompts: what a model takes as one sequence, a clip after the other.

    Each keeps its own time, positions and prompt and sees only itself, so a pack trains as its clips would
    in micro-batches of their own.
    """

    latents: tuple[torch.Tensor, ...]
    """Normalised TAE latents [T, C, H, W] of each clip; T = 1 is an image."""
    contexts: tuple[torch.Tensor, ...]
    """Features [N, L, width] of each text encoder, as in a `VideoBatch`."""
    masks: tuple[torch.Tensor, ...]
    """Bool [N, L] for each encoder: True where a token is real."""
    sample_ids: torch.Tensor
    """int64 [N], unique in the data set: what noise and time are keyed by."""
    epochs: torch.Tensor
    """int64 [N]: how often the sample was seen before."""
    noise: tuple[torch.Tensor, ...] | None = None
    """Of each clip, where it was drawn with them, and their times."""
    t_B: torch.Tensor | None = None
    """fp64 in (0, 1), 0 being noise."""

    def to(self, device, dtype=None) -> "PackedVideoBatch":
        """The pack on `device`, its floating-point tensors as `dtype` where given."""
        return PackedVideoBatch(
            latents=tuple(latent_TCHW.to(device, dtype) for latent_TCHW in self.latents),
            contexts=tuple(c.to(device, dtype) for c in self.contexts),
            masks=tuple(m.to(device) for m in self.masks),
            sample_ids=self.sample_ids.to(device),
            epochs=self.epochs.to(device),
            noise=None if self.noise is None else tuple(part.to(device, dtype) for part in self.noise),
            t_B=None if self.t_B is None else self.t_B.to(device),
        )
