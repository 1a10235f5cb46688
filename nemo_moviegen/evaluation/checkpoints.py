"""Does the validation loss say how good the samples are? (Movie Gen s3.6.3, at small scale.)

    every checkpoint of a run, averaged and raw weights -> held-out loss by time, duration and size
                                                        -> Moving Shapes score
                                                        -> checkpoints.json, loss_and_score.svg

The loss is that of `training.validation`, on the samples, noise and times it has during training.
"""

import json
from dataclasses import replace
from pathlib import Path

from nemo_moviegen.evaluation.scores import CHECKPOINTS_FILE, CHECKPOINTS_PLOT, wilson_interval
from nemo_moviegen.evaluation.shapes import WORDS, evaluate_shapes
from nemo_moviegen.sampling import Sampler
from nemo_moviegen.training.checkpoint import checkpoints, load_video_model
from nemo_moviegen.training.validation import HeldOut
from nemo_moviegen.writable import write_whole

KINDS = {"ema": "averaged", "weights": "raw"}
FEWEST_POINTS = 3
"""Checkpoints from which a correlation is told."""
_SAMPLER = Sampler(batch_size=16)


def evaluate_checkpoints(models, output, *, num_seen=48, num_heldout=24, sampler=_SAMPLER) -> dict:
    """Measure every checkpoint of a run; returns what checkpoints.json holds.

    {"rows": [{step, weights, loss, losses, score, low, high, scores}], "correlation": {weights: {pearson,
    spearman, points} or None}}; `score` is the share of prompts of which every word is right, with its
    95% interval, `losses` are named as in metrics.jsonl, `scores` by attribute. `models.weights` measures
    one kind of weights only. ValueError as `evaluate_shapes`, and where the run has no checkpoint or no
    held-out latents lie beside its own.
    """
    output, found = Path(output), checkpoints(models.run)
    if not found:
        raise ValueError(f"{models.run} holds no finished checkpoint: train it, keep_every keeps several")
    rows = []
    for step in found:
        for kind in [models.weights] if models.weights else _kinds(models.run):
            of = replace(models, step=step, weights=kind)
            losses = validation_losses(of, output)
            folder = output / f"step={step}-{KINDS[kind]}"
            scores = evaluate_shapes(of, folder, num_seen=num_seen, num_heldout=num_heldout, sampler=sampler)
            rows.append({"step": step, "weights": KINDS[kind], **_row(losses, scores)})
            _write(output, rows)
    return _write(output, rows)


def validation_losses(models, output) -> dict[str, float]:
    """The held-out losses of one checkpoint by name, as a run with `validation.every` logs them."""
    model, recipe = load_video_model(models.run, weights=models.weights or None, step=models.step)
    data = replace(recipe.data, folder=str(models.latents), text="cached")
    held_out = HeldOut(replace(recipe, data=data, output=str(output)))
    return held_out.measure(model, model.config, next(model.parameters()).dtype)


def correlation(rows) -> dict | None:
    """Pearson's and Spearman's between loss and score; None for too few points, or where one stands still."""
    from scipy import stats

    losses, scores = [row["loss"] for row in rows], [row["score"] for row in rows]
    if len(rows) < FEWEST_POINTS or len(set(losses)) == 1 or len(set(scores)) == 1:
        return None
    pearson, spearman = stats.pearsonr(losses, scores), stats.spearmanr(losses, scores)
    return {"pearson": float(pearson[0]), "spearman": float(spearman[0]), "points": len(rows)}


def _kinds(run_folder):
    """The kinds of weights a run keeps."""
    from nemo_moviegen.recipe import RECIPE_FILE, read_recipe

    has_average = read_recipe(Path(run_folder, RECIPE_FILE)).ema_decay > 0
    return list(KINDS) if has_average else ["weights"]


def _row(losses, scores):
    """Over the prompts of all groups."""
    judged = [sample["right"] for sample in scores["samples"]]
    shares = {name: sum(right[name] for right in judged) / len(judged) for name in judged[0]}
    low, high = wilson_interval(sum(right[WORDS] for right in judged), len(judged))
    row = {"loss": losses["validation/loss"], "losses": losses, "score": shares[WORDS]}
    return {**row, "low": low, "high": high, "scores": shares}


def _write(output, rows):
    of_kind = {kind: [row for row in rows if row["weights"] == kind] for kind in KINDS.values()}
    of_kind = {kind: some for kind, some in of_kind.items() if some}
    found = {"rows": rows, "correlation": {kind: correlation(some) for kind, some in of_kind.items()}}
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / CHECKPOINTS_FILE, json.dumps(found, indent=1) + "\n")
    write_whole(output / CHECKPOINTS_PLOT, _plot(of_kind, found["correlation"]))
    return found


def _plot(of_kind, related):
    """SVG: score over loss, a point for each checkpoint, its step beside it where there is room."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.margins(0.08)
    every_loss = [row["loss"] for rows in of_kind.values() for row in rows]
    span, placed = max(every_loss) - min(every_loss), []  # late checkpoints lie on each other
    for (kind, rows), color in zip(of_kind.items(), ("#2f6fdb", "#d9822b"), strict=False):
        losses, scores = [row["loss"] for row in rows], [100 * row["score"] for row in rows]
        bars = [[100 * (row["score"] - row["low"]) for row in rows]]
        bars += [[100 * (row["high"] - row["score"]) for row in rows]]
        told = f"{kind}, Spearman {related[kind]['spearman']:+.2f}" if related[kind] else kind
        axes.errorbar(losses, scores, bars, fmt="o", color=color, elinewidth=0.8, label=told)
        for row, loss, score in sorted(zip(rows, losses, scores, strict=True), key=lambda some: -some[1]):
            if not any(abs(loss - x) < 0.09 * span and abs(score - y) < 4 for x, y in placed):
                axes.annotate(
                    f"{row['step']:,}", (loss, score), (5, 5), textcoords="offset points", fontsize=8
                )
                placed.append((loss, score))
    axes.set_xlabel("validation loss")
    axes.set_ylabel("prompts of which every word is right, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Creator": None, "Date": None})
    return drawn.getvalue()
