"""`moviegen encode` as a job array: killed anywhere, resumed with any number of tasks, the same bytes.

Stand-ins decode and encode, so that a job takes milliseconds; what is planned, written, found again and
indexed is the real thing. Seen to fail with: tasks that overlap (>= for ==), an index over the shards that
happen to be there, a table written before its shard, sums kept from one shard to the next, a fingerprint
without captions.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_moviegen.__main__ import _is_users_mistake
from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.data import dali, latent_writer
from nemo_moviegen.data.clips import Clip, record_unusable, sample_id, write_manifest
from nemo_moviegen.data.encoded import Encoded, told
from nemo_moviegen.data.latent_writer import read_table
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.shard_plan import plan_shards
from nemo_moviegen.encode import encode_shards
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.tae.model import Posterior

MADE_WITH = {"autoencoder": "one", "text_encoders": "two"}


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


class StandInAutoencoder(torch.nn.Linear):
    """Latents that are a function of the frames; dies after `calls` of them."""

    def __init__(self, calls=10**9):
        super().__init__(1, 1)
        self.calls = calls

    def encode(self, video_BTCHW):
        if self.calls == 0:
            raise Killed
        self.calls -= 1
        mean = video_BTCHW[:, ::8, :, ::8, ::8]
        return Posterior(mean, mean)


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
        scale = 1e6 if "huge" in clip.path else 1
        return torch.from_numpy(
            rng.normal(size=(bucket.num_frames, 3, bucket.height_px, bucket.width_px)) * scale
        )


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
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


@pytest.mark.parametrize("seed", range(25))
def test_a_job_killed_at_random_and_resumed_with_other_tasks_writes_the_same_bytes(tmp_path, seed):
    rng = random.Random(seed)
    clips = [a_clip("t"), a_clip("h", split="heldout"), *some_clips(rng, rng.randint(5, 40))]
    plan = a_plan(tmp_path / "in", clips, samples_per_shard=rng.randint(1, 6))
    run(plan, tmp_path / "whole")
    output = tmp_path / "killed"
    for _ in range(rng.randint(1, 6)):
        num_tasks = rng.randint(1, 4)
        try:
            run(plan, output, (rng.randrange(num_tasks), num_tasks), calls=rng.randint(0, 8))
        except Killed:
            with pytest.raises(ValueError, match="no finished latents"):
                LatentReader(output)
    num_tasks = rng.randint(1, 5)
    for task in rng.sample(range(num_tasks), num_tasks):
        _, summary = run(plan, output, (task, num_tasks))
    assert summary["missing"] == 0
    assert files(output) == files(tmp_path / "whole")
    assert sorted(indexed(output)) == sorted(usable(clips))
    told_of = [json.loads(line)["clip_id"] for line in lines(output / "quarantine.jsonl")]
    told_of += [json.loads(line)["clip_id"] for line in lines(tmp_path / "killed_heldout/quarantine.jsonl")]
    assert sorted(told_of) == sorted({clip.clip_id for clip in clips} - usable(clips))
    number, again = run(plan, output)
    assert number == 0 and again == summary


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 40])
def test_every_shard_belongs_to_one_task(tmp_path, num_tasks):
    clips = some_clips(random.Random(1), 40)
    plan = a_plan(tmp_path / "in", clips)
    names = []
    for task in range(num_tasks):
        run(plan, tmp_path / f"out{task}", (task, num_tasks))
        names += [
            name for name in files(tmp_path / f"out{task}") if name[1].endswith("0.parquet") or "-" in name[1]
        ]
    tables = [name for name in names if name[1].endswith(".parquet")]
    assert len(tables) == len(set(tables)) == len(plan.shards)


def test_without_all_shards_there_is_no_index_and_the_run_says_how_many_are_missing(tmp_path):
    plan = a_plan(tmp_path / "in", [a_clip(n) for n in range(12)])
    assert len(plan.shards) == 4
    _, summary = run(plan, tmp_path / "out", (1, 4))
    assert summary["missing"] == 3 and summary["train"] == 3
    assert "not finished: 3 shards of other tasks are missing" in told(
        "out", summary | {"encoded": 3, "seconds": 1}
    )
    with pytest.raises(ValueError, match=r"no finished latents in .*run `moviegen encode` to its end"):
        LatentReader(tmp_path / "out")


@pytest.mark.parametrize("harm", ["no table", "no shard", "truncated", "damaged table"])
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(tmp_path, harm):
    plan = a_plan(tmp_path / "in", [a_clip(n) for n in range(12)])
    output = tmp_path / "out"
    run(plan, output)
    before = files(output)
    shard = output / f"{plan.shards[2].name}.tar"
    table = shard.with_suffix(".parquet")
    if harm == "no table":
        table.unlink()
    elif harm == "no shard":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        table.write_bytes(table.read_bytes()[:-20])
    if harm in ("no shard", "truncated"):
        with pytest.raises(
            ValueError, match=rf"{shard.name}: sample clip8 cannot be read: .*moviegen encode"
        ):
            LatentReader(output)
    number, summary = run(plan, output)
    assert number == 3 and summary["missing"] == 0
    assert files(output) == before


def test_other_weights_captions_or_spans_are_other_shards(tmp_path):
    clips = [a_clip(n) for n in range(6)]
    output = tmp_path / "out"
    plan = a_plan(tmp_path / "in", clips)
    assert run(plan, output)[0] == 6
    assert run(plan, output, made_with=MADE_WITH | {"autoencoder": "another"})[0] == 6
    assert run(plan, output)[0] == 6
    for change in ({"caption": "another"}, {"end_seconds": 2.5}, {"path": "/videos/another.mp4"}):
        changed = [replace(clips[0], **change), *clips[1:]]
        assert run(a_plan(tmp_path / "in", changed), output)[0] == 3, "the shard of the clip that changed"
        assert run(a_plan(tmp_path / "in", clips), output)[0] == 3
    moved = [replace(clip, path=clip.path.replace("/videos", "/mnt/videos")) for clip in clips]
    assert run(a_plan(tmp_path / "in", moved), output)[0] == 0
    table = read_table(output, plan.shards[0].name)
    assert table.provenance["autoencoder"] == "one" and table.provenance["bucket"]["num_frames"] == 16


def test_a_manifest_added_behind_leaves_whole_shards_alone(tmp_path):
    """Of 8 clips in threes, the last shard had two: it and a new one are made."""
    first, more = [a_clip(n) for n in range(8)], [a_clip(n, source="more") for n in range(8, 12)]
    assert run(a_plan(tmp_path / "in", first), tmp_path / "out")[0] == 8
    plan = a_plan(tmp_path / "in", first, more)
    number, summary = run(plan, tmp_path / "out")
    assert (number, summary["train"]) == (6, 12)
    tables = [read_table(tmp_path / "out", shard.name) for shard in plan.shards]
    assert [s for t in tables for s in t.rows["source"].to_pylist()] == [""] * 8 + ["more"] * 4
    assert run(a_plan(tmp_path / "in", first[:4]), tmp_path / "out")[0] == 1
    assert len([*(tmp_path / "out").glob("*.tar")]) == 2, "shards no index names are gone"
    assert sorted(indexed_train(tmp_path / "out")) == [f"clip{n}" for n in range(4)]


def indexed_train(output):
    reader = LatentReader(output)
    return [sample.clip_id for sample in reader.read(range(len(reader)))]


def test_of_clips_with_one_id_the_first_counts_and_the_others_are_named(tmp_path):
    first = [a_clip(n) for n in range(4)]
    plan = a_plan(tmp_path / "in", first, [a_clip(2, caption="another"), a_clip(5)])
    _, summary = run(plan, tmp_path / "out")
    assert summary["train"] == 5
    samples = LatentReader(tmp_path / "out").read(range(5))
    assert {s.clip_id: s.caption for s in samples}["clip2"] == "caption 2"
    (entry,) = map(json.loads, lines(tmp_path / "out" / "quarantine.jsonl"))
    assert entry["clip_id"] == "clip2" and "has the same id" in entry["reason"]
    assert [*summary["refused"].values()] == [1]
    assert "1 refused: another clip" in told("out", summary | {"encoded": 5, "seconds": 1})


def test_clips_without_a_bucket_are_counted_by_reason_and_named(tmp_path):
    clips = [a_clip(0), a_clip(1, 0.1), a_clip(2, 0.2), a_clip(3, width_px=2000)]
    plan = a_plan(tmp_path / "in", clips)
    _, summary = run(plan, tmp_path / "out")
    assert summary["train"] == 1 and sorted(summary["refused"].values()) == [1, 2]
    assert {json.loads(line)["clip_id"] for line in lines(tmp_path / "out/quarantine.jsonl")} == {
        "clip1",
        "clip2",
        "clip3",
    }


def test_each_clip_has_the_shape_the_seconds_and_the_rate_of_its_bucket(tmp_path):
    """Durations as in `buckets.tiny`: 8 frames of all of 0.6 s, 16 a second of the middle of 5 s."""
    clips = [a_clip(0, 0.6), a_clip(1, 5.0), a_clip(2, 0), a_clip(3, 5.0, width_px=256)]
    plan = a_plan(tmp_path / "in", clips)
    run(plan, tmp_path / "out")
    reader = LatentReader(tmp_path / "out")
    found = {s.clip_id: (s.latent_TCHW.shape, round(s.fps, 3)) for s in reader.read(range(4))}
    assert found == {
        "clip0": ((1, 3, 8, 8), round(8 / 0.6, 3)),
        "clip1": ((2, 3, 8, 8), 16.0),
        "clip2": ((1, 3, 8, 8), 16.0),
        "clip3": ((2, 3, 6, 12), 16.0),
    }
    (wide,) = [shard for shard in plan.shards if shard.bucket.width_px == 96]
    (clip,), _ = plan.clips_of(wide)
    assert (clip.start_seconds, clip.end_seconds) == (3.0, 4.0)  # the middle second of 1 to 6


def in_child(work):
    """Run `work` in a process of its own; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("call", range(1, 12, 2))
