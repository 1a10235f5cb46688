"""What a run shows while it runs: its page, samples from fixed prompts, Weights & Biases. No torch."""

from dataclasses import dataclass

PAGE_FILE = "progress.html"
"""In the run folder: the page, made anew while the run goes on."""
SAMPLES_FOLDER = "samples"
"""Beside it, step=N/NNN.*: what the model made of the fixed prompts after N steps."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Nothing of it changes the training: losses and weights are those of a run without, to the last bit."""

    every_seconds: int = 60
    """Between two makings of the page, by a thread of rank 0; 0 = no page."""
    samples_every: int = 0
    """Steps between samples from the first held-out captions, with the weights of that step (not their
    average); 0 = none. Of video models only."""
    num_samples: int = 8
    """Held-out samples whose caption, duration and size are taken: the first by sample id."""
    sampling_steps: int = 20
    """Euler steps of a sample, fewer than `moviegen generate` takes (s3.4: 50)."""
    autoencoder: str = ""
    """Run folder of the autoencoder that decodes them; empty = three channels of the latent are shown."""
    wandb_project: str = ""
    """Project of Weights & Biases that gets the metrics too; empty = none. Needs the package wandb."""

    def __post_init__(self):
        for name, least in (
            ("every_seconds", 0),
            ("samples_every", 0),
            ("num_samples", 1),
            ("sampling_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"progress.{name} is {getattr(self, name)}; use {least} or more")
        if self.sampling_steps > 250:
            raise ValueError(
                f"progress.sampling_steps is {self.sampling_steps}; use at most 250, what they stand for"
            )
