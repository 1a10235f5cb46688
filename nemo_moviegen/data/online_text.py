"""Text features made while training reads, in place of those in the shards (Movie Gen s3.1.4)."""

from dataclasses import replace

import numpy as np

from nemo_moviegen.data.latents import LatentSample, as_stored
from nemo_moviegen.prompts import with_fps


class OnlineText:
    """A reader of the same samples whose features are encoded as they are read, not those in the shards.

    `encoders` has `encode(prompts)`. Features are rounded as a shard would, so they equal cached ones of the
    same encoders on the same kind of machine, bit for bit. Each `read` is one call of the encoders, whatever
    prompts are dropped later: where an encoder lies in slices over ranks they stay in step.
    """

    def __init__(self, reader, encoders):
        self.reader, self.encoders = reader, encoders
        self.statistics = reader.statistics
        """As `LatentReader.statistics`."""
        self.empty_prompt = self._encode([""])[0]
        """As `LatentReader.empty_prompt`."""

    def read(self, rows) -> list[LatentSample]:
        """The samples of these rows as `LatentReader.read` gives them, with fresh features."""
        return self.with_text(self.reader.read(rows))

    def with_text(self, samples) -> list[LatentSample]:
        """The samples with features encoded now in place of those they were read with."""
        contexts = self._encode([with_fps(sample.caption, sample.fps) for sample in samples])
        return [replace(sample, contexts=own) for sample, own in zip(samples, contexts, strict=True)]

    def _encode(self, prompts):
        with np.errstate(over="ignore"):  # named below
            features = [as_stored(contexts) for contexts in self.encoders.encode(prompts)]
        for prompt, contexts in zip(prompts, features, strict=True):
            for name, features_LD in contexts.items():
                if not np.isfinite(features_LD).all():
                    raise ValueError(
                        f"{name} features of the prompt {prompt!r} are not finite in float16 (largest "
                        "65504): check the weights of the encoder"
                    )
        return features
