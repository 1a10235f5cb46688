"""Which clips become which shards: buckets, duplicates, what is refused, and what makes a shard another."""

import json
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoding import MADE_WITH, a_clip, a_plan, files, indexed_train, lines, run, some_clips, stand_in

from nemo_moviegen.data.clips import read_manifest, write_manifest
from nemo_moviegen.data.encoded import told
from nemo_moviegen.data.latent_writer import read_table
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.shard_plan import plan_shards
from nemo_moviegen.inputs import Bucket

pytestmark = pytest.mark.usefixtures(stand_in.__name__)


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


def test_clips_of_one_id_within_a_manifest_stop_nobody_either(tmp_path):
    manifest = write_manifest(tmp_path / "in.parquet", [a_clip(n) for n in range(4)])
    rows = pq.read_table(manifest)
    pq.write_table(pa.concat_tables([rows, rows.slice(1, 1)]), manifest)
    with pytest.raises(ValueError, match="two clips are called 'clip1'"):
        read_manifest(manifest)
    plan = plan_shards([manifest], bucket=Bucket(num_frames=16, height_px=64, width_px=64, fps=16))
    assert [clip_id for clip_id, _, _ in plan.refused] == ["clip1"]
    assert sorted(row for shard in plan.shards for row in shard.rows) == [0, 1, 2, 3]


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


def test_a_shard_holds_about_a_gibibyte_whatever_its_bucket(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", [a_clip(n) for n in range(1200)])
    large = Bucket(num_frames=256, height_px=768, width_px=768, fps=16)
    small = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)
    assert [len(s.rows) for s in plan_shards([path], bucket=small).shards] == [1000, 200]
    sizes = [len(s.rows) for s in plan_shards([path], bucket=large).shards]
    assert sizes[0] == 113 and sizes[0] * 32 * 96 * 96 * 16 * 2 < 2**30 < 114 * 32 * 96 * 96 * 16 * 2


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
