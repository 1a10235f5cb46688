"""Latents of noise, for runs whose data do not matter: benchmarks and tests."""

from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
from nemo_moviegen.data.latents import LatentSample


def write_random_latents(folder, size, num_samples, rng, *, shapes, images=True, num_tokens=None):
    """Write clips of a `TransformerSize` whose latents (T, H, W) take turns, and the empty prompt.

    With `images` every third sample is an image of the first shape's size. Prompts have `num_tokens` tokens
    of each encoder (a number, or one by its name), by default some below its limit. `rng` is numpy's
    generator.
    """

    def features():
        return {c.name: rng.normal(size=(length_of(c), c.width)) for c in size.contexts}

    def length_of(context):
        if isinstance(num_tokens, dict):
            return num_tokens[context.name]
        return num_tokens or rng.integers(1, context.max_tokens)

    with LatentWriter(folder) as writer:
        for i in range(num_samples):
            is_image = images and i % 3 == 0
            frames, height, width = (1, *shapes[0][1:]) if is_image else shapes[i % len(shapes)]
            writer.add(
                LatentSample(
                    sample_id=i,
                    clip_id=f"clip{i}",
                    caption="",
                    fps=16.0,
                    contexts=features(),
                    latent_TCHW=rng.normal(size=(frames, size.input_channels, height, width)),
                )
            )
    write_empty_prompt(folder, features())
