"""From numbers of clips to the rows of the result: a row for each group of spans and each run. No torch."""

MEANS = ("ssim", "psnr_db", "norm_p999", "outlier_share", "outlier_penalty")
"""What a row has as the mean over its clips."""


def result_rows(groups, compressions, clips, moments, features) -> list[dict]:
    """Rows in the order of groups, then of runs; one row without numbers for a group without spans.

    `compressions` is told by run, `clips` are the numbers of each clip and run, `moments` those of features
    by (group, run) and (group, "") of the originals, `features` their name. fid is None where a group has a
    single frame.
    """
    rows = []
    for group in groups:
        if not group.spans:
            rows.append({"group": group.name, "run": "", "note": group.note, "num_clips": 0})
            continue
        for run, compression in compressions.items():
            of_run = [clip for clip in clips if clip["group"] == group.name and clip["run"] == run]
            rows.append(
                {
                    "group": group.name,
                    "run": run,
                    "note": group.note,
                    "num_clips": len(of_run),
                    "num_frames": sum(clip["num_frames"] for clip in of_run),
                    **{name: sum(clip[name] for clip in of_run) / len(of_run) for name in MEANS},
                    "largest_norm": max(clip["largest_norm"] for clip in of_run),
                    "fid": _fid(moments[group.name, ""], moments[group.name, run]),
                    "fid_features": features,
                    "compression": compression,
                    "frames_per_second": sum(clip["num_frames"] for clip in of_run)
                    / sum(clip["coding_seconds"] for clip in of_run),
                }
            )
    return rows


def _fid(real, fake):
    from nemo_moviegen.evaluation.frechet import frechet_distance

    return frechet_distance(real, fake) if real.count > 1 else None


def shown_rows(metrics) -> list[list[str]]:
    """The rows as text: one cell for each of `columns`; a group without spans has its note for a run."""
    shown, previous = [], None
    for row in metrics["rows"]:
        group = row["group"] if row["group"] != previous else ""
        previous = row["group"]
        if not row["num_clips"]:
            shown.append([group, row["note"].partition(";")[0]])
            continue
        shown.append(
            [
                group,
                row["run"],
                f"{row['num_clips']:,}",
                f"{row['num_frames']:,}",
                f"{row['ssim']:.4f}",
                f"{row['psnr_db']:.2f}",
                "-" if row["fid"] is None else f"{row['fid']:.4g}",
                f"{row['largest_norm']:.2f}",
                f"{row['outlier_share']:.3%}",
                f"{row['outlier_penalty']:.3g}",
                row["compression"],
                f"{row['frames_per_second']:.3g}",
            ]
        )
    return shown


def columns(metrics) -> list[str]:
    """Heads of the table; the network whose features FID compares is part of its name."""
    return [
        *("", "run", "clips", "frames", "SSIM", "PSNR dB"),
        f"FID ({metrics['settings']['features']})",
        *("largest norm", "above 3", "eq. 1", "latent", "frames/s"),
    ]


def notes(metrics) -> list[str]:
    """What the numbers are of, in sentences."""
    settings = metrics["settings"]
    said = [
        f"Clips: {settings['drawn_from']} of {settings['clips']}, {settings['height_px']}x"
        f"{settings['width_px']} px (height x width), {settings['fps']:g} frames a second."
    ]
    said += dict.fromkeys(f"{row['group']}: {row['note']}." for row in metrics["rows"] if row["note"])
    said.append("PSNR and SSIM: mean over frames, then over clips. FID: over all frames of the row.")
    if not settings["features_comparable"]:
        said.append(
            f"FID is of {settings['features']} features: not comparable with published FID, which takes a "
            "trained feature network."
        )
    said.append(
        "Norms: distance of a latent from its frame's mean, in deviations; above 3 counts as an outlier. "
        "Eq. 1 is the outlier penalty without its weight. Frames/s: encoding and decoding, on each of "
        f"{settings['ranks']} rank{'s' if settings['ranks'] > 1 else ''} ({settings['device']})."
    )
    return said


def results_table(metrics):
    """A rich table of the rows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for head in columns(metrics):
        is_text = head in ("", "run", "latent")
        table.add_column(head, justify="left" if is_text else "right", no_wrap=head != "run")
    for cells in shown_rows(metrics):
        table.add_row(*cells)
    return table
