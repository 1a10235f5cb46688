"""Sizes and inputs every test of the backbone shares: small enough for seconds, shaped to reveal."""

from dataclasses import replace

import torch

from nemo_moviegen.batch import VideoBatch
from nemo_moviegen.sizes import ContextSize, TransformerSize

CONTEXTS = (
    ContextSize(name="ul2", width=24, max_tokens=7),
    ContextSize(name="metaclip", width=16, max_tokens=5),
    ContextSize(name="byt5", width=8, max_tokens=3),
)
SIZE = TransformerSize(
    name="test",
    num_layers=2,
    width=32,
    ffn_width=64,
    num_heads=4,
    input_channels=4,
    output_channels=4,
    max_frames=4,
    max_height=6,
    max_width=6,
    contexts=CONTEXTS,
    qk_norm=True,
    cross_attention_norm=True,
    time_frequencies=16,
)
DIT_SIZE = replace(SIZE, name="test_dit", block="dit", gated_ffn=False)
LATENT_SHAPE = (3, 8, 4)  # frames, height, width: all different, 24 tokens


def batch(num_samples=4, latent_shape=LATENT_SHAPE, dtype=torch.float64, seed=0) -> VideoBatch:
    """Random latents and prompts of different length, some without any ByT5 token."""
    generator = torch.Generator().manual_seed(seed)
    T, H, W = latent_shape

    def mask(length, shortest):
        lengths = torch.randint(shortest, length + 1, (num_samples, 1), generator=generator)
        return torch.arange(length) < lengths

    return VideoBatch(
        latent_BTCHW=torch.randn(num_samples, T, SIZE.input_channels, H, W, generator=generator, dtype=dtype),
        contexts=tuple(
            torch.randn(num_samples, c.max_tokens, c.width, generator=generator, dtype=dtype)
            for c in CONTEXTS
        ),
        masks=tuple(mask(c.max_tokens, 0 if c.name == "byt5" else 1) for c in CONTEXTS),
        sample_ids=torch.arange(num_samples) + 1000,
        epochs=torch.zeros(num_samples, dtype=torch.int64),
    )


@torch.no_grad()
def open_gates(model, seed=0):
    """Give modulation, norms and head values: at initialisation closed gates hide every bug behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("head"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        elif name.endswith(".bias") and "decoder" in name:  # of a dit block's linears
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        elif "norm" in name and "weight" in name:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
