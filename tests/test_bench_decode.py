"""The benchmark of decoding: all ways give the same frames, the harness counts and tells what fails."""

import json
import time

import pytest
import torch
from shown import a_video, whole

from nemo_moviegen.bench import decode
from nemo_moviegen.bench.loader import bench_loader, first_batch, soak
from nemo_moviegen.bench.measure import measure, summarise, table
from nemo_moviegen.recipe import Bucket

BUCKET = Bucket(num_frames=6, height_px=32, width_px=32, fps=12)


def test_the_plain_ways_show_our_frames(tmp_path):
    clips = [whole(a_video(tmp_path / "a.mp4", fps=24, num_frames=24))]
    assert decode.difference(clips, BUCKET) < 0.02
    # frames of another time are far away: what is compared is which frames are shown
    late = Bucket(num_frames=6, height_px=32, width_px=32, fps=6)
    other = decode.pyav_frames(clips[0], late, decode.resize_bytes)
    assert (other - decode.pyav_frames(clips[0], BUCKET, decode.resize_bytes)).abs().mean() > 0.03
    as_bytes, as_float = (
        decode.pyav_frames(clips[0], BUCKET, way) for way in (decode.resize_bytes, decode.resize_float)
    )
    assert (as_bytes - as_float).abs().max() < 0.02 and as_bytes.dtype == as_float.dtype == torch.float32


def test_clips_of_a_folder_take_turns_and_what_is_no_video_is_passed_over(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        a_video(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    clips = decode.find_clips(tmp_path, BUCKET)
    assert [clip.clip_id for clip in clips] == ["a-00000", "b-00000", "a-00001", "b-00001"]
    with pytest.raises(ValueError, match="no video of 50 s or more"):
        decode.find_clips(tmp_path, Bucket(num_frames=600, height_px=32, width_px=32, fps=12))


def test_ways_take_turns_and_one_that_fails_is_told_while_the_others_go_on():
    def steady(seconds):
        for _ in range(4):
            time.sleep(seconds)
            yield {"samples": 2, "frames": 10}

    def broken():
        yield {"samples": 1, "frames": 1}
        raise OSError("no such library")

    ways = {"slow": lambda: steady(0.02), "broken": broken, "quick": lambda: steady(0.002)}
    measured, failed = measure(ways, rounds=2)
    assert failed == {"broken": "OSError: no such library"}
    assert {name: len(found) for name, found in measured.items()} == {"slow": 2, "quick": 2}
    assert measured["slow"][0].counts == {"samples": 6, "frames": 30}  # the first batch warms up
    assert all(one.seconds >= 0.06 for one in measured["slow"])
    rows = summarise(measured, "slow")
    assert rows[0]["ratio"] == 1 and rows[0]["frames_per_second"] == pytest.approx(
        5 * rows[0]["samples_per_second"]
    )
    assert table("title", rows, failed).row_count == 3


def test_the_command_decodes_a_folder_every_way_and_writes_json(tmp_path):
    (tmp_path / "films").mkdir()
    a_video(tmp_path / "films" / "a.webm")
    output = tmp_path / "found.json"
    told = []
    bench_loader(
        ["decode"],
        videos=tmp_path / "films",
        bucket=BUCKET,
        batch_size=2,
        rounds=1,
        output=output,
        log=told.append,
    )
    found = json.loads(output.read_text())
    (rows,) = [one["rows"] for one in found["decode"].values()]
    assert {"moviegen", "moviegen, DALI decodes", decode.PLAIN, "PyAV, one thread"} <= {
        r["name"] for r in rows
    }
    assert all(row["samples_per_second"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert found["environment"]["cores"] >= 1 and len(told) == 1


def test_memory_and_the_first_batch_are_measured(tmp_path):
    found = soak(tmp_path / "soak", 160, warm_up=40)
    assert found["samples"] == 160 and found["most"] >= found["early"] > 0
    assert first_batch(tmp_path / "start", num_clips=50)["clips"] == 50
