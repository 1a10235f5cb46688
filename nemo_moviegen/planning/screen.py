"""What `moviegen plan` prints: rich tables with bars."""

from dataclasses import asdict

from nemo_moviegen.planning.memory import GIB
from nemo_moviegen.planning.search import why_not
from nemo_moviegen.planning.told import MEMORY, TIME, describe

_WIDTH = 24
SEARCH_COLUMNS = (
    ("place", True),
    ("TP", True),
    ("CP", True),
    ("DP", True),
    ("sharding", False),
    ("recompute", False),
    ("context", False),
    ("micro-batch", True),
    ("GiB", True),
    ("step s", True),
    ("MFU", True),
)
"""(name, whether it holds numbers)"""


def show_plan(plan, console, found=None):
    """One screen: what it is, memory and seconds part by part, what follows for the recipe; where it does not
    fit, what would, out of the `Search` `found`."""
    console.print(f"[bold]{plan.recipe}[/bold] on {plan.cluster}: {plan.num_ranks:,} ranks, {describe(plan)}")
    console.print(f"{batch_line(plan)}, {plan.precision}", highlight=False)
    console.print(_memory_table(plan))
    free = -plan.over_bytes / GIB
    verdict = (
        f"[green]fits[/green], {free:.1f} GiB stay free"
        if plan.fits
        else (f"[red]does not fit[/red]: {-free:.1f} GiB too few")
    )
    limit = plan.memory_limit_bytes / GIB
    console.print(f"memory of a rank: {plan.memory.device_bytes / GIB:.1f} of {limit:.1f} GiB, {verdict}")
    if not plan.fits:
        console.print(why_not(found), highlight=False)
    if plan.step_seconds is not None:
        console.print(_time_table(plan))
        console.print("\n".join(time_lines(plan)), highlight=False)
    for note in plan.notes:
        console.print(f"[dim]{note}[/dim]", highlight=False)


def show_search(found, top, console):
    """The fastest layouts that fit, where the asked one stands among them, and how many were refused."""
    table = _table(*(name for name, _ in SEARCH_COLUMNS))
    place = found.rank()
    for number, plan in shown_plans(found, top):
        table.add_row(*search_row(number, plan), style="bold" if number == place else None)
    console.print(table)
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(found.refused.items()))
    console.print(
        f"{found.num_legal:,} legal layouts, {len(found.plans):,} fit; the recipe's is "
        + (f"place {place} (bold)" if place else "not among them")
        + (f"; refused: {refused}" if refused else ""),
        highlight=False,
    )


def shown_plans(found, top) -> list[tuple]:
    """(place, plan) of the `top` first that fit, and of the asked one wherever it stands."""
    place = found.rank()
    return [(n, plan) for n, plan in enumerate(found.plans, 1) if n <= top or n == place]


def show_validation(rows, console):
    """Published runs beside what the planner predicts of them."""
    table = _table(
        "run", "published MFU", "predicted MFU", "ratio", "published tokens/s", "predicted tokens/s"
    )
    for row in rows:
        table.add_row(
            row["run"],
            f"{row['published_mfu']:.1%}",
            f"{row['predicted_mfu']:.1%}",
            f"{row['ratio']:.3f}",
            f"{row['published_tokens_per_second']:,.0f}",
            f"{row['predicted_tokens_per_second']:,.0f}",
        )
    console.print(table)
    ratios = [row["ratio"] for row in rows]
    console.print(
        f"predicted / published: {min(ratios):.3f} to {max(ratios):.3f}. Tokens a second are a GPU's; a "
        "published MFU counts the FLOPs its authors count, so the predicted one is that times the ratio.",
        highlight=False,
    )
    for row in rows:
        assumed = f"; assumed: {row['assumed']}" if row["assumed"] else ""
        console.print(f"[dim]{row['run']}: {row['source']}{assumed}[/dim]", highlight=False)


def time_lines(plan) -> list[str]:
    """What the seconds of a step mean for the recipe, in lines."""
    each = ", ".join(f"{i.kind} {i.step.seconds:.2f} s" for i in plan.iterations)
    lines = [
        f"step: {plan.step_seconds:.2f} s ({each}); "
        f"{plan.tokens_per_second / plan.num_ranks:,.0f} tokens/s a GPU",
        f"recipe: {plan.num_steps:,} steps, {plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU-hours",
    ]
    if plan.mfu is not None:
        lines.insert(
            1, f"MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%}: {plan.tflops:,.0f} TFLOP/s a GPU of the model's"
        )
    return lines


def memory_unit(plan) -> tuple[str, int]:
    """Its name and bytes: GiB, or MiB for models that need no more than one of them."""
    return ("GiB", GIB) if plan.memory.peak_bytes > GIB else ("MiB", 2**20)


def batch_line(plan) -> str:
    """What the iterations of a recipe are made of, in a line."""
    each = ", ".join(
        f"{share:.0%} {i.kind}: {i.samples:,} of {'x'.join(map(str, i.shape))} ({i.share.tokens:,} tokens)"
        for share, i in zip(plan.shares, plan.iterations, strict=True)
    )
    return f"iterations {each}; {plan.num_microbatches} micro-batches of {plan.micro_batch}"


def _memory_table(plan):
    unit, unit_bytes = memory_unit(plan)
    table, parts = _table("memory", unit, "", "what"), asdict(plan.memory)
    largest = max(parts.values())
    for name, value in parts.items():
        if value:
            table.add_row(
                name.replace("_", " "), f"{value / unit_bytes:.2f}", _bar(value / largest), MEMORY[name]
            )
    return table


def _time_table(plan):
    table, parts = _table("time", "s", "", "what"), plan.seconds_by_part()
    largest = max(parts.values())
    for name, what in TIME.items():
        if parts[name] > 1e-4 * plan.step_seconds:
            table.add_row(name.replace("_", " "), f"{parts[name]:.3f}", _bar(parts[name] / largest), what)
    return table


def search_row(number, plan) -> tuple[str, ...]:
    """Cells of one plan under `SEARCH_COLUMNS`."""
    layout, seconds = plan.layout, plan.step_seconds
    return (
        str(number),
        str(layout.tensor),
        str(layout.context),
        f"{layout.data_parallel(plan.num_ranks):,}",
        layout.sharding,
        layout.recompute,
        layout.context_comm if layout.context > 1 else "-",
        str(plan.micro_batch),
        f"{plan.memory.device_bytes / GIB:.1f}",
        "-" if seconds is None else f"{seconds:.2f}",
        "-" if plan.mfu is None else f"{plan.mfu:.1%}",
    )


def _bar(share):
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=1, completed=share, width=_WIDTH)


def _table(*columns):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table, texts = (
        Table(box=SIMPLE_HEAD),
        ("memory", "time", "", "what", "run", "sharding", "recompute", "context"),
    )
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right", no_wrap=column != "what")
    return table
