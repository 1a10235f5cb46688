"""What raters preferred, two models at a time (Movie Gen s3.5.1): net win rates and one rating a model.

    votes of raters -> majority of three for each prompt and axis -> wins - losses, in percent -> bootstrap

A prompt whose raters do not agree, or all see no difference, is a tie: it counts in the number of prompts.
Ratings are Elo's: 400 points are ten to one, fitted to all pairs at once (Bradley and Terry), mean 1000.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

TIE = "tie"
AXES = {
    "text": "Which video shows more of what the prompt says?",
    "quality": "Which video is better as a whole?",
    "consistency": "Whose objects and people keep their form better from frame to frame?",
    "naturalness": "Whose motion is more natural?",
    "completeness": "Which video has more of the motion that the prompt asks for?",
    "realness": "Which video looks more like one that was filmed?",
    "aesthetics": "Which video is more beautiful?",
}
"""The paper's axes, and what raters are asked (our words)."""
NUM_RESAMPLES = 2000


def read_votes(paths) -> list[dict]:
    """Rows {models, rater, number, prompt, axis, choice} of exported files; choice is a model or `tie`.

    A rater's last word on a prompt and axis counts, also over several files. ValueError names the file that
    is no export, and what is wrong in it.
    """
    rows = {}
    for path in paths:
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            models, rater, votes = tuple(map(str, told["models"])), str(told["rater"]), told["votes"]
            votes = [(int(vote["number"]), vote) for vote in votes]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no export of votes ({type(error).__name__}: {error}): give what the page of "
                "`moviegen compare` saved"
            ) from None
        if len(set(models)) != 2:
            raise ValueError(f"{path} compares {', '.join(models)}: votes are between two different models")
        for number, vote in votes:
            if vote.get("choice") not in (*models, TIE) or vote.get("axis") not in AXES:
                raise ValueError(
                    f"{path} holds a vote of choice {vote.get('choice')!r} on axis {vote.get('axis')!r}: "
                    f"choices are {', '.join(models)} or {TIE}, axes {', '.join(AXES)}"
                )
            key = (frozenset(models), rater, number, vote["axis"])
            rows[key] = {**vote, "number": number, "models": tuple(sorted(models)), "rater": rater}
    if not rows:
        raise ValueError("there are no votes in " + ", ".join(map(str, paths)))
    return list(rows.values())


def outcomes(rows) -> dict:
    """{((model, other), axis): a number for each prompt}, by majority: 1 model won, -1 lost, 0 tie."""
    votes = defaultdict(Counter)
    for row in rows:
        votes[row["models"], row["axis"], row["number"]][row["choice"]] += 1
    found = defaultdict(list)
    for models, axis, number in sorted(votes):
        found[models, axis].append(_sign(models, votes[models, axis, number]))
    return dict(found)


def _sign(models, counted):
    """Who has more than half of the votes; 0 for nobody, or for ties."""
    winner, number = counted.most_common(1)[0]
    if 2 * number <= counted.total() or winner == TIE:
        return 0
    return 1 if winner == models[0] else -1


def net_win_rate(signs, seed=0) -> tuple[float, float, float]:
    """(wins - losses in percent of prompts, and its 95% interval by resampling prompts)."""
    signs = np.asarray(signs)
    drawn = np.random.default_rng(seed).integers(len(signs), size=(NUM_RESAMPLES, len(signs)))
    low, high = np.quantile(signs[drawn].mean(axis=1), (0.025, 0.975))
    return 100 * float(signs.mean()), 100 * float(low), 100 * float(high)


def elo(found, num_iterations=2000) -> dict[str, float]:
    """{model: rating} of all outcomes of one axis, {(model, other): signs}; a tie is half a win for both.

    A model that always wins has no finite rating: half a win against itself is added to each pair.
    """
    models = sorted({model for pair in found for model in pair})
    wins = defaultdict(float)
    for (model, other), signs in found.items():
        wins[model, other] += 0.5 + sum((sign + 1) / 2 for sign in signs)
        wins[other, model] += 0.5 + sum((1 - sign) / 2 for sign in signs)
    strength = dict.fromkeys(models, 1.0)
    for _ in range(num_iterations):
        for model in models:
            rivals = [other for other in models if (model, other) in wins]
            total = sum(wins[model, other] for other in rivals)
            met = sum(
                (wins[model, other] + wins[other, model]) / (strength[model] + strength[other])
                for other in rivals
            )
            strength[model] = total / met
        mean = math.exp(sum(map(math.log, strength.values())) / len(models))
        strength = {model: value / mean for model, value in strength.items()}
    return {model: 1000 + 400 * math.log10(value) for model, value in strength.items()}


def count_votes(paths, seed=0) -> dict:
    """{"rows": [{model, other, axis, prompts, votes, wins, losses, ties, net, low, high}], "elo": ratings}.

    `net` is in percent; ratings are {axis: {model: rating}}.
    """
    rows = read_votes(paths)
    found = outcomes(rows)
    number_of = Counter((row["models"], row["axis"]) for row in rows)
    counted = []
    for (models, axis), signs in found.items():
        net, low, high = net_win_rate(signs, seed)
        numbers = {"wins": signs.count(1), "losses": signs.count(-1), "ties": signs.count(0)}
        row = {"model": models[0], "other": models[1], "axis": axis, "prompts": len(signs), **numbers}
        counted.append({**row, "votes": number_of[models, axis], "net": net, "low": low, "high": high})
    axes = dict.fromkeys(axis for axis in AXES if any(axis == row["axis"] for row in counted))
    of_axis = {axis: {models: s for (models, of), s in found.items() if of == axis} for axis in axes}
    ratings = {axis: elo(pairs) for axis, pairs in of_axis.items()}
    return {
        "rows": sorted(counted, key=lambda r: (r["model"], r["other"], list(AXES).index(r["axis"]))),
        "elo": ratings,
    }


def votes_tables(counted) -> list:
    """Rich tables: net win rates, and ratings where there are three models or more."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for head in ("model", "against", "axis"):
        table.add_column(head)
    for head in ("prompts", "votes", "won", "lost", "tie", "net win rate"):
        table.add_column(head, justify="right")
    for row in counted["rows"]:
        numbers = (row[name] for name in ("prompts", "votes", "wins", "losses", "ties"))
        net = f"{row['net']:+.1f}% ({row['low']:+.0f} to {row['high']:+.0f})"
        table.add_row(row["model"], row["other"], row["axis"], *map(str, numbers), net)
    models = sorted({model for ratings in counted["elo"].values() for model in ratings})
    if len(models) < 3:
        return [table]
    second = Table("Elo", *counted["elo"], box=SIMPLE_HEAD)
    for model in models:
        cells = [f"{r[model]:.0f}" if model in r else "-" for r in counted["elo"].values()]
        second.add_row(model, *cells)
    return [table, second]
