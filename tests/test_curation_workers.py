"""Several processes score what one would, stop together, and say it when one of them was killed."""

import json
import os
import signal
from dataclasses import replace

import pytest
from films import film, pan, still, zoom

import recipes
from nemo_moviegen import __main__ as cli
from nemo_moviegen.curation.recipe import Scorer
from nemo_moviegen.curation.run import MANIFEST, curate
from nemo_moviegen.curation.score import ScorerError
from nemo_moviegen.curation.videos import list_videos
from nemo_moviegen.curation.work import scored_table
from nemo_moviegen.data.clips import read_manifest

TINY = replace(recipes.get_curation("curation.tiny"), num_chunks=5)


def broken(seen):
    raise KeyError("weights")


def deadly(seen):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / "in"
    for number, make in enumerate([pan, still, zoom, pan, zoom, pan]):
        film(folder, f"{number}.mp4", make(number))
    (folder / "broken.mp4").write_text("no film")
    return folder


def scored_by(name):
    """The recipe with one more scorer, a function of this file, which workers import by its name."""
    return replace(TINY, scorers=(*TINY.scorers, Scorer(column="own", function=f"{__name__}:{name}")))


def test_workers_score_what_one_process_scores(films, tmp_path):
    one = curate(films, tmp_path / "one", TINY)
    told = curate(films, tmp_path / "three", TINY, workers=3)
    assert told == one
    assert told["num_scored"] == 7
    assert list(read_manifest(tmp_path / "three" / MANIFEST)) == list(
        read_manifest(tmp_path / "one" / MANIFEST)
    )
    tables = [scored_table(list_videos(films, tmp_path / n), tmp_path / n, TINY)[0] for n in ("one", "three")]
    assert tables[0].equals(tables[1])
    assert curate(films, tmp_path / "three", TINY, workers=2)["num_scored"] == 0


def test_workers_of_tasks_share_out_every_video_once(films, tmp_path):
    done = [curate(films, tmp_path / "out", TINY, task=(index, 2), workers=2) for index in (0, 1)]
    assert sum(part["num_scored"] for part in done) == 7
    assert "num_clips" not in done[0]
    assert done[1]["num_clips"] > 0


def test_a_scorer_that_fails_in_a_worker_ends_the_run(films, tmp_path):
    with pytest.raises(ScorerError, match=r"broken.*weights"):
        curate(films, tmp_path, scored_by("broken"), workers=2)
    assert not (tmp_path / MANIFEST).exists()


def test_a_killed_worker_is_told(films, tmp_path):
    with pytest.raises(ValueError, match=r"one of 2 workers was killed, mostly for want of memory.*fewer"):
        curate(films, tmp_path, scored_by("deadly"), workers=2)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers(films, tmp_path, workers):
    with pytest.raises(ValueError, match=f"{workers} workers: use 1, or as many as this task has cores"):
        curate(films, tmp_path, TINY, workers=workers)


def test_from_the_command_line(films, tmp_path, capsys):
    command = [
        "curate",
        str(films),
        str(tmp_path),
        "--recipe",
        "curation.tiny",
        "num_chunks=5",
        "--workers",
        "2",
    ]
    assert cli.main(command) == 0
    assert "7 videos scored" in capsys.readouterr().out
    assert json.loads((tmp_path / "funnel.json").read_text())
