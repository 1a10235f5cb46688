"""Which samples make up which step: a function of the step alone, so a resume has nothing to load (s3.2).

Three ways to make up a step of clips (`batching`):

    bucket      one latent shape. Every copy of the model does the same work, so none waits for another.
    balanced    all shapes in proportion to their numbers; a micro-batch has one shape, and each copy gets as
                many micro-batches of about the same cost in all.
    packed      packs of clips of any shapes that together fit `max_tokens`, dealt like balanced.

How much longer than the mean the dearest copy works, in percent: at the end of a step / where copies meet
in every layer (sharded weights). Of 64 copies, video_30b on clips of 768 px of which 55% last 15 to 16 s and
the others 4 to 15 s; by micro-batches a copy:

                                              1         2         4         8
    bucket                                  0 / 0     0 / 0     0 / 0     0 / 0
    balanced                               20 / 20   17 / 19    6 / 7     2 / 3
    packed, max_tokens the longest clip    11 / 11    7 / 9     7 / 8     2 / 3
    packed, twice that                      8 / 8     5 / 6     4 / 5     1 / 2

So bucket, unless a copy has 8 micro-batches or more; with one a copy nothing can be balanced. Of the slots of
packs 4.6% stay empty, 1.6% of those twice as long; padding all clips to the longest would waste 12%.

Samples of a shape are read as one endless stream: a shuffle of all of them, then the next epoch's shuffle.
Nothing is dropped at the end of an epoch. Sources are in a stream as often as in the data: over an epoch
exactly, over k samples as in any random draw without replacement.
"""

import math

import numpy as np

from nemo_moviegen.data.balance import balanced, imbalance
from nemo_moviegen.data.packing import PackPlan
from nemo_moviegen.data.shuffle import key_of, keys_of_epochs, shuffled

_STEPS_KNOWN = 16
"""Whose samples are kept: more than a loader is ahead."""
_COMMANDS = {
    "image": "run `moviegen encode` on a manifest with image rows (`moviegen shapes` makes some), or set "
    "data.image_every=0",
    "video": "run `moviegen encode` on a manifest with video rows, or set data.image_every=1 to train on "
    "images only",
}
_WHAT = {"image": "one-frame latents (images)", "video": "latents longer than one frame (clips)"}


