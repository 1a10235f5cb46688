"""Stand-ins that decode and encode, so that a job of `moviegen encode` takes milliseconds.

What is planned, written, found again and indexed is the real thing.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.data import dali
from nemo_moviegen.data.clips import Clip, record_unusable, sample_id, write_manifest
from nemo_moviegen.data.encoded import Encoded
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.shard_plan import plan_shards
from nemo_moviegen.encode import encode_shards

MADE_WITH = {"autoencoder": "one", "text_encoders": "two"}


TOO_BRIGHT = 1.25
"""Frames of which the stand-in makes latents that float16 cannot hold."""


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


class StandInAutoencoder(torch.nn.Linear):
    """Latents that are a function of the frames; dies after `calls` of them."""

    def __init__(self, calls=10**9):
        super().__init__(1, 1)
        self.calls = calls

    def encode_stream(self, videos):
        if self.calls == 0:
            raise Killed
        self.calls -= 1
        mean = torch.cat(list(videos), dim=1)[:, ::8, :, ::8, ::8]
        yield mean.where(mean < TOO_BRIGHT, 1e6)


class StandInEncoders:
    def encode(self, prompts):
        return [{"ul2": np.full((1 + len(p) % 3, 4), sample_id(p) % 1000 / 100)} for p in prompts]


class StandInLoader:
    """Frames that are a function of the clip; a file called bad cannot be used, one called huge overflows."""

    def __init__(self, clips, bucket, *, batch_size, order, quarantine, fps, **settings):
        self.clips, self.bucket, self.rows = clips, bucket, [*order]
        self.batch_size, self.quarantine = batch_size, quarantine
        assert len(fps) == len(clips)

    def __iter__(self):
        good = []
        for row in self.rows:
            clip = self.clips[row]
            if "bad" in clip.path:
                record_unusable(self.quarantine, clip.clip_id, clip.path, f"clip {clip.clip_id}: bad")
            else:
                good.append(row)
        for start in range(0, len(good), self.batch_size):
            rows = good[start : start + self.batch_size]
            yield torch.stack([self._frames(self.clips[row]) for row in rows]), rows

    def _frames(self, clip):
        rng = np.random.default_rng(sample_id(f"{clip.clip_id} {clip.start_seconds}"))
        bucket = self.bucket
        shape = (bucket.num_frames, 3, bucket.height_px, bucket.width_px)
        frames = torch.from_numpy(rng.uniform(-1, 1, size=shape))
        return torch.full_like(frames, TOO_BRIGHT) if "huge" in clip.path else frames


@pytest.fixture
def stand_in(monkeypatch):
    """The loader is the stand-in, and nothing waits for the disk."""
    monkeypatch.setattr(dali, "ClipLoader", StandInLoader)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # a killed process leaves the disk's cache alone


def a_clip(number, seconds=2.0, **changes):
    clip = Clip(
        clip_id=f"clip{number}",
        path=f"/videos/{number}.mp4",
        kind="image" if seconds == 0 else "video",
        start_seconds=1.0,
        end_seconds=1.0 + seconds,
        source_fps=25.0,
        width_px=128,
        height_px=128,
        codec="vp9",
        caption=f"caption {number}",
    )
    return replace(clip, **changes)


def some_clips(rng, count, first=0):
    """Clips of all sorts: both splits, both shapes, images, files that are bad, and ones no bucket takes."""
    clips = []
    for number in range(first, first + count):
        clip = a_clip(
            number,
            seconds=rng.choice([0, 0.6, 2.0, 2.0, 5.0]),
            split=rng.choice(["train", "train", "heldout"]),
            width_px=rng.choice([128, 128, 256]),
        )
        sort = rng.random()
        if sort < 0.1:
            clip = replace(clip, path=f"/videos/bad{number}.mp4")
        elif sort < 0.15:
            clip = replace(clip, path=f"/videos/huge{number}.mp4")
        elif sort < 0.2 and clip.kind == "video":
            clip = replace(clip, end_seconds=clip.start_seconds + 0.1)  # too short for any bucket
        clips.append(clip)
    return clips


def a_plan(folder, *manifests, samples_per_shard=3):
    folder.mkdir(exist_ok=True)
    paths = [write_manifest(folder / f"m{n}.parquet", clips) for n, clips in enumerate(manifests)]
    return plan_shards(paths, bucket_set=bucket_set("tiny"), samples_per_shard=samples_per_shard)


def run(plan, output, task=(0, 1), calls=10**9, made_with=MADE_WITH):
    """One task; returns (samples it encoded, the summary)."""
    encoded = Encoded(plan, output, made_with)
    number = encode_shards(
        encoded, StandInAutoencoder(calls), StandInEncoders(), task, provenance=made_with, batch_size=2
    )
    return number, encoded.finish()


def files(output):
    """Bytes of every file of both folders."""
    folders = [output, output.with_name(output.name + "_heldout")]
    return {
        (folder.name.removeprefix(output.name), path.name): path.read_bytes()
        for folder in folders
        for path in sorted(folder.glob("*"))
    }


def usable(clips):
    return {c.clip_id for c in clips if not any(w in c.path for w in ("bad", "huge"))} - {
        c.clip_id for c in clips if c.kind == "video" and c.end_seconds - c.start_seconds < 0.5
    }


def indexed(output):
    """Clip ids in the indices of both folders, as often as they are there."""
    found = []
    for folder in (output, output.with_name(output.name + "_heldout")):
        reader = LatentReader(folder)
        found += [sample.clip_id for sample in reader.read(range(len(reader)))]
    return found


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def indexed_train(output):
    reader = LatentReader(output)
    return [sample.clip_id for sample in reader.read(range(len(reader)))]
