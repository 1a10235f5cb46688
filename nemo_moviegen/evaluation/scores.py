"""How often a prompt was followed, by attribute, with the interval its true share lies in. No torch."""

import math

CHECKPOINTS_FILE, CHECKPOINTS_PLOT = "checkpoints.json", "loss_and_score.svg"
"""What `evaluate checkpoints` writes."""
Z_95 = 1.959963984540054
"""Deviations of a normal distribution that hold 95 of 100."""


def wilson_interval(num_right, number) -> tuple[float, float]:
    """The 95% interval of a share of which `num_right` of `number` were drawn (Wilson's score interval).

    Inside [0, 1] and of use at 0 and 1 too, where the usual one has no width. (0, 1) of no samples.
    """
    if number == 0:
        return 0.0, 1.0
    share = num_right / number
    middle = share + Z_95**2 / (2 * number)
    half = Z_95 * math.sqrt(share * (1 - share) / number + Z_95**2 / (4 * number**2))
    scale = 1 + Z_95**2 / number
    low = 0.0 if num_right == 0 else (middle - half) / scale
    return low, 1.0 if num_right == number else (middle + half) / scale


def score_rows(samples, attributes) -> list[dict]:
    """Rows {group, attribute, right, of, share, low, high}, groups and attributes in the order they come.

    A sample is {"group": str, "right": {attribute: bool}}; an attribute it does not have does not count.
    """
    rows = []
    for group in dict.fromkeys(sample["group"] for sample in samples):
        of_group = [sample["right"] for sample in samples if sample["group"] == group]
        for attribute in attributes:
            right = [answers[attribute] for answers in of_group if attribute in answers]
            if not right:
                continue
            low, high = wilson_interval(sum(right), len(right))
            row = {"group": group, "attribute": attribute, "right": sum(right), "of": len(right)}
            rows.append({**row, "share": sum(right) / len(right), "low": low, "high": high})
    return rows


def shown_scores(scores) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) as text: an attribute a row, a group a column, as in `98% (93-99)`."""
    groups = list(dict.fromkeys(row["group"] for row in scores["rows"]))
    cells = {(row["attribute"], row["group"]): told_share(row["right"], row["of"]) for row in scores["rows"]}
    attributes = dict.fromkeys(row["attribute"] for row in scores["rows"])
    of = {row["group"]: row["of"] for row in scores["rows"]}
    heads = ["", *(f"{group}, {of[group]} prompts" for group in groups)]
    return heads, [[a, *(cells.get((a, group), "-") for group in groups)] for a in attributes]


def scores_table(scores):
    """A rich table of the scores."""
    heads, rows = shown_scores(scores)
    return _table(heads, rows, left=[""])


def checkpoints_table(found):
    """A rich table of what checkpoints.json holds."""
    heads, rows = shown_checkpoints(found)
    return _table(heads, rows, left=["weights"])


def scores_note(scores) -> str:
    """What the numbers are, in a sentence."""
    settings = scores["settings"]
    return (
        f"Videos read by rule, {settings['num_frames']} frames of {settings['height_px']} px; in brackets "
        f"the 95% interval. {settings['recipe']}, {settings['schedule']}, guidance "
        f"{settings['guidance_scale']:g}."
    )


def shown_checkpoints(found) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) as text of what checkpoints.json holds: a row for each checkpoint and kind of weights."""
    heads = ["step", "weights", "validation loss", "every word", "color and direction"]
    rows = [
        [
            f"{row['step']:,}",
            row["weights"],
            f"{row['loss']:.4f}",
            _told(row["score"], row["low"], row["high"]),
            f"{row['scores']['color and direction']:.1%}",
        ]
        for row in found["rows"]
    ]
    return heads, rows


def correlation_note(found) -> str:
    """How loss and score go together over the checkpoints, a sentence for each kind of weights."""
    told = [
        f"{kind} weights: Pearson {related['pearson']:+.2f}, Spearman {related['spearman']:+.2f} over "
        f"{related['points']} checkpoints"
        for kind, related in found["correlation"].items()
        if related
    ]
    told = "; ".join(told) or "too few checkpoints that differ for a correlation"
    return f"{told[0].upper()}{told[1:]}."


def told_share(num_right, number) -> str:
    """A share and its 95% interval in percent, as in `97.9% (89-100)`."""
    low, high = wilson_interval(num_right, number)
    return _told(num_right / number, low, high)


def _told(share, low, high):
    return f"{share:.1%} ({100 * low:.0f}-{100 * high:.0f})"


def _table(heads, rows, left):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right")
    for row in rows:
        table.add_row(*row)
    return table
