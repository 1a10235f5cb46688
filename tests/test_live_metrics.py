"""Reading metrics.jsonl of a run that goes on, and of one that went on for months."""

import json
import math
import os

import pytest
from live_runs import metrics_row, validation, write_run

from nemo_moviegen.live.metrics_file import NUM_RECENT, MetricsFile, series


def read(folder, **settings):
    metrics = MetricsFile(folder, **settings)
    metrics.read()
    return metrics


def append(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def steps(rows):
    return [row["step"] for row in rows]


def test_only_what_was_appended_is_read(tmp_path):
    folder = write_run(tmp_path, [metrics_row(step) for step in (1, 2, 3)])
    metrics = read(folder)
    (folder / "metrics.jsonl").open("r+").write("#" * 20)  # who reads it again finds no row of step 1
    append(folder, json.dumps(metrics_row(4)) + "\n")
    metrics.read()
    assert steps(metrics.rows) == steps(metrics.recent) == [1, 2, 3, 4]


def test_a_line_that_is_being_written_is_taken_when_it_is_whole(tmp_path):
    folder = write_run(tmp_path, [metrics_row(1)])
    line = json.dumps(metrics_row(2))
    append(folder, line[:20])
    metrics = read(folder)
    assert steps(metrics.rows) == [1]
    append(folder, line[20:] + "\n")
    metrics.read()
    assert steps(metrics.rows) == [1, 2]


def test_a_resumed_run_that_wrote_the_file_anew_is_read_anew(tmp_path):
    folder = write_run(tmp_path, [metrics_row(step) for step in range(1, 9)])
    metrics = read(folder)
    part = tmp_path / "part"
    part.write_text("".join(json.dumps(metrics_row(step)) + "\n" for step in range(1, 13)))
    os.replace(part, folder / "metrics.jsonl")
    metrics.read()
    assert steps(metrics.rows) == list(range(1, 13))


def test_a_torn_line_of_a_killed_run_is_left_out(tmp_path):
    folder = write_run(tmp_path, [metrics_row(1)])
    append(folder, '{"step": 2, "train/lo\n' + json.dumps(metrics_row(3)) + "\n7\n")
    metrics = read(folder)
    assert steps(metrics.rows) == steps(metrics.recent) == [1, 3]


def test_no_metrics_yet_are_no_rows(tmp_path):
    metrics = read(write_run(tmp_path, []))
    assert metrics.rows == metrics.recent == metrics.measured == []


@pytest.mark.parametrize("image_every", [2, 3, 4, 11])
def test_what_is_kept_of_a_long_run_is_even_and_has_its_share_of_images(tmp_path, image_every):
    """A share by a fixed stride would have no image, or nothing but images, where periods meet."""
    rows = [
        {"step": step, "train/is_image": int(step % image_every == image_every - 1)} for step in range(20000)
    ]
    kept = read(write_run(tmp_path, rows), most_rows=500).rows
    assert 250 <= len(kept) <= 500
    gaps = [b - a for a, b in zip(steps(kept), steps(kept)[1:], strict=False)]
    assert max(gaps) <= 3 * 20000 / len(kept)
    share = sum(row["train/is_image"] for row in kept) / len(kept)
    assert share == pytest.approx(1 / image_every, rel=0.25)


def test_reading_bit_by_bit_keeps_what_reading_at_once_keeps(tmp_path):
    lines = [json.dumps(metrics_row(step)) + "\n" for step in range(3000)]
    folder = write_run(tmp_path, [])
    metrics = MetricsFile(folder, most_rows=100)
    for start in range(0, 3000, 170):
        append(folder, "".join(lines[start : start + 170]))
        metrics.read()
    assert metrics.rows == read(folder, most_rows=100).rows


def test_the_last_rows_are_all_there(tmp_path):
    metrics = read(write_run(tmp_path, [metrics_row(step) for step in range(3000)]), most_rows=100)
    assert steps(metrics.recent) == list(range(3000 - NUM_RECENT, 3000))


def test_every_measurement_is_found_and_the_last_of_very_many_too(tmp_path):
    rows = [metrics_row(step, **(validation(step) if step % 100 == 0 else {})) for step in range(1, 5001)]
    folder = write_run(tmp_path, rows)
    assert steps(read(folder, most_rows=60).measured) == list(range(100, 5001, 100))
    few = read(folder, most_rows=20).measured
    assert len(few) <= 21 and few[-1]["step"] == 5000


def test_an_autoencoders_held_out_line_counts_as_a_measurement(tmp_path):
    folder = write_run(tmp_path, [metrics_row(1), {"step": 1, "heldout/psnr_db": 30.5}])
    assert series(read(folder).measured, "heldout/psnr_db") == ([1], [30.5])


def test_a_series_leaves_out_what_is_no_number(tmp_path):
    losses = (1.0, math.nan, math.inf, None, 2.0)
    rows = [metrics_row(step, **{"train/loss": loss}) for step, loss in enumerate(losses)]
    rows = read(write_run(tmp_path, rows)).rows
    assert series(rows, "train/loss") == ([0, 4], [1.0, 2.0])
    assert series(rows, "train/loss", lambda row: row["step"] > 0) == ([4], [2.0])