class BatchOrder:
    """Samples of every step, with random access in the step and nothing to save.

    `latent_shapes` lists (T, H, W) of each row; a row with T = 1 is an image. Image steps are those where
    `step % image_every == image_every - 1` (1: all of them, 0: none), and always of one shape. Of bucket and
    balanced, the shapes of a kind take turns in proportion to their numbers of samples.

    A step has `global_batch` samples, packed ones `global_batch` packs, image steps `image_batch` images in
    as many micro-batches (0: global_batch), and the same ones whatever the number of copies that share them:
    a run resumed on other ranks repeats and skips nothing. `micro_batch` may change as well, but not of
    balanced, which takes so many neighbours of a shape at once.

    `num_tokens` says how many tokens a latent shape has, `cost` = (a, b) that S of them cost a * S + b * S**2
    (`flops.token_cost`); `max_tokens` of a pack is by default the longest clip's.

    ValueError where images or clips are needed and there are none, or the numbers do not divide.
    """

    def __init__(
        self,
        latent_shapes,
        global_batch,
        seed,
        image_every,
        *,
        micro_batch=1,
        image_batch=0,
        batching="bucket",
        cost=None,
        num_tokens=math.prod,
        max_tokens=0,
    ):
        self.global_batch, self.image_every, self.micro_batch = global_batch, image_every, micro_batch
        self.image_batch = image_batch or global_batch
        self.batching = batching
        self._check_settings(cost)
        self.shapes, self._counts_S, self._rows = _rows_by_shape(latent_shapes)
        num_images = sum(shape[0] == 1 for shape in self.shapes)  # sorted: images come first
        self._kinds = {"image": range(num_images), "video": range(num_images, len(self.shapes))}
        self._check_kinds(len(self._rows))
        self._first_S = np.cumsum(self._counts_S) - self._counts_S
        self._keys_S = np.array([key_of(seed, shape) for shape in self.shapes], np.uint64)
        self._pack_key = key_of(seed, "packs")
        trained = {shape for kind, needed in self._needs().items() if needed for shape in self._kinds[kind]}
        self.tokens_S = np.array(
            [s in trained and num_tokens(self.shapes[s]) for s in range(len(self.shapes))], int
        )
        """Tokens of a sample of each of `shapes`; 0 of a kind that no step takes: no model may hold it."""
        linear, quadratic = cost or (1, 0)  # bucket deals without them
        self._cost_S = linear * self.tokens_S.astype(float) + quadratic * self.tokens_S.astype(float) ** 2
        if batching == "packed" and self._kinds["video"]:
            self.plan = self._plan_packs(max_tokens)
        self._known = [(None, None)] * _STEPS_KNOWN

    @property
    def contents(self) -> list[list[int]]:
        """[T, H, W, number of samples] of each latent shape: with other data a step has other samples."""
        return [[*shape, int(count)] for shape, count in zip(self.shapes, self._counts_S, strict=True)]

    def kind(self, step) -> str:
        """image or video."""
        return "image" if self.image_every and step % self.image_every == self.image_every - 1 else "video"

    def shape(self, step) -> tuple[int, int, int]:
        """Latent (T, H, W) of the step's samples; ValueError where they have several."""
        found = set(self._samples(step)[2].tolist())
        if len(found) > 1:
            raise ValueError(
                f"step {step} mixes {len(found)} latent shapes, as data.batching={self.batching}"
            )
        return self.shapes[found.pop()]

    def num_tokens(self, step) -> int:
        """Video tokens of all samples of a step."""
        return int(self.tokens_S[self._samples(step)[2]].sum())

    def shape_counts(self, step) -> dict[tuple[int, int, int], int]:
        """Samples of each latent shape (T, H, W) in a step, over all copies."""
        shapes, counts = np.unique(self._samples(step)[2], return_counts=True)
        return {self.shapes[shape]: int(count) for shape, count in zip(shapes, counts, strict=True)}

    def batch(self, step) -> tuple[list[int], list[int]]:
        """Rows of the step's samples, of all copies, and for each how often it was seen before."""
        rows_N, epochs_N, *_ = self._samples(step)
        return rows_N.tolist(), epochs_N.tolist()

    def micro_batches(self, step, copy, num_copies) -> list[tuple[list[int], list[int]]]:
        """`batch` of each micro-batch of one of `num_copies` copies of the model; all have as many.

        They share no sample, and together have the step's. ValueError where they can not be shared evenly.
        """
        rows_N, epochs_N, _, sizes_P = samples = self._samples(step)
        own = self._deal(step, samples, num_copies)[copy]
        ends = np.cumsum(sizes_P)[own]
        spans = [slice(end - size, end) for size, end in zip(sizes_P[own], ends, strict=True)]
        return [(rows_N[span].tolist(), epochs_N[span].tolist()) for span in spans]

    def imbalance(self, step, num_copies) -> tuple[float, float]:
        """How much longer than the mean the dearest copy works, as a share: (at the step's end, in rounds).

        The second is what counts where copies meet in every layer (sharded weights): the j-th micro-batches
        of all copies wait for the dearest of them.
        """
        samples = self._samples(step)
        return imbalance(self._cost_of_pieces(samples)[self._deal(step, samples, num_copies)])

    def padding(self) -> dict[str, float]:
        """Share of token slots that is padding, over an epoch of clips: of this batching and of a naive one.

        `batching`: what packs leave unfilled; 0 where a micro-batch has one shape. `to_longest`: what it
        would be with every clip padded to the longest.
        """
        clips = slice(len(self._kinds["image"]), None)
        tokens, counts = self.tokens_S[clips], self._counts_S[clips]
        to_longest = 1 - float(tokens @ counts) / float(tokens.max() * counts.sum())
        return {"batching": self.plan.padding if self.batching == "packed" else 0.0, "to_longest": to_longest}

    def advice(self, num_copies) -> str:
        """What an operator should know of copies that wait, "" where they do not; a mean of 32 steps."""
        steps = [step for step in range(64) if self.kind(step) == "video"][:32]
        waits = [self.imbalance(step, num_copies) for step in steps]
        at_end, in_rounds = np.mean(waits, axis=0) if waits else (0.0, 0.0)
        if in_rounds < 0.05:
            return ""
        num = self.global_batch // self.micro_batch // num_copies
        return (
            f"data.batching={self.batching} with {num} micro-batches a copy of the model: the dearest copy "
            f"works {at_end:.0%} longer than the mean, or {in_rounds:.0%} where weights are sharded. Give a "
            "copy 8 micro-batches or more (larger global_batch, fewer copies), or set data.batching=bucket: "
            "none waits there"
        )

    def _samples(self, step):
        """(rows_N, epochs_N, index of shapes_N, sizes_P): the step's samples in pieces, its micro-batches.

        The loader asks for a step when it reads it, and who measures the step when it is over.
        """
        known_step, samples = self._known[step % len(self._known)]
        if known_step != step:
            samples = self._worked_out(step)
            self._known[step % len(self._known)] = step, samples
        return samples

    def _worked_out(self, step):
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        kind = self.kind(step)
        images_before = step // self.image_every if self.image_every else 0
        before = images_before if kind == "image" else step - images_before
        if kind == "video" and self.batching == "packed":
            return self._packs(before)
        num_samples = self.image_batch if kind == "image" else self.global_batch
        size = self.micro_batch if kind == "video" and self.batching == "balanced" else num_samples
        num_turns = num_samples // size
        shape_U, number_U = self._turns(kind, before * num_turns + np.arange(num_turns))
        shape_N = np.repeat(shape_U, size)
        place_N = (number_U[:, None] * size + np.arange(size)).ravel()
        epochs_N, ranks_N = np.divmod(place_N, self._counts_S[shape_N])
        num_pieces = self.global_batch // self.micro_batch
        sizes_P = np.full(num_pieces, num_samples // num_pieces)
        return self._rows_at(shape_N, epochs_N, ranks_N), epochs_N, shape_N, sizes_P

    def _packs(self, before):
        places_P = before * self.global_batch + np.arange(self.global_batch)
        epochs_P, ranks_P = np.divmod(places_P, self.plan.num_packs)
        packs_P = shuffled(ranks_P, self.plan.num_packs, keys_of_epochs(self._pack_key, epochs_P))
        sizes_P, shape_N, ranks_N = self.plan.contents(packs_P)
        shape_N = shape_N + len(self._kinds["image"])
        epochs_N = np.repeat(epochs_P, sizes_P)
        return self._rows_at(shape_N, epochs_N, ranks_N), epochs_N, shape_N, sizes_P

    def _rows_at(self, shape_N, epochs_N, ranks_N):
        """Row at a rank of an epoch of a shape's stream."""
        keys_N = keys_of_epochs(self._keys_S[shape_N], epochs_N)
        return self._rows[self._first_S[shape_N] + shuffled(ranks_N, self._counts_S[shape_N], keys_N)]

    def _turns(self, kind, turns_U):
        """(index of the shape whose turn it is, turns it had before), for turns of this kind."""
        remaining = int(self._counts_S[self._kinds[kind]].sum())
        shape_U, number_U = np.full(len(turns_U), -1), np.zeros(len(turns_U), np.int64)
        before_U = turns_U.astype(np.int64)
        # Each shape takes its share of the turns the shapes before it left over: a line of integer slope, so
        # the count at any turn is exact and rises by one for exactly one shape.
        for shape in self._kinds[kind]:
            samples = int(self._counts_S[shape])
            phase = int(self._keys_S[shape]) % remaining
            mine_U, after_U = (_line(before_U + more, samples, phase, remaining) for more in (0, 1))
            takes_U = (shape_U < 0) & (after_U > mine_U)
            shape_U[takes_U], number_U[takes_U] = shape, mine_U[takes_U]
            before_U, remaining = before_U - mine_U, remaining - samples
        return shape_U, number_U

    def _cost_of_pieces(self, samples):
        _, _, shape_N, sizes_P = samples
        return np.add.reduceat(self._cost_S[shape_N], np.cumsum(sizes_P) - sizes_P)

    def _deal(self, step, samples, num_copies):
        """[copies, micro-batches]: which pieces each copy takes."""
        num_pieces = len(samples[-1])
        if num_pieces % num_copies:
            raise ValueError(
                f"global_batch {self.global_batch} in micro-batches of {self.micro_batch} does not split "
                f"over {num_copies} copies of the model: use a multiple of {num_copies * self.micro_batch}"
            )
        if self.kind(step) == "image" or self.batching == "bucket":
            return np.arange(num_pieces).reshape(num_copies, -1)
        return balanced(self._cost_of_pieces(samples), num_copies)

    def _check_settings(self, cost):
        if self.global_batch < 1 or self.image_every < 0:
            raise ValueError(
                f"global_batch {self.global_batch} must be 1 or more, image_every {self.image_every} "
                "0 or more"
            )
        if self.micro_batch < 1 or self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}: "
                "change one of them"
            )
        if self.image_batch < 1 or self.image_batch % self.global_batch:
            raise ValueError(
                f"image_batch {self.image_batch} is no multiple of global_batch {self.global_batch}: change "
                "one of them, or set image_batch=0 for as many images as clips"
            )
        if self.batching not in ("bucket", "balanced", "packed"):
            raise ValueError(f"data.batching is {self.batching!r}; use bucket, balanced or packed")
        if self.batching == "packed" and self.micro_batch != 1:
            raise ValueError(
                f"micro_batch is {self.micro_batch}, but a pack is a micro-batch by itself: set micro_batch=1"
            )
        if self.batching != "bucket" and cost is None:
            raise ValueError(
                f"data.batching={self.batching} deals samples by cost: give flops.token_cost(size)"
            )

    def _needs(self):
        return {"image": self.image_every > 0, "video": self.image_every != 1}

    def _check_kinds(self, num_rows):
        for kind, needed in self._needs().items():
            if needed and not self._kinds[kind]:
                raise ValueError(
                    f"image_every is {self.image_every}, but none of the {num_rows} samples are "
                    f"{_WHAT[kind]}: {_COMMANDS[kind]}"
                )

    def _plan_packs(self, max_tokens):
        clips = slice(len(self._kinds["image"]), None)
        longest = int(self.tokens_S[clips].max(initial=0))
        if 0 < max_tokens < longest:
            raise ValueError(
                f"a pack of {max_tokens} tokens has no room for the longest clip of {longest}: "
                f"raise max_tokens to {longest} or more"
            )
        return PackPlan(self._counts_S[clips], self.tokens_S[clips], max_tokens or longest)


def _rows_by_shape(latent_shapes):
    """(sorted distinct shapes, samples of each, row numbers shape after shape).

    Whose turn it is does not depend on the order of rows.
    """
    shapes_N3 = np.asarray(latent_shapes, np.int64).reshape(-1, 3)
    bits = 20  # of a side: one number a shape sorts many times faster than three
    codes_N = (shapes_N3[:, 0] << 2 * bits) | (shapes_N3[:, 1] << bits) | shapes_N3[:, 2]
    codes_S, shape_N, counts_S = np.unique(codes_N, return_inverse=True, return_counts=True)
    mask = (1 << bits) - 1
    shapes = [(int(c) >> 2 * bits, int(c) >> bits & mask, int(c) & mask) for c in codes_S]
    narrow = np.uint16 if len(shapes) < 2**16 else np.int64  # numpy sorts 16 bits by radix
    return shapes, counts_S, np.argsort(shape_N.astype(narrow), kind="stable").astype(np.uint32)


def _line(before_U, samples, phase, remaining):
    """(before * samples + phase) // remaining, in steps that stay below 63 bits."""
    rounds_U, rest_U = np.divmod(before_U, remaining)
    return rounds_U * samples + (rest_U * samples + phase) // remaining
