"""Whether a run in FP8 learns what its twin in bf16 does: the same samples, noise and times, step by step.

    gap    mean loss of the last quarter of the steps, FP8's over bf16's, less 1

Both runs see the same batch at each step, so the difference of their losses has little noise: what is left
of it is FP8's rounding, and what follows from it.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from nemo_moviegen.bench.measure import empty_table, write_json
from nemo_moviegen.launch import check_inputs, check_run, must_start_ranks, start_ranks
from nemo_moviegen.precision import is_fp8
from nemo_moviegen.recipe import FP8_FILE, METRICS_FILE, RECIPE_FILE, TaeRecipe, read_recipe

GAP = 0.005
"""What the gate allows by default."""
LEAST_STEPS = 8
_MAY_DIFFER = ("name", "output", "precision", "fp8")
_MOST_LINEARS = 5


def gate(recipe, cluster, folder, *, steps, gap=None, output=None, log=print) -> int:
    """Train the recipe and its twin in bf16 for so many steps on this machine, then `judge` them.

    Returns the exit code: 0, 1 where the gap is too large, or that of ranks that failed. ValueError for a
    recipe that is not in FP8, or does not fit the cluster.
    """
    if isinstance(recipe, TaeRecipe) or not is_fp8(recipe.precision):
        raise ValueError(
            f"{recipe.name} trains in {recipe.precision}: --parity compares FP8 with bf16, so set precision "
            "to fp8_delayed, fp8_current or fp8_block"
        )
    if steps < LEAST_STEPS:
        raise ValueError(f"--steps {steps}: a gap is taken over the last quarter, use {LEAST_STEPS} or more")
    must_start_ranks(cluster, "train both runs and compare them with moviegen bench parity RUN BF16_RUN")
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    run = replace(
        recipe,
        num_steps=steps,
        save_every=0,
        validation=replace(recipe.validation, every=0),
        progress=replace(recipe.progress, samples_every=0, wandb_project=""),
        fp8=replace(recipe.fp8, report_every=recipe.fp8.report_every or max(1, steps // 4)),
    )
    runs = {"fp8": run, "bf16": replace(run, precision="bf16")}
    for name, one in runs.items():
        one = replace(one, output=str(folder / name))
        check_run(one, cluster)
        check_inputs(one)
        if code := start_ranks(one, one.output, cluster, ["train"]):
            return code
    return judge(folder / "fp8", folder / "bf16", gap=gap, output=output, log=log)


def judge(run_folder, reference_folder, *, gap=None, output=None, log=print) -> int:
    """Compare two finished runs, say what was found and return 0, or 1 where the gap is larger than `gap`
    (default: `GAP`)."""
    found = compare(run_folder, reference_folder) | {"allowed": GAP if gap is None else gap}
    found["passes"] = found["gap"] <= found["allowed"] and found["skipped"] <= found["skipped_bf16"]
    for part in told(found):
        log(part)
    if output:
        write_json(output, found)
    return 0 if found["passes"] else 1


def compare(run_folder, reference_folder) -> dict:
    """What differs between an FP8 run and its bf16 twin, as plain values.

    ValueError where they are no twins, or have not `LEAST_STEPS` steps in common.
    """
    run, reference = (read_recipe(Path(folder, RECIPE_FILE)) for folder in (run_folder, reference_folder))
    if not is_fp8(run.precision) or reference.precision != "bf16":
        raise ValueError(
            f"{run_folder} trained in {run.precision}, {reference_folder} in {reference.precision}: name a "
            "run in FP8, then its twin in bf16"
        )
    ours, theirs = asdict(run), asdict(reference)
    if other := [key for key in ours if key not in _MAY_DIFFER and ours[key] != theirs[key]]:
        raise ValueError(
            f"{run_folder} and {reference_folder} differ in {', '.join(other)} too: twins differ in "
            "precision and fp8 alone"
        )
    own, other = _lines(run_folder), _lines(reference_folder)
    steps = sorted(own.keys() & other.keys())
    if len(steps) < LEAST_STEPS:
        raise ValueError(
            f"{run_folder} and {reference_folder} have {len(steps)} steps in common: train "
            f"{LEAST_STEPS} or more"
        )
    last = steps[-len(steps) // 4 :]
    return {
        "recipe": run.name,
        "precision": run.precision,
        "fp8": asdict(run.fp8),
        "steps": len(steps),
        "gap": _gap(own, other, last),
        "gap_of_all": _gap(own, other, steps),
        "largest_difference": max(
            abs(own[step]["train/loss"] / other[step]["train/loss"] - 1) for step in steps
        ),
        "loss": mean(own[step]["train/loss"] for step in last),
        "loss_bf16": mean(other[step]["train/loss"] for step in last),
        "grad_norm_ratio": mean(own[step]["train/grad_norm"] for step in last)
        / max(mean(other[step]["train/grad_norm"] for step in last), 1e-30),
        "skipped": sum(own[step]["train/skipped"] for step in steps),
        "skipped_bf16": sum(other[step]["train/skipped"] for step in steps),
        "linears": _linears(Path(run_folder, FP8_FILE)),
    }


def told(found):
    """What a terminal shows of `judge`."""
    ours, bf16 = found["loss"], found["loss_bf16"]
    yield (
        f"{found['recipe']} in {found['precision']} beside bf16, {found['steps']} steps of the same samples: "
        f"loss {ours:.5f} and {bf16:.5f} over the last quarter; difference of all steps "
        f"{found['gap_of_all']:+.3%}, of one at most {found['largest_difference']:.3%}; gradient norm x "
        f"{found['grad_norm_ratio']:.3f}; skipped {found['skipped']:.0f}, "
        f"bf16 {found['skipped_bf16']:.0f}"
    )
    if found["linears"]:
        table = empty_table(
            f"last line of {FP8_FILE}: what loses most", "operand", "largest", "cut off", "falls to zero"
        )
        rows = sorted(found["linears"], key=lambda row: (-row["cut_off"], -row["to_zero"]))
        for row in rows[:_MOST_LINEARS]:
            table.add_row(
                f"{row['linear']} {row['operand']}",
                f"{row['largest']:.3g}",
                f"{row['cut_off']:.2%}",
                f"{row['to_zero']:.2%}",
            )
        yield table
    verdict = "passes" if found["passes"] else "FAILS"
    yield f"{verdict}: gap {found['gap']:+.3%}, allowed {found['allowed']:.3%}"


def _lines(folder):
    lines = Path(folder, METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if "train/loss" in line}


def _gap(own, other, steps):
    return mean(own[s]["train/loss"] for s in steps) / mean(other[s]["train/loss"] for s in steps) - 1


def _linears(path):
    if not path.is_file():
        return []
    last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return [
        {"linear": name, "operand": operand} | facts
        for name, operands in last["linears"].items()
        for operand, facts in operands.items()
    ]
