"""The page of a plan: one HTML file with bars of memory and time, and the layouts that fit."""

from dataclasses import asdict
from pathlib import Path

from nemo_moviegen.pages import render
from nemo_moviegen.planning.memory import GIB
from nemo_moviegen.planning.screen import (
    SEARCH_COLUMNS,
    batch_line,
    memory_unit,
    search_row,
    shown_plans,
    time_lines,
)
from nemo_moviegen.planning.search import why_not
from nemo_moviegen.planning.told import MEMORY, TIME, describe, parameters_of_first

TEMPLATE = "plan.html.j2"


def write_page(path, plan, found, top) -> Path:
    """Write the page of a `Plan` and of the `Search` around it; returns its path."""
    path, place, (unit, unit_bytes) = Path(path), found.rank(), memory_unit(plan)
    whole = max(plan.memory_limit_bytes, plan.memory.device_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = render(
        TEMPLATE,
        plan=plan,
        layout=describe(plan),
        batch=batch_line(plan),
        cards=_cards(plan),
        problem=why_not(found),
        unit=unit,
        memory=_bars(asdict(plan.memory), MEMORY, unit_bytes, whole),
        limit=100 * plan.memory_limit_bytes / whole,
        limit_gib=f"{plan.memory_limit_bytes / GIB:.0f}",
        time=_bars(plan.seconds_by_part(), TIME, 1.0, plan.step_seconds),
        time_lines=time_lines(plan) if plan.step_seconds is not None else [],
        parameters=[
            (name.replace("_", " "), f"{count:,}")
            for name, count in parameters_of_first(plan).items()
            if count
        ],
        columns=SEARCH_COLUMNS,
        rows=[(search_row(number, other), number == place) for number, other in shown_plans(found, top)],
        found=found,
        place=place,
    )
    path.write_text(html, encoding="utf-8")
    return path


def _bars(parts, names, unit, whole):
    """(name, number, percent of the bar, what it is) of each part that is there."""
    return [
        (name.replace("_", " "), f"{parts[name] / unit:.2f}", 100 * parts[name] / whole, what)
        for name, what in names.items()
        if parts.get(name, 0) > 1e-4 * (whole or 1)
    ]


def _cards(plan):
    memory = plan.memory
    cards = [(f"{memory.device_bytes / GIB:.1f} GiB", f"of {plan.memory_limit_bytes / GIB:.0f} a rank")]
    if plan.step_seconds is not None:
        cards += [(f"{plan.step_seconds:.2f} s", "a step")]
        cards += [(f"{plan.mfu:.1%}", "MFU"), (f"{plan.hfu:.1%}", "HFU")] if plan.mfu is not None else []
        cards += [(f"{plan.tokens_per_second / plan.num_ranks:,.0f}", "tokens/s a GPU")]
        cards += [(f"{plan.days:.1f}", "days"), (f"{plan.gpu_hours:,.0f}", "GPU-hours")]
    return cards
