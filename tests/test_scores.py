"""Shares and their intervals, and the benchmark's own counting."""

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_moviegen.data.synthetic import caption, draw_spec, render
from nemo_moviegen.evaluation.scores import score_rows, scores_note, shown_scores, wilson_interval
from nemo_moviegen.evaluation.shapes import ATTRIBUTES, JOINT, evaluate_shapes, judge
from nemo_moviegen.generation.files import sample_file
from nemo_moviegen.video_files import write_mp4


@pytest.mark.parametrize(
    ("right", "of", "expected"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_the_interval_is_wilsons(right, of, expected):
    assert wilson_interval(right, of) == pytest.approx(expected, abs=5e-5)
    low, high = wilson_interval(of - right, of)
    assert (1 - high, 1 - low) == pytest.approx(expected, abs=5e-5)


def test_no_sample_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [low <= 0.9 <= high for low, high in (wilson_interval(k, 48) for k in rng.binomial(48, 0.9, 4000))]
    assert 0.93 < np.mean(held) < 0.98


def test_a_row_counts_its_own_group_and_what_has_the_attribute():
    samples = [{"group": "seen", "right": {"color": c, "shape": True}} for c in (True, True, False)]
    samples += [{"group": "held out", "right": {"color": True}}]
    rows = score_rows(samples, ("color", "shape", "speed"))
    told = [(row["group"], row["attribute"], row["right"], row["of"]) for row in rows]
    assert told == [("seen", "color", 2, 3), ("seen", "shape", 3, 3), ("held out", "color", 1, 1)]
    heads, cells = shown_scores({"rows": rows})
    assert heads == ["", "seen, 3 prompts", "held out, 1 prompts"]
    assert cells == [["color", "66.7% (21-94)", "100.0% (21-100)"], ["shape", "100.0% (44-100)", "-"]]


def test_a_sample_is_judged_by_its_file(tmp_path):
    spec, other = draw_spec(0, 0), draw_spec(0, 1)
    video_TCHW = render(spec).transpose(0, 3, 1, 2) / 127.5 - 1
    file = write_mp4(video_TCHW, tmp_path / "videos" / "000.mp4", 16)
    judged = judge(file, "seen", caption(spec), spec, 16)
    assert set(judged["right"]) == set(ATTRIBUTES) and all(judged["right"].values())
    assert judged["file"] == "videos/000.mp4"
    wrong = judge(file, "seen", caption(other), other, 16)["right"]
    assert not wrong["all words"] and wrong["one shape"]
    assert wrong[JOINT] == (wrong["color"] and wrong["direction"])


def test_numbers_that_make_no_benchmark_are_refused(tmp_path):
    for seen, heldout in ((0, 0), (-1, 4)):
        with pytest.raises(ValueError, match="ask for one at least"):
            evaluate_shapes(None, tmp_path, num_seen=seen, num_heldout=heldout)


def test_the_note_says_what_was_sampled():
    settings = {"num_frames": 16, "height_px": 64, "recipe": "tiny.t2iv", "schedule": "linear, 4 Euler steps"}
    note = scores_note({"settings": settings | {"guidance_scale": 3.0}})
    assert "16 frames of 64 px" in note and "tiny.t2iv, linear, 4 Euler steps, guidance 3." in note


def fake_generate(models, prompts, output, bucket, sampler, *, tiling, task):
    """In place of sampling: renders what seen prompts say, and for the others what the first one says."""
    specs = {caption(draw_spec(0, n)): draw_spec(0, n) for n in range(4)}
    for row in range(task[0], len(prompts), task[1]):
        spec = specs.get(prompts[row], draw_spec(0, 0))
        video_TCHW = render(spec, bucket.num_frames, bucket.height_px, bucket.fps).transpose(0, 3, 1, 2)
        write_mp4(
            video_TCHW / 127.5 - 1, sample_file(output, row, prompts[row], bucket.num_frames), bucket.fps
        )
    told = Path(output, f"settings-{task[0]}.json")
    told.write_text(json.dumps({"fps": bucket.fps, "samples": [], "seed": 0}))
    return [told]


def test_tasks_share_the_videos_and_the_last_one_reads_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nemo_moviegen.evaluation.shapes.generate", fake_generate)
    asked = {"num_seen": 4, "num_heldout": 2, "rates": (16.0, 24.0)}
    assert evaluate_shapes(None, tmp_path, task=(1, 2), **asked) is None
    assert "other tasks owe 6 videos" in capsys.readouterr().out
    scores = evaluate_shapes(None, tmp_path, task=(0, 2), **asked)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    share = {(row["group"], row["attribute"]): row["share"] for row in scores["rows"]}
    for fps in ("16", "24"):
        assert share[f"seen, {fps} fps", "all words"] == 1
        assert share[f"held out, {fps} fps", "all words"] == 0
    assert [sample["asked"]["color"] for sample in scores["samples"][:4]] == [
        draw_spec(0, n).color for n in range(4)
    ]
    assert scores["settings"] == {"fps": [16.0, 24.0], "seed": 0}
