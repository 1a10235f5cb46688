"""Scoring does each piece of work once: over any number of tasks, killed anywhere, whatever changes later."""

import contextlib
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from films import film, letterboxed, pan, slideshow, still, zoom
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from nemo_moviegen.curation import footage, look, scenes, score, store, work
from nemo_moviegen.curation import run as run_module
from nemo_moviegen.curation.recipe import Scorer, override
from nemo_moviegen.curation.run import curate
from nemo_moviegen.curation.score import file_key
from nemo_moviegen.curation.videos import Listing, Video, chunk_of, list_videos
from nemo_moviegen.data.clips import read_manifest

TINY = replace(recipes.get_curation("curation.tiny"), num_chunks=5)


def bright(seen):
    """A scorer of a user's own."""
    return seen.frames_THWC.mean()


def broken(seen):
    raise KeyError("weights")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder `in` of films and the folder `out` of its curation, for `films` to copy."""
    folder = tmp_path_factory.mktemp("scored") / "in"
    film(folder, "pan.mp4", pan(1))
    film(folder, "a/zoom.webm", zoom(2))
    film(folder, "a/still.mp4", still(3))
    film(folder, "box.mp4", letterboxed(pan(4)))
    film(folder, "slides.mp4", slideshow(5))
    film(folder, "small.mp4", pan(6)[:, :48, :48])
    (folder / "broken.mp4").write_text("no film")
    curate(folder, folder.parent / "out", TINY)
    return folder.parent


@pytest.fixture
def films(scored, tmp_path):
    """The folder of films; its curation lies beside it in `out`, finished."""
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in"


@pytest.fixture
def calls(monkeypatch):
    """How often files were opened for their facts, for their scenes and for their clips, and who scored."""
    counted = Counter()

    def count(module, name, key):
        function = getattr(module, name)

        def counting(first, *rest):
            counted[key or first] += 1
            return function(first, *rest)

        monkeypatch.setattr(module, name, counting)

    count(footage, "read_facts", "facts")
    count(scenes, "find_scenes", "scenes")
    count(look, "look_at", "looks")
    count(score, "_call", None)
    return counted


def run(folder, output, calls, recipe=TINY, **changes):
    """Calls of one curation."""
    calls.clear()
    curate(folder, output, replace(recipe, **changes))
    return dict(calls)


def left(output):
    return {clip.clip_id.split("@")[0] for clip in read_manifest(output / "manifest.parquet")}


def test_costly_scorers_run_on_what_passes_the_header_alone_and_once(films, tmp_path, calls):
    done = run(films, tmp_path / "new", calls)
    assert (done["facts"], done["scenes"], done["looks"]) == (7, 5, 4)  # slides.mp4 has no clip
    assert {count for name, count in done.items() if ":" in name} == {4}
    assert run(films, tmp_path / "new", calls) == {}
    assert left(tmp_path / "new") == left(tmp_path / "out") == {"pan.mp4", "a/zoom.webm"}


def test_no_stricter_threshold_and_none_on_scores_decodes_anything(films, tmp_path, calls):
    """Every filter, both ways: a header's threshold decodes only what it lets through anew."""
    listing = list_videos(films, tmp_path / "out")
    for entry in TINY.filters:
        strict = override(TINY, [f"filters.{entry.name}.low=9e8", f"filters.{entry.name}.high=9e9"])
        assert work.score_missing(listing, tmp_path / "out", strict) == 0
        table, missing = work.scored_table(listing, tmp_path / "out", strict)
        assert not missing and len(table) == 7
        for side, limit in {"low": "-.inf", "high": ".inf"}.items():
            if (entry.name, side) != ("resolution", "low"):
                loose = override(TINY, [f"filters.{entry.name}.{side}={limit}"])
                assert work.score_missing(listing, tmp_path / "out", loose) == 0
    assert not calls


def test_a_relaxed_header_threshold_scores_what_it_lets_through(films, tmp_path, calls):
    relaxed = override(TINY, ["filters.resolution.low=32"])
    done = run(films, tmp_path / "out", calls, relaxed)
    assert (done.pop("scenes"), done.pop("looks")) == (1, 1) and set(done.values()) == {1}
    assert left(tmp_path / "out") == {"pan.mp4", "a/zoom.webm", "small.mp4"}
    # and back: scores stay, the selection does not use them
    assert run(films, tmp_path / "out", calls) == {}
    assert left(tmp_path / "out") == {"pan.mp4", "a/zoom.webm"}


