"""`moviegen evaluate`: what a trained model is measured by."""

import json
from pathlib import Path

from nemo_moviegen.commands.asked import models_of, sampler_of, tiling_of


def evaluate_command(options):
    """Measure a trained model."""
    measures = {"tae": _evaluate_tae, "shapes": _evaluate_shapes, "votes": _evaluate_votes}
    measures |= {"checkpoints": _evaluate_checkpoints, "samples": _evaluate_samples}
    return measures[options.what](options)


def _evaluate_tae(options):
    from nemo_moviegen.evaluation.autoencoder import REPORT, evaluate_autoencoder
    from nemo_moviegen.evaluation.rows import notes, results_table
    from nemo_moviegen.tables import show

    metrics = evaluate_autoencoder(
        options.run_folder,
        options.clips,
        options.output,
        against=options.against,
        seconds=options.seconds,
        size=options.size,
        fps=options.fps,
        limit=options.limit,
        features=options.features,
        tiling=tiling_of(options, options.run_folder),
        fit=options.fit,
        seed=options.seed,
        task=options.task,
    )
    if metrics:  # one rank has them
        show(results_table(metrics))
        print(*notes(metrics), Path(options.output) / REPORT, sep="\n")


def _evaluate_shapes(options):
    from nemo_moviegen.evaluation.scores import scores_note, scores_table
    from nemo_moviegen.evaluation.shapes import SCORES, evaluate_shapes
    from nemo_moviegen.tables import show

    scores = evaluate_shapes(
        models_of(options),
        options.output,
        num_seen=options.seen,
        num_heldout=options.heldout,
        num_frames=options.frames,
        size_px=options.size,
        rates=options.fps,
        shapes_seed=options.shapes_seed,
        sampler=sampler_of(options),
        tiling=tiling_of(options, options.autoencoder),
        task=options.task,
    )
    if scores:  # one rank has them
        show(scores_table(scores))
        print(scores_note(scores), Path(options.output) / SCORES, sep="\n")


def _evaluate_checkpoints(options):
    from nemo_moviegen.evaluation.checkpoints import evaluate_checkpoints
    from nemo_moviegen.evaluation.scores import CHECKPOINTS_PLOT, checkpoints_table, correlation_note
    from nemo_moviegen.tables import show

    if options.step:
        raise ValueError(
            f"--step {options.step}: evaluate checkpoints measures all of them; see evaluate shapes"
        )
    found = evaluate_checkpoints(
        models_of(options),
        options.output,
        num_seen=options.seen,
        num_heldout=options.heldout,
        sampler=sampler_of(options),
    )
    show(checkpoints_table(found))
    print(correlation_note(found), Path(options.output) / CHECKPOINTS_PLOT, sep="\n")


def _evaluate_samples(options):
    from nemo_moviegen.evaluation.sample_metrics import RESULT, find_metrics, measure_samples, metrics_table
    from nemo_moviegen.tables import show

    metrics = find_metrics(options.fid, options.fvd, options.clip)
    show(metrics_table(measure_samples(options.samples, metrics, options.output, options.real)))
    print(Path(options.output) / RESULT)


def _evaluate_votes(options):
    from nemo_moviegen.evaluation.votes import count_votes, votes_tables
    from nemo_moviegen.tables import show

    counted = count_votes(options.votes)
    for table in votes_tables(counted):
        show(table)
    print("Net win rate: prompts won less prompts lost, by majority of raters; in brackets its 95% interval.")
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
        print(path)
