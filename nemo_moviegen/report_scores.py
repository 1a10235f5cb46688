"""How often the samples of a demo show what their prompts say: numbers, and every sample that does not."""

import json
from pathlib import Path

from nemo_moviegen.evaluation.scores import (
    CHECKPOINTS_FILE,
    CHECKPOINTS_PLOT,
    correlation_note,
    scores_note,
    shown_checkpoints,
    shown_scores,
)
from nemo_moviegen.report_samples import data_uri, view
from nemo_moviegen.video_files import read_frames

SHAPES_SCORES, CHECKPOINTS_SCORES = Path("shapes", "scores.json"), Path("checkpoints", CHECKPOINTS_FILE)
"""Below the folder of a demo."""
MOST_WRONG = 12
"""Samples shown of those that miss a word of their prompt."""


def scores_part(demo) -> dict:
    """The table of scores.json and the samples that are wrong; empty where there is none."""
    path = Path(demo, SHAPES_SCORES)
    if not path.is_file():
        return {"score_rows": [], "score_heads": [], "score_note": "", "wrong": [], "num_wrong": 0}
    scores = json.loads(path.read_text(encoding="utf-8"))
    heads, rows = shown_scores(scores)
    wrong = [sample for sample in scores["samples"] if not sample["right"]["all words"]]
    return {
        "score_heads": heads,
        "score_rows": rows,
        "score_note": scores_note(scores),
        "wrong": [_shown(sample, path.parent) for sample in wrong[:MOST_WRONG]],
        "num_wrong": f"{len(wrong)} of {len(scores['samples'])}",
    }


def checkpoints_part(demo) -> dict:
    """The table of checkpoints.json and its plot; empty where there is none."""
    path = Path(demo, CHECKPOINTS_SCORES)
    if not path.is_file():
        return {"checkpoint_heads": [], "checkpoint_rows": [], "checkpoint_note": "", "checkpoint_plot": ""}
    found = json.loads(path.read_text(encoding="utf-8"))
    heads, rows = shown_checkpoints(found)
    return {
        "checkpoint_heads": heads,
        "checkpoint_rows": rows,
        "checkpoint_note": correlation_note(found),
        "checkpoint_plot": data_uri(path.with_name(CHECKPOINTS_PLOT).read_bytes(), "image/svg+xml"),
    }


def _shown(sample, folder):
    missed = [
        f"{word}: {sample['read'][word] or 'not to be told'} instead of {asked}"
        for word, asked in sample["asked"].items()
        if sample["read"][word] != asked
    ]
    shown = view("generated", read_frames(folder / sample["file"]), sample["fps"])
    return {"prompt": sample["prompt"], "note": "; ".join(missed), "view": shown}
