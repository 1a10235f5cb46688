"""Latents of noise, for runs whose data do not matter."""

from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
from nemo_moviegen.data.latents import LatentSample


def write_random_latents(folder, size, num_samples, rng, *, shapes, num_tokens=None):
    """Clips whose latents (T, H, W) take turns, every third sample an image of the first one's size.

    Prompts have `num_tokens` tokens of each encoder, by default some number below its limit.
    """

    def features():
        return {
            c.name: rng.normal(size=(num_tokens or rng.integers(1, c.max_tokens), c.width))
            for c in size.contexts
        }

    with LatentWriter(folder) as writer:
        for i in range(num_samples):
            frames, height, width = (1, *shapes[0][1:]) if i % 3 == 0 else shapes[i % len(shapes)]
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