def test_sigkill_between_any_two_renames_loses_the_shard_under_way_at_most(tmp_path, monkeypatch, call):
    clips = [a_clip(n, split="heldout" if n > 8 else "train") for n in range(12)]
    plan = a_plan(tmp_path / "in", clips)
    run(plan, tmp_path / "whole")
    output, whole = tmp_path / "killed", os.replace
    calls = []

    def dies(source, target):
        calls.append(target)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    def work():
        monkeypatch.setattr(os, "replace", dies)
        run(plan, output)

    assert in_child(work) == -signal.SIGKILL
    number, _ = run(plan, output)
    assert number >= 12 - 3 * (call // 2)
    assert files(output) == files(tmp_path / "whole")


def test_a_full_disk_is_named_and_leaves_no_half_shard(tmp_path):
    """A limit on the size of a file stands for the disk: the images fit, the clips do not."""
    clips = [a_clip(n, 0) for n in range(3)] + [a_clip(n) for n in range(3, 9)]
    plan = a_plan(tmp_path / "in", clips, samples_per_shard=6)
    run(plan, tmp_path / "whole")
    sizes = sorted(len(data) for (_, name), data in files(tmp_path / "whole").items() if name.endswith("tar"))
    output, said = tmp_path / "full", tmp_path / "said"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 2000, resource.RLIM_INFINITY))
        try:
            run(plan, output)
        except ValueError as error:
            said.write_text(str(error) if _is_users_mistake(error) else "a stack trace")

    assert in_child(work) == 0
    large = max(plan.shards, key=lambda shard: len(shard.rows)).name
    assert f"{output / large}.tar cannot be written: File too large; make room" in said.read_text()
    left = {path.name for path in output.iterdir()}
    assert left == {"empty_prompt.npz", *(f"{plan.shards[0].name}.{end}" for end in ("tar", "parquet"))}
    assert run(plan, output)[0] == 6
    assert files(output) == files(tmp_path / "whole")


