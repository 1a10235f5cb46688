"""Where a run stands: what the page and `moviegen progress` say of it."""

import json
import os
from dataclasses import dataclass

import pytest
from live_runs import metrics_row, validation, write_beats, write_run

from nemo_moviegen.live.metrics_file import MetricsFile
from nemo_moviegen.live.status import behind, duration, read_status

NOW = 2e9


@dataclass(frozen=True)
class Beat:
    rank: int
    step: int = 50
    unix_seconds: float = NOW - 5
    phase: str = "training"
    host: str = "n1"


def status_of(folder, *, written=NOW - 5, **settings):
    """The status at NOW of a run that wrote its last step at `written`."""
    metrics = MetricsFile(folder)
    metrics.read()
    for file in folder.glob("*.*"):
        os.utime(file, (written, written))
    return read_status(folder, metrics, now=NOW, **settings)


def run(tmp_path, last, **changes):
    return write_run(tmp_path, [metrics_row(step, **changes) for step in range(1, last + 1)])


@pytest.mark.parametrize(
    ("last", "written", "ended", "state"),
    [
        (0, NOW - 5, False, "waiting"),
        (50, NOW - 5, False, "running"),
        (50, NOW - 299, False, "running"),
        (50, NOW - 301, False, "silent"),
        (50, NOW - 5, True, "ended"),
        (100, NOW - 9999, False, "finished"),
        (100, NOW - 5, True, "finished"),
        (0, NOW - 9999, False, "silent"),
    ],
)
def test_a_run_waits_runs_is_silent_or_is_over(tmp_path, last, written, ended, state):
    assert status_of(run(tmp_path, last), written=written, ended=ended).state == state


def test_a_run_of_long_steps_may_take_twenty_of_them(tmp_path):
    folder = run(tmp_path, 50, **{"speed/step_seconds": 60.0})
    assert status_of(folder, written=NOW - 1100).state == "running"
    found = status_of(folder, written=NOW - 1300)
    assert found.state == "silent"
    assert "no step for 21 min: the run has ended without saying so, or hangs" in found.problems


def test_the_time_to_go_is_that_of_the_steps_left_with_their_validation_and_samples(tmp_path):
    rows = [metrics_row(step) for step in range(1, 51)]
    rows[24] |= validation(1.0)  # 4 seconds
    rows[49] |= {"samples/seconds": 6.0}
    found = status_of(write_run(tmp_path, rows))
    assert found.eta == pytest.approx(50 * (2.0 + 10.0 / 50))
    assert status_of(run(tmp_path / "done", 100)).eta is None


def test_facts_are_of_the_recent_steps_clips_and_images_apart(tmp_path):
    rows = [metrics_row(step, **({"train/loss": 99.0} if step <= 100 else {})) for step in range(1, 301)]
    rows[-1] |= {"speed/mfu": 0.9, "speed/data_seconds": 2.0, "memory/peak_gib": 70.0}
    facts = status_of(write_run(tmp_path, rows, num_steps=1000)).facts
    assert (facts["train/loss of clips"], facts["train/loss of images"]) == (1.0, 0.5)
    assert facts["speed/mfu"] == 0.4  # the median: one step says nothing
    assert facts["memory/peak_gib"] == 70.0
    assert facts["speed/data_wait"] == pytest.approx((199 * 0.02 + 2.0) / (200 * 2.0))


def test_who_hangs_is_a_step_behind_those_who_wait_and_is_named_first():
    waiting = [Beat(rank) for rank in range(8) if rank not in (3, 5)]
    slow, hanging = Beat(5, step=48), Beat(3, step=47, unix_seconds=NOW - 400)
    assert behind([*waiting, slow, hanging], NOW, 300) == [hanging, slow]


def test_a_rank_one_step_behind_is_not_late_but_a_silent_one_is():
    assert behind([Beat(0), Beat(1, step=49)], NOW, 300) == []
    silent = Beat(1, unix_seconds=NOW - 301)
    assert behind([Beat(0), silent], NOW, 300) == [silent]
    assert behind([], NOW, 300) == []


def test_ranks_that_are_behind_are_a_problem_while_the_run_goes_on_only(tmp_path):
    folder = run(tmp_path, 50)
    write_beats(folder, [(0, "n1", 50, NOW - 5, "training"), (1, "n2", 40, NOW - 350, "saving")])
    found = status_of(folder)
    assert [(beat.rank, beat.host) for beat in found.behind] == [(1, "n2")]
    assert found.problems == ("1 of 2 ranks are behind: rank 1 (n2, step 40, saving)",)
    over = status_of(folder, ended=True)
    assert (over.behind, over.problems, len(over.beats)) == ((), (), 2)


@pytest.mark.parametrize(("mfu", "hfu", "key"), [(0.7, 0.93, "HFU"), (1.3, 1.3, "HFU"), (0.7, 0.75, "")])
def test_more_than_a_kernel_can_reach_is_a_counting_error(tmp_path, mfu, hfu, key):
    problems = status_of(run(tmp_path, 50, **{"speed/mfu": mfu, "speed/hfu": hfu})).problems
    assert bool(problems) == bool(key)
    assert all(problem.startswith(f"{key}: counting error: {hfu:.1%}") for problem in problems)


def test_waiting_for_data_and_rollbacks_are_problems_a_skipped_step_is_none(tmp_path):
    folder = run(tmp_path, 50, **{"speed/data_seconds": 0.5})
    skipped = [{"step": 7, "reason": "loss is nan"}, {"step": 8, "rolled_back_to": "step=5"}]
    (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped) + '{"st')
    found = status_of(folder)
    assert len(found.skipped) == 2
    assert [problem.split(":")[0] for problem in found.problems] == [
        "rollbacks 1, the last at step 8",
        "25% of the step time is waiting for data",
    ]


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it holds no recipe.yaml; give the output"):
        status_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        status_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="is no recipe: it holds list"):
        status_of(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (12000, "3 h 20 min"), (1051200, "12 d 4 h")],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said
