"""When and on what a training run measures its validation loss: plain numbers, without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The flow-matching loss of held-out samples, at noise and times that never change (our choice of both).

    The paper lowers the learning rate where this loss stops falling, and finds that people agree with it.
    """

    every: int = 0
    """Steps between measurements; each checkpoint has one too. 0 = none at all."""
    folder: str = ""
    """Latents of held-out samples; empty = those that `moviegen encode` kept apart from data.folder."""
    num_samples: int = 64
    """The first by sample id, of the kinds (images, clips) that the run trains on."""
    times_per_sample: int = 2
    """Times at which each is taken, in different parts of [0, 1]."""

    def __post_init__(self):
        for name, least in (("every", 0), ("num_samples", 1), ("times_per_sample", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; use {least} or more")

    def latents(self, training_folder) -> Path:
        """Where the held-out latents of a run are that trains on those in `training_folder`."""
        return Path(self.folder) if self.folder else heldout_folder(training_folder)


def heldout_folder(folder) -> Path:
    """Where the latents of held-out clips lie: beside the training set, its name and `_heldout`."""
    return Path(folder).with_name(Path(folder).name + "_heldout")
