"""Which samples make up which step: a function of the step alone, so a resume has nothing to load (s3.2)."""

import functools
import hashlib

import numpy as np


class BatchOrder:
    """Rows of every global batch, with one latent shape a batch and random access in the step.

    `latent_shapes` lists (T, H, W) of each row; a row with T = 1 is an image. Image steps are those where
    `step % image_every == image_every - 1` (1: all of them, 0: none).

    Shapes of a kind take turns in proportion to their numbers of samples. The batches of one shape read one
    endless stream: a shuffle of all its rows, then the next epoch's shuffle. Nothing is dropped at the end of
    an epoch: a batch may finish one epoch and start the next, and each row comes exactly once an epoch.

    ValueError where images or clips are needed and there are none.
    """

    def __init__(self, latent_shapes, global_batch, seed, image_every):
        if global_batch < 1 or image_every < 0:
            raise ValueError(
                f"global_batch {global_batch} must be 1 or more, image_every {image_every} 0 or more"
            )
        self.global_batch, self.seed, self.image_every = global_batch, seed, image_every
        self._rows = _rows_by_shape(latent_shapes)
        self._shapes = {
            "image": [shape for shape in self._rows if shape[0] == 1],
            "video": [shape for shape in self._rows if shape[0] > 1],
        }
        self._check(len(latent_shapes))
        self._shuffle = functools.lru_cache(maxsize=8)(self._permutation)

    def kind(self, step) -> str:
        """image or video."""
        return "image" if self.image_every and step % self.image_every == self.image_every - 1 else "video"

    def shape(self, step) -> tuple[int, int, int]:
        """Latent (T, H, W) of the step's batch."""
        return self._position(step)[0]

    def batch(self, step) -> tuple[list[int], list[int]]:
        """Rows of the step's global batch, and for each how often it was seen before."""
        shape, number = self._position(step)
        rows_N = self._rows[shape]
        rows, epochs = [], []
        for place in range(number * self.global_batch, (number + 1) * self.global_batch):
            epoch, rank = divmod(place, len(rows_N))
            rows.append(int(rows_N[self._shuffle(shape, epoch)[rank]]))
            epochs.append(epoch)
        return rows, epochs

    def _position(self, step):
        """The step's shape, and how many batches of that shape came before."""
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        kind = self.kind(step)
        images_before = step // self.image_every if self.image_every else 0
        before = images_before if kind == "image" else step - images_before
        shapes = self._shapes[kind]
        remaining = sum(len(self._rows[shape]) for shape in shapes)
        # Each shape takes its share of the steps the shapes before it left over: a line of integer slope, so
        # the count at any step is exact and rises by one for exactly one shape.
        for shape in shapes:
            samples = len(self._rows[shape])
            phase = _hash(self.seed, shape) % remaining
            mine, mine_after = ((n * samples + phase) // remaining for n in (before, before + 1))
            if mine_after > mine:
                return shape, mine
            before, remaining = before - mine, remaining - samples
        raise AssertionError("the last shape takes every step that is left")

    def _permutation(self, shape, epoch):
        return np.random.default_rng((self.seed, *shape, epoch)).permutation(len(self._rows[shape]))

    def _check(self, num_rows):
        needs = {"image": self.image_every > 0, "video": self.image_every != 1}
        commands = {
            "image": "run `moviegen encode` on a manifest with image rows (`moviegen shapes` makes some), or "
            "set data.image_every=0",
            "video": "run `moviegen encode` on a manifest with video rows, or set "
            "data.image_every=1 to train on images only",
        }
        for kind, needed in needs.items():
            if needed and not self._shapes[kind]:
                what = (
                    "one-frame latents (images)"
                    if kind == "image"
                    else "latents longer than one frame (clips)"
                )
                raise ValueError(
                    f"image_every is {self.image_every}, but none of the {num_rows} samples are {what}: "
                    f"{commands[kind]}"
                )


def _rows_by_shape(latent_shapes):
    """Row numbers of each shape, shapes sorted: whose turn it is does not depend on the order of rows."""
    rows = {}
    for row, shape in enumerate(latent_shapes):
        rows.setdefault(tuple(int(n) for n in shape), []).append(row)
    return {shape: np.array(rows[shape]) for shape in sorted(rows)}


def _hash(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