def test_a_changed_file_is_scored_again_and_no_other(films, tmp_path, calls):
    os.utime(films / "pan.mp4", ns=(1, 1))  # as when another of the same size takes its place
    assert run(films, tmp_path / "out", calls)["facts"] == 1
    film(films, "a/still.mp4", pan(3))
    os.utime(films / "a/still.mp4", ns=(1, 1))
    done = run(films, tmp_path / "out", calls)
    assert (done["facts"], done["scenes"], done["looks"]) == (1, 1, 1)
    assert left(tmp_path / "out") == {"pan.mp4", "a/zoom.webm", "a/still.mp4"}
    film(films, "new.mp4", pan(8))
    (films / "pan.mp4").unlink()
    assert run(films, tmp_path / "out", calls)["facts"] == 1
    assert left(tmp_path / "out") == {"a/zoom.webm", "a/still.mp4", "new.mp4"}


def test_another_scorer_fills_its_column_and_no_other(films, tmp_path, calls):
    function = f"{__name__}:bright"
    mine = override(TINY, [f"scorers.aesthetics.function={function}", "filters.aesthetics.low=0"])
    assert run(films, tmp_path / "out", calls, mine) == {"looks": 4, function: 4}
    more = replace(mine, scorers=(*mine.scorers, Scorer(column="light", function=function)))
    assert run(films, tmp_path / "out", calls, more) == {"looks": 4, function: 4}
    assert run(films, tmp_path / "out", calls, more) == {}


def test_a_scorer_of_another_version_scores_again(films, tmp_path, calls, monkeypatch):
    mine = override(TINY, [f"scorers.aesthetics.function={__name__}:bright"])
    run(films, tmp_path / "out", calls, mine)
    monkeypatch.setattr(bright, "version", "2", raising=False)
    score.keys.cache_clear()
    assert run(films, tmp_path / "out", calls, mine) == {"looks": 4, f"{__name__}:bright": 4}
    score.keys.cache_clear()


def test_other_spans_keep_facts_and_score_the_clips_again(films, tmp_path, calls):
    done = run(films, tmp_path / "out", calls, seed=1)
    assert "facts" not in done and (done["scenes"], done["looks"]) == (5, 4)


def test_a_scorer_that_fails_stops_the_run_and_blames_no_video(films, tmp_path, calls):
    mine = override(TINY, [f"scorers.aesthetics.function={__name__}:broken"])
    with pytest.raises(RuntimeError, match=r"broken failed: KeyError: 'weights'"):
        curate(films, tmp_path / "out", mine)
    with pytest.raises(ValueError, match="there is no function test_curation_scoring:missing"):
        curate(films, tmp_path / "out", override(TINY, [f"scorers.quality.function={__name__}:missing"]))
    assert run(films, tmp_path / "out", calls) == {}


