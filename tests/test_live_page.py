"""The page of a run: one file that asks nobody for anything, small and quick however long the run."""

import json
import re
import time

import pytest
from live_runs import QUARTERS, metrics_row, validation, write_beats, write_run, write_sample
from test_report import Page as Html

from nemo_moviegen import __main__ as cli
from nemo_moviegen.live.charts import Curve, bins, line_chart, number, spark, ticks
from nemo_moviegen.live.page import Page
from nemo_moviegen.live.panels import MOST_RANK_SQUARES
from nemo_moviegen.progress import Progress

FINISHED = 100


@pytest.fixture
def folder(tmp_path):
    """Half a run of 100 steps with a measurement every ten, a skipped step, beats and samples."""
    rows = [
        metrics_row(step, **(validation(1 / step) if step % 10 == 0 else {}))
        for step in range(1, FINISHED // 2 + 1)
    ]
    run = write_run(tmp_path / "run", rows)
    (run / "skipped.jsonl").write_text(
        '{"step": 33, "sample_ids": [5, 6], "loss": NaN, "grad_norm": 3.0, "reason": "loss is nan"}\n'
    )
    write_beats(
        run, [(rank, f"n{rank // 2}", 50 - 3 * (rank == 3), time.time(), "training") for rank in range(4)]
    )
    for step in (20, 40):
        write_sample(run, step, 0)
        write_sample(run, step, 1, prompt="<b>bold</b> & brave", clip=False)
    return run


def made(folder, **settings):
    return Html(Page(folder).write(**settings))


def finish(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_row(FINISHED)) + "\n")


def test_the_page_is_one_file_that_needs_no_other(folder):
    page = made(folder)
    sources = [a[key] for _, a in page.tags for key in ("src", "href", "poster", "data") if key in a]
    beside = {"samples/step=20/000.mp4", "samples/step=40/000.mp4"}  # to play; the page shows them already
    assert {s for s in sources if not s.startswith("data:")} == beside
    assert all((folder / path).is_file() for path in beside)
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    assert not list(folder.glob(".part*"))


def test_browsers_load_it_again_while_the_run_goes_on_and_no_longer(folder):
    def refresh(page):
        return [m["content"] for m in page.all("meta") if m.get("http-equiv") == "refresh"]

    assert refresh(made(folder)) == ["60"]
    assert refresh(made(folder, ended=True)) == []
    finish(folder)
    assert refresh(made(folder)) == []


def test_it_says_how_far_the_run_is_and_what_it_measures(folder):
    text = " ".join(made(folder).text.split())
    for said in (
        "tiny.t2iv running",
        "step 50 of 100 (50.0%)",
        "cpu_2, TP1 CP1",
        "40% MFU",
        "50% HFU",
        "61.5 GiB GPU memory, most (rank 0)",
        "0.02 validation loss, step 50",
        "1 steps skipped",
        "1% waiting for data",
        "2 min to go",
        "loss is nan (loss nan, gradient norm 3)",
        "1 of 4 ranks are behind: rank 3 (n1, step 47, training)",
    ):
        assert said in text, said


def test_no_peak_no_mfu_and_on_a_cpu_memory_is_called_what_it_is(tmp_path):
    rows = [metrics_row(1)]
    for key in ("speed/mfu", "speed/hfu", "memory/peak_gib"):
        del rows[0][key]
    rows[0]["memory/resident_gib"] = 1.5
    text = made(write_run(tmp_path, rows)).text
    assert "MFU" not in text and "GPU memory" not in text
    assert "resident memory (rank 0)" in text


def test_an_impossible_mfu_is_a_counting_error_and_no_number(tmp_path):
    folder = write_run(tmp_path, [metrics_row(1, **{"speed/mfu": 1.4, "speed/hfu": 1.9})])
    text = " ".join(made(folder).text.split())
    assert "counting error MFU" in text and "counting error HFU" in text
    assert "140% MFU" not in text
    assert "check peak_dense_tflops of the cluster" in text


def test_the_table_has_a_row_a_shape_and_a_column_a_quarter_of_time(folder):
    source = made(folder).source
    table = re.search(r'<table class="heat">(.*?)</table>', source, re.DOTALL).group(1)
    assert [q.replace("-", " to ") in table for q in QUARTERS] == [True] * 4
    assert "64x64 px" in table
    losses = re.findall(r">(\d\.\d{4})\n", table)
    assert losses == 2 * ["0.0200", "0.1200", "0.2200", "0.3200"]
    changes = re.findall(r"([+-]\d+\.\d%)</span>", table)
    assert changes[:2] == ["-20.0%", "-4.0%"]  # 1/50 after 1/40, with 0.1 on top in the second quarter
    assert table.count("<polyline") == 8


def test_prompts_are_text_and_their_strips_come_newest_first(folder):
    page = made(folder)
    assert "<b>bold" not in page.source and "<b>bold</b> & brave" in page.text
    shown = [image["alt"] for image in page.all("img")]
    assert shown[:2] == ["step 40: a red square", "step 20: a red square"]
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))


