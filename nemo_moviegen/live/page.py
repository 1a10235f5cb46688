"""OUTPUT/progress.html: one file that shows a run, made anew while it goes on, and asks nobody for anything.

Only what was appended to metrics.jsonl is read each time, and a curve has 200 points however long the run, so
the page of a run of 210,000 steps stays small and takes a fraction of a second.
"""

import time
from pathlib import Path

from nemo_moviegen.live import panels
from nemo_moviegen.live.charts import number
from nemo_moviegen.live.metrics_file import MetricsFile
from nemo_moviegen.live.pictures import sample_grid
from nemo_moviegen.live.status import duration, read_status
from nemo_moviegen.pages import render
from nemo_moviegen.progress import PAGE_FILE
from nemo_moviegen.utilisation import KERNEL_CEILING
from nemo_moviegen.writable import write_whole

TEMPLATE = "progress.html.j2"


class Page:
    """The page of one run folder; keeps what it has read from one making to the next."""

    def __init__(self, run_folder):
        self.run_folder, self.metrics, self.pictures = Path(run_folder), MetricsFile(run_folder), {}

    def write(self, *, ended=False, now=None) -> Path:
        """Make the page; returns its path. While the run is live browsers load it again by themselves.

        `ended` says that no further step comes. ValueError where the folder holds no run.
        """
        now = time.time() if now is None else now
        self.metrics.read()
        status = read_status(self.run_folder, self.metrics, now=now, ended=ended)
        path = self.run_folder / PAGE_FILE
        write_whole(path, self._html(status, now))
        return path

    def _html(self, status, now):
        import yaml

        metrics = self.metrics
        is_live = status.state in ("running", "waiting")
        charts = [panels.loss_chart(metrics, status), panels.time_chart(metrics, status)]
        return render(
            TEMPLATE,
            status=status,
            refresh_seconds=every_seconds(status) if is_live else 0,
            written_unix=int(now),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
            subtitle=subtitle(status),
            percent=percent_done(status),
            facts=fact_cards(status, metrics.measured),
            learning=[c for c in charts if c] + panels.other_charts(panels.LEARNING, metrics, status),
            speeds=panels.other_charts(panels.SPEEDS, metrics, status),
            validation=panels.validation_table(metrics.measured),
            squares=panels.rank_squares(status.beats, status.behind, now),
            behind=panels.beat_rows(status.behind, now),
            skipped=panels.skipped_rows(status.skipped),
            samples=sample_grid(self.run_folder, self.pictures),
            recipe=yaml.safe_dump(status.recipe, sort_keys=False),
        )


def every_seconds(status) -> int:
    """How often a live run makes its page, and browsers look for it."""
    return int(status.recipe.get("progress", {}).get("every_seconds", 0))


def percent_done(status) -> float:
    """Of the run's steps, 0 to 100."""
    return min(100.0, 100 * status.step / status.num_steps) if status.num_steps else 0.0


def subtitle(status) -> str:
    """Cluster, layout and batch of the run in a line."""
    recipe = status.recipe
    layout = recipe.get("layout", {})
    axes = f"TP{layout.get('tensor', 1)} CP{layout.get('context', 1)}, sharding {layout.get('sharding', '-')}"
    return (
        f"{recipe.get('cluster', '-')}, {axes}, recompute {layout.get('recompute', '-')}, "
        f"batch {recipe.get('global_batch', '-')}, {recipe.get('precision', '-')}"
    )


def fact_cards(status, measured) -> list[tuple[str, str]]:
    """(what, number) of what one looks at first; what the run does not know is left out."""
    facts = status.facts
    cards = []

    def card(what, key, unit="", percent=False):
        if key in facts:
            cards.append((what, number(facts[key], percent) + unit))

    if status.eta is not None:
        cards.append(("to go", duration(status.eta)))
    card("loss, recent clips", "train/loss of clips")
    card("loss, recent images", "train/loss of images")
    last = measured[-1] if measured else {}
    for what, key, unit in (
        ("validation loss", "validation/loss", ""),
        ("held-out PSNR", "heldout/psnr_db", " dB"),
    ):
        if key in last:
            cards.append((f"{what}, step {last['step']:,}", number(last[key]) + unit))
    card("learning rate", "train/learning_rate")
    for name, key in (("MFU", "speed/mfu"), ("HFU", "speed/hfu")):
        if key in facts:
            is_wrong = facts[key] > KERNEL_CEILING
            cards.append((name, "counting error" if is_wrong else number(facts[key], percent=True)))
    card("model TFLOP/s a rank", "speed/tflops_per_gpu")
    if status.step_seconds is not None:
        cards.append(("step time", f"{number(status.step_seconds)} s"))
    card("tokens a second", "speed/tokens_per_second")
    card("frames a second", "speed/frames_per_second")
    card("waiting for data", "speed/data_wait", percent=True)
    card("GPU memory, most (rank 0)", "memory/peak_gib", " GiB")
    card("resident memory (rank 0)", "memory/resident_gib", " GiB")
    num_skipped = sum("rolled_back_to" not in row for row in status.skipped)
    cards.append(("steps skipped", f"{num_skipped:,}"))
    return cards
