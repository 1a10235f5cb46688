"""Clips and images an autoencoder trains on: which come at which step, and which part of each."""

import itertools
import os
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.data.clips import Clips, read_manifest, sample_id
from nemo_moviegen.data.cutting import cut_clips
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.flow import sample_generator


class TrainingClips:
    """Micro-batches (video_BTCHW, sample ids) of one rank, decoded by DALI, from `first_step` to the end.

    Which rows a step takes, and which crop of each, is a function of the step: nothing needs saving for a
    resume. `data.crops` crops of a clip are as many samples, each with an id of its own.
    """

    def __init__(self, recipe, rank, num_ranks):
        every_clip = read_clips(recipe.data)
        self.recipe, self.first_step = recipe, 0
        split_N, kind_N = every_clip.column("split"), every_clip.column("kind")
        self.clips = every_clip.select(split_N == "train")
        self.heldout = every_clip.select((split_N == "heldout") & (kind_N == "video"))
        self.accumulate = recipe.num_microbatches(num_ranks)
        self.rank, self.num_ranks = rank, num_ranks
        self.batch_size = {"video": recipe.global_batch, "image": recipe.image_batch or recipe.global_batch}
        shapes = np.ones((len(self.clips), 3), int)
        shapes[self.clips.column("kind") == "video", 0] = 2  # the order asks no more than which are images
        needed = {self.kind(step) for step in range(min(recipe.num_steps, 64))}
        self._orders = {
            kind: BatchOrder(shapes, self.batch_size[kind], recipe.seed, int(kind == "image"))
            for kind in sorted(needed)
        }

    def kind(self, step) -> str:
        """image or video."""
        every = self.recipe.data.image_every
        return "image" if every and step % every == every - 1 else "video"

    def rows(self, step) -> list[int]:
        """Rows of `clips` this rank takes at `step`."""
        every = self.recipe.data.image_every
        images_before = step // every if every else 0
        kind = self.kind(step)
        rows, _ = self._orders[kind].batch(images_before if kind == "image" else step - images_before)
        share = len(rows) // self.num_ranks
        return rows[self.rank * share : (self.rank + 1) * share]

    def num_samples(self, step) -> int:
        """Samples of the whole batch of a step: a crop each."""
        return self.batch_size[self.kind(step)] * self.recipe.data.crops

    def __iter__(self):
        read = self._from_memory if self.recipe.data.in_memory else self._from_files
        readers = {
            kind: read(self._rows_of(kind), size // (self.num_ranks * self.accumulate))
            for kind, size in self.batch_size.items()
            if kind in self._orders
        }
        for step in range(self.first_step, self.recipe.num_steps):
            for _ in range(self.accumulate):
                yield self.cropped(*next(readers[self.kind(step)]), step)

    def _from_files(self, rows, batch_size):
        return iter(self.loader(self.clips, rows, batch_size))

    def _from_memory(self, rows, batch_size):
        """The same batches; each row is decoded when it first comes."""
        known = {}
        while True:
            asked = [next(rows) for _ in range(batch_size)]
            if new := [row for row in dict.fromkeys(asked) if row not in known]:
                for row, (video_BTCHW, found) in zip(new, self.loader(self.clips, new, 1), strict=True):
                    known[row] = video_BTCHW[0].clone(), found[0]  # a bad file's substitute under its own row
            taken = [known[row] for row in asked]
            yield torch.stack([video_TCHW for video_TCHW, _ in taken]), [row for _, row in taken]

    def _rows_of(self, kind):
        steps = itertools.count(self.first_step)
        return (row for step in steps if self.kind(step) == kind for row in self.rows(step))

    def cropped(self, video_BTCHW, rows, step):
        """The samples of a micro-batch, and the id that keys the randomness of each."""
        data, clip_ids = self.recipe.data, [self.clips[row].clip_id for row in rows]
        if not data.crop_px:
            return video_BTCHW, [sample_id(clip_id) for clip_id in clip_ids]
        crops, ids = [], []
        for video_TCHW, clip_id in zip(video_BTCHW, clip_ids, strict=True):
            for number in range(data.crops):
                ids.append(sample_id(f"{clip_id}/{number}" if number else clip_id))
                crops.append(self._crop(video_TCHW, ids[-1], step))
        return torch.stack(crops), ids

    def _crop(self, video_TCHW, id, step):
        """One place for the clip; one for each frame where frames are taken alone."""
        recipe, size = self.recipe, self.recipe.data.crop_px
        alone = recipe.autoencoder.inflation == "2D"
        generator = sample_generator(recipe.seed, id, step, "crop")
        room = [length - size + 1 for length in video_TCHW.shape[2:]]
        places = generator.integers(room, size=(len(video_TCHW) if alone else 1, 2)).tolist()
        if not alone:
            ((top, left),) = places
            return video_TCHW[:, :, top : top + size, left : left + size]
        frames = zip(video_TCHW, places, strict=True)
        return torch.stack([f[:, top : top + size, left : left + size] for f, (top, left) in frames])

    def loader(self, clips, rows, batch_size):
        """A `ClipLoader` over rows of `clips`, on this rank's device."""
        from nemo_moviegen.data.dali import ClipLoader

        return ClipLoader(
            clips,
            self.recipe.data.bucket,
            batch_size=batch_size,
            order=rows,
            device_id=int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else None,
            quarantine=Path(self.recipe.output) / "quarantine.jsonl",
            substitute=True,  # a bad file must not shift the batches of later steps
        )


def read_clips(data) -> Clips:
    """Clips of the manifest, or of the one video file, that a `ClipData` names."""
    if Path(data.manifest).suffix == ".parquet":
        return read_manifest(data.manifest)
    bucket = data.bucket
    return Clips.of(cut_clips(data.manifest, bucket.num_frames / bucket.fps, images=True))