def test_tasks_share_the_videos_out_and_the_last_selects(films, tmp_path, calls):
    done = [curate(films, tmp_path / "new", TINY, (index, 3)) for index in (2, 0, 1)]
    assert sum(part["num_scored"] for part in done) == calls["facts"] == 7
    assert ["num_clips" in part for part in done] == [False, False, True]
    curate(films, tmp_path / "out", TINY)  # the paths of the copied folder
    for name in ("manifest.parquet", "funnel.json", "quarantine.jsonl"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_two_tasks_may_select_at_once(films, tmp_path, monkeypatch):
    """The other one selects, from beginning to end, while this one puts its manifest into place."""
    write = run_module.write_manifest

    def interrupted(path, clips):
        monkeypatch.setattr(run_module, "write_manifest", write)
        own = write(path, clips)
        curate(films, tmp_path / "out", TINY, (1, 2))
        return own

    monkeypatch.setattr(run_module, "write_manifest", interrupted)
    curate(films, tmp_path / "out", TINY, (0, 2))
    assert left(tmp_path / "out") == {"pan.mp4", "a/zoom.webm"}
    names = {"manifest.parquet", "report.html", "funnel.json", "quarantine.jsonl", "scores"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_task_without_work_selects_where_the_others_are_done(films, tmp_path):
    (tmp_path / "out" / "manifest.parquet").unlink()
    assert curate(films, tmp_path / "out", TINY, (99, 100))["num_scored"] == 0
    assert (tmp_path / "out" / "manifest.parquet").is_file()


def test_output_may_lie_in_the_input(films, tmp_path):
    for output in (films, films / "out"):
        shutil.copytree(tmp_path / "out" / "scores", output / "scores")
    for _ in range(2):
        assert curate(films, films, TINY)["num_scored"] == 0
        assert curate(films, films / "out", TINY)["num_scored"] == 0
    assert left(films) == left(films / "out") == {"pan.mp4", "a/zoom.webm"}
    assert pq.read_table(films / "manifest.parquet")["path"].to_pylist()[0] == "a/zoom.webm"


class Killed(BaseException):
    """Stands for a task that ends between two instructions."""


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=25)
def test_killed_anywhere_and_started_with_other_tasks_each_video_is_scored_once_more(data, tmp_path_factory):
    """All but those of the chunks that were being written: a chunk is the unit of loss."""
    output = tmp_path_factory.mktemp("out")
    names = data.draw(
        st.lists(st.text("abcdef/", min_size=3, max_size=6), max_size=30, unique=True, min_size=1)
    )
    recipe = replace(TINY, num_chunks=data.draw(st.integers(1, 9)))
    listing = Listing(Path("in"), [Video(name, 1, 1) for name in sorted(names)])
    scored, torn = Counter(), set()

    def run_tasks(count, lives):
        """Each task ends after as many videos as it has lives, or when its work is done."""
        for index, life in zip(range(count), lives, strict=True):
            left_to_live = [life]

            def fake(folder, video, rows, recipe, life=left_to_live):
                if not life[0]:
                    torn.add(chunk_of(video.name, recipe.num_chunks))
                    raise Killed
                life[0] -= 1
                scored[video.name] += 1
                return [{"video": video.name, "file_key": file_key(video), "reason": "fake"}]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(work, "score_video", fake)
                with contextlib.suppress(Killed):
                    work.score_missing(listing, output, recipe, (index, count))

    for _ in range(data.draw(st.integers(0, 3))):
        count = data.draw(st.integers(1, 5))
        run_tasks(count, data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count)))
    once = {name for name in names if chunk_of(name, recipe.num_chunks) not in torn}
    count = data.draw(st.integers(1, 5))
    run_tasks(count, [len(names)] * count)
    assert set(scored) == set(names)
    assert all(scored[name] == 1 for name in once)
    table, missing = work.scored_table(listing, output, recipe)
    assert not missing and table["video"].to_pylist() == sorted(names)
    before = dict(scored)
    run_tasks(1, [len(names)])
    assert scored == before


def test_a_long_chunk_is_written_in_between(tmp_path, monkeypatch):
    """A killed task loses a minute at most, however many videos a chunk has."""
    listing = Listing(Path("in"), [Video(f"{n}.mp4", 1, 1) for n in range(10)])
    recipe, scored = replace(TINY, num_chunks=1), []

    def fake(folder, video, rows, recipe):
        if len(scored) == 7:
            raise Killed
        scored.append(video.name)
        return [{"video": video.name, "file_key": file_key(video), "reason": "fake"}]

    # a clock by which a video takes half a minute and nothing else takes any time
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: 31.0 * len(scored)))
    monkeypatch.setattr(work, "score_video", fake)
    with pytest.raises(Killed):
        work.score_missing(listing, tmp_path, recipe)
    assert len(work.scored_table(listing, tmp_path, recipe)[1]) == 10 - 6


def test_a_torn_or_foreign_chunk_is_scored_again(films, tmp_path, calls):
    chunk = chunk_of("pan.mp4", TINY.num_chunks)
    path = store.chunk_path(tmp_path / "out", chunk, TINY.num_chunks)
    path.write_bytes(path.read_bytes()[:1000])
    names = [video.name for video in list_videos(films, tmp_path).videos]
    lost = [name for name in names if chunk_of(name, TINY.num_chunks) == chunk]
    assert run(films, tmp_path / "out", calls)["facts"] == len(lost) < 7
    assert run(films, tmp_path / "out", calls) == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        pytest.raises(ValueError, match=r"file cannot be written \(No space left"),
        store.replacing(path) as part,
    ):
        part.write_text("half")
        raise OSError(28, "x")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_goes_after_a_day(tmp_path):
    for name, age in {".part-1-chunk": 2 * 86400, ".part-2-chunk": 60}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    store.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".part-2-chunk"]


def test_chunks_depend_on_names_alone(films, tmp_path):
    names = [video.name for video in list_videos(films, tmp_path).videos]
    assert names == sorted(names) and len(names) == 7
    assert [chunk_of("a/zoom.webm", n) for n in (1, 256, 1000)] == [0, 76, 92]  # b2sum -l 64
    spread = Counter(chunk_of(f"{n}.mp4", 16) for n in range(4000))
    assert len(spread) == 16 and max(spread.values()) < 310