def test_a_split_without_a_readable_clip_stops_the_other_from_nothing(tmp_path):
    clips = [a_clip(0), a_clip(1), a_clip(2, split="heldout", path="/videos/bad.mp4")]
    _, summary = run(a_plan(tmp_path / "in", clips), tmp_path / "out")
    assert (summary["train"], summary["heldout"], summary["quarantined"]) == (2, 0, ["clip2"])
    assert len(LatentReader(tmp_path / "out")) == 2
    with pytest.raises(ValueError, match="no finished latents"):
        LatentReader(tmp_path / "out_heldout")
    with pytest.raises(ValueError, match="no sample was written; were all clips quarantined"):
        run(a_plan(tmp_path / "in", [a_clip(0, path="/videos/bad.mp4")]), tmp_path / "out")


def test_a_shard_holds_about_a_gibibyte_whatever_its_bucket(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", [a_clip(n) for n in range(1200)])
    large = Bucket(num_frames=256, height_px=768, width_px=768, fps=16)
    small = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)
    assert [len(s.rows) for s in plan_shards([path], bucket=small).shards] == [1000, 200]
    sizes = [len(s.rows) for s in plan_shards([path], bucket=large).shards]
    assert sizes[0] == 113 and sizes[0] * 32 * 96 * 96 * 16 * 2 < 2**30 < 114 * 32 * 96 * 96 * 16 * 2


def test_a_set_of_shards_with_one_sample_twice_is_refused(tmp_path):
    with latent_writer.LatentWriter(tmp_path) as writer:
        writer.add(latent_sample(1))
    for name in ("a-000000", "b-000000"):
        with latent_writer.ShardWriter(tmp_path, name) as writer:
            writer.add(latent_sample(1))
            writer.finish()
    with pytest.raises(ValueError, match="sample clip1 is in two shards"):
        latent_writer.finish_folder(tmp_path, ["a-000000", "b-000000"])


def latent_sample(number):
    from nemo_moviegen.data.latents import LatentSample

    latent = np.zeros((1, 3, 2, 2), np.float32)
    return LatentSample(
        sample_id=number, clip_id=f"clip{number}", caption="", fps=16.0, latent_TCHW=latent, contexts={}
    )