def test_wide_strips_are_made_smaller_and_many_steps_are_told_by_the_newest_and_the_first(tmp_path):
    folder = write_run(tmp_path, [metrics_row(1)])
    for step in range(1, 61):
        write_sample(folder, step, 0, width=2000 if step == 60 else 16, clip=False)
    images = made(folder).all("img")
    steps = [int(image["alt"].split(":")[0].removeprefix("step ")) for image in images]
    assert steps == [*range(60, 13, -1), 1]
    assert images[0]["src"].startswith("data:image/jpeg") and len(images[0]["src"]) < 60_000


def test_a_run_without_a_step_has_a_page_too(tmp_path):
    assert "waiting" in made(write_run(tmp_path, [])).text


def test_an_autoencoders_run_has_its_own_curves(tmp_path):
    rows = [{"step": s, "train/l1": 1 / s, "train/psnr_db": 20.0 + s, "train/loss": 1.0} for s in (1, 2, 3)]
    text = made(write_run(tmp_path, [*rows, {"step": 3, "heldout/psnr_db": 24.6}])).text
    assert "PSNR, dB" in text and "L1 error" in text and "24.6 dB" in text
    assert "Validation loss" not in text


def test_many_ranks_share_a_square_a_host(tmp_path):
    folder = write_run(tmp_path, [metrics_row(50)])
    beats = [
        (rank, f"n{rank // 8:03d}", 50 - 5 * (rank == 4321), time.time(), "training") for rank in range(6144)
    ]
    write_beats(folder, beats)
    page = made(folder)
    squares = [a for a in page.all("i") if "title" in a]
    assert len(squares) == 768 <= 6144 > MOST_RANK_SQUARES
    (late,) = [a["title"] for a in squares if a.get("class") == "behind"]
    assert late.startswith("n540, 8 ranks, the last of them rank 4321: step 45")
    assert len(page.source) < 300_000


def test_the_page_of_210000_steps_is_small_and_quickly_made(tmp_path):
    """Processor time, for others may use the machine; the second time only what is new is read."""
    row, measured = json.dumps(metrics_row(7)), json.dumps(metrics_row(7, **validation(0.5)))
    assert row.startswith('{"step": 7, ') and measured.startswith('{"step": 7, ')
    folder = write_run(tmp_path, [metrics_row(1)], num_steps=210_000)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 210_001):
            file.write(f'{{"step": {step}, {(row if step % 1000 else measured)[12:]}\n')
    page = Page(folder)
    started = time.process_time()
    path = page.write()
    first, started = time.process_time() - started, time.process_time()
    page.write()
    assert first < 2
    assert time.process_time() - started < 0.5
    assert path.stat().st_size < 1_500_000
    assert "step 210,000 of 210,000" in " ".join(path.read_text().split())


def test_the_command_makes_the_page_and_says_who_is_behind(folder, capsys):
    assert cli.main(["progress", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "step 50 of 100 (50.0%)" in said
    assert "rank 3 on n1: step 47, training" in said
    assert str(folder / "progress.html") in "".join(said.split())
    assert (folder / "progress.html").is_file()


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    assert cli.main(["progress", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"moviegen: {tmp_path} is no run folder: it holds no recipe.yaml"
    )


def test_a_point_of_a_curve_is_the_mean_of_its_neighbours_with_their_range():
    assert bins([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], 2) == [(1.5, 2.0, 1.0, 3.0), (4.0, 7.0, 5.0, 9.0)]
    assert bins([4], [2.0]) == [(4.0, 2.0, 2.0, 2.0)]
    assert len(bins(range(999), range(999), 200)) == 200


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1.0]), (0, 210_000, [0, 100_000, 200_000]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_an_axis_is_told_at_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.12345, "0.123"), (999, "999"), (1968504, "1.969M"), (2e15, "2000T"), (-4321, "-4.321k")],
)
def test_numbers_are_short(value, said):
    assert number(value) == said


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 0.0], [1e-9, 1e3, 1e-9], [-1.0, 2.0]])
def test_any_values_make_a_chart_inside_its_frame(values):
    svg = line_chart(
        [Curve(name="a & b", steps=list(range(len(values))), values=values, color=0)], marks=(1,)
    )
    assert "a &amp; b" in svg and "nan" not in svg
    for x, y in re.findall(r"(-?\d+\.\d),(-?\d+\.\d)", svg):
        assert 0 <= float(x) <= 420 and 0 <= float(y) <= 210


def test_no_values_make_no_chart():
    assert line_chart([Curve(name="a", steps=[], values=[], color=0)]) == "" == spark([1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_seconds": -1}, "progress.every_seconds is -1; use 0 or more"),
        ({"samples_every": -1}, "progress.samples_every is -1; use 0 or more"),
        ({"num_samples": 0}, "progress.num_samples is 0; use 1 or more"),
        ({"sampling_steps": 0}, "progress.sampling_steps is 0; use 1 or more"),
        ({"sampling_steps": 251}, "progress.sampling_steps is 251; use at most 250"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Progress(**settings)
