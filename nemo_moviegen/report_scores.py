"""How often the samples of a demo show what their prompts say: numbers, and every sample that does not."""

import json
from pathlib import Path

from nemo_moviegen.report_samples import view
from nemo_moviegen.video_files import read_frames

SHAPES_SCORES = Path("shapes", "scores.json")
"""Below the folder of a demo."""
MOST_WRONG = 12
"""Samples shown of those that miss a word of their prompt."""


def scores_part(demo) -> dict:
    """The table of scores.json and the samples that are wrong; empty where there is none."""
    from nemo_moviegen.evaluation.scores import scores_note, shown_scores

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
        "wrong": [_shown(sample, path.parent, scores["settings"]["fps"][0]) for sample in wrong[:MOST_WRONG]],
        "num_wrong": f"{len(wrong)} of {len(scores['samples'])}",
    }


def _shown(sample, folder, fps):
    missed = [
        f"{word}: {sample['read'][word] or 'not to be told'} instead of {asked}"
        for word, asked in sample["asked"].items()
        if sample["read"][word] != asked
    ]
    shown = view("generated", read_frames(folder / sample["file"]), fps)
    return {"prompt": sample["prompt"], "note": "; ".join(missed), "view": shown}
