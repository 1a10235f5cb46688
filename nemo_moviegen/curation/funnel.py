"""What each step of curation left, as numbers: the table of App. B (Table 38) for one's own videos."""

import numpy as np

from nemo_moviegen.curation.select import KEPT, column_of


def funnel_of(listing, table, selection, refused, recipe, num_bad) -> dict:
    """JSON-ready: counts of files, the steps with what each left, the reasons of refused files.

    Each step has name, condition, rows (candidate clips; a video that has none yet counts as one), videos,
    clip_seconds, and percent of the rows that could be read. Counts never rise from step to step.
    """
    video_N = (
        np.unique(table["video"].to_pylist(), return_inverse=True)[1] if len(table) else np.zeros(0, int)
    )
    seconds_N = np.nan_to_num(column_of(table, "clip_seconds"))
    left_N = np.ones(len(table), bool)
    steps = [_line("readable", "", left_N, video_N, seconds_N)]
    for number, step in enumerate(selection.steps):
        left_N = left_N & (selection.dropped_by_N != number)
        steps.append(_line(step.name, step.condition, left_N, video_N, seconds_N))
    assert (left_N == (selection.dropped_by_N == KEPT)).all()
    return {
        "recipe": recipe.name,
        "folder": str(listing.folder),
        "num_files": len(listing.videos),
        "num_unreadable": num_bad,
        "ignored": dict(sorted(listing.ignored.items())),
        "steps": steps,
        "refused": dict(sorted(refused.items())),
    }


def _line(name, condition, left_N, video_N, seconds_N):
    return {
        "name": name,
        "condition": condition,
        "rows": int(left_N.sum()),
        "videos": len(np.unique(video_N[left_N])),
        "clip_seconds": round(float(seconds_N[left_N].sum()), 3),
        "percent": round(100 * float(left_N.mean()), 4) if len(left_N) else 0.0,
    }
