"""What `moviegen progress RUN` prints: one screen."""

import time

from nemo_moviegen.live.page import Page, fact_cards, percent_done, subtitle
from nemo_moviegen.live.status import duration, read_status

_MOST_NAMED = 8
_STYLES = {"running": "green", "finished": "green", "waiting": "cyan", "ended": "yellow", "silent": "red"}


def show(run_folder, console):
    """Make the page of a run folder and print where the run stands; returns the page's path.

    ValueError where the folder holds no run.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    page, now = Page(run_folder), time.time()
    path = page.write(now=now)
    status = read_status(run_folder, page.metrics, now=now)
    style = _STYLES[status.state]
    console.print(f"[bold]{status.name}[/bold]  [{style}]{status.state}[/{style}]  {subtitle(status)}")
    line = f"step {status.step:,} of {status.num_steps:,} ({percent_done(status):.1f}%)"
    if status.step and status.state not in ("finished", "ended"):
        line += f", the last {duration(status.silent_for)} ago"
    console.print(line)
    console.print(ProgressBar(total=100, completed=percent_done(status), width=60))
    console.print()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    cards = fact_cards(status, page.metrics.measured)
    half = -(-len(cards) // 2)
    for left, right in zip(cards[:half], [*cards[half:], ("", "")], strict=False):
        table.add_row(f"[dim]{left[0]}[/dim]", left[1], f"[dim]{right[0]}[/dim]", right[1])
    console.print(table)
    for problem in status.problems:
        console.print(f"[red]![/red] {problem}", highlight=False)
    console.print(_ranks(status, now), highlight=False)
    return path


def _ranks(status, now):
    """A line on the ranks, or a line for each that is behind."""
    if not status.beats:
        return "no heartbeats in this folder"
    if not status.behind:
        last = min(beat.step for beat in status.beats)
        return f"{len(status.beats)} ranks, none behind (step {last:,} or later)"
    named = [
        f"  rank {beat.rank} on {beat.host}: step {beat.step:,}, {beat.phase}, "
        f"{duration(now - beat.unix_seconds)} ago"
        for beat in status.behind[:_MOST_NAMED]
    ]
    if len(status.behind) > _MOST_NAMED:
        named.append(f"  and {len(status.behind) - _MOST_NAMED} more")
    return "\n".join(["behind:", *named])
