"""The parity matrix as a table: `cd tests && python -m parallel.matrix_table [--write]`.

Prints the largest error of each row; with --write also into README.md, between its markers, and each measure
on its own into benchmarks/parity_cpu_2.json. Ends with 1 if a row is off by more than the tolerance.
"""

import argparse
import datetime
import json
import operator
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_moviegen.layout import CHOICES
from nemo_moviegen.training.cpu import stand_in_for_cuda
from nemo_moviegen.training.record import quiet

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def table(found) -> str:
    """Markdown of `largest_errors(ROWS)`: a line a layout, a column a sharding."""
    worst = {key: max(error for error, _ in measures.values()) for key, measures in found.items()}
    shardings = CHOICES["sharding"]
    lines = [
        "| ranks | layout | " + " | ".join(f"`sharding={s}`" for s in shardings) + " |",
        "|--:|---|" + "--:|" * len(shardings),
    ]
    for ranks, what in dict.fromkeys(
        (ranks, what) for ranks, what, _ in sorted(worst, key=operator.itemgetter(0))
    ):
        cells = [_one_digit(worst[ranks, what, s]) for s in shardings]
        lines.append(f"| {ranks} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_between_markers(text, new) -> str:
    """`text` with `new` in place of what is between the markers; ValueError where they are not."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README needs one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main(arguments=None) -> int:
    """1 if a row is wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md and benchmarks/")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    if options.write:
        put_between_markers(readme.read_text(encoding="utf-8"), "")  # refused now, not in a minute
    quiet()
    stand_in_for_cuda()
    torch.set_num_threads(1)  # a forked rank hangs in its parent's OpenMP pool otherwise
    import nemo_moviegen.training.module
    import nemo_moviegen.training.strategy  # noqa: F401  once, before the ranks fork
    from parallel.matrix import ROWS, TOLERANCE, first_wrong, largest_errors

    started = time.perf_counter()
    found = largest_errors(ROWS)
    seconds = time.perf_counter() - started
    print(table(found))
    wrong = {key: first_wrong(measures) for key, measures in found.items() if first_wrong(measures)}
    print(f"{len(found)} rows in {seconds:.0f} s, {len(wrong)} of them off by more than {TOLERANCE:g}", wrong)
    if options.write:
        text = put_between_markers(readme.read_text(encoding="utf-8"), table(found))
        readme.write_text(text, encoding="utf-8")
        record = _record(found, seconds, TOLERANCE)
        (ROOT / "benchmarks" / "parity_cpu_2.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(wrong))


def _one_digit(error):
    return f"{error:.0e}".replace("e-0", "e-") if error else "0"


def _record(found, seconds, tolerance):
    rows = [
        {"ranks": ranks, "layout": what, "sharding": sharding}
        | {measure: error for measure, (error, _) in measures.items()}
        | {f"{measure}_at": measures[measure][1] for measure in ("gradients", "parameters")}
        for (ranks, what, sharding), measures in found.items()
    ]
    return {
        "command": "cd tests && python -m parallel.matrix_table --write",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, no GPU",
        **{package: version(package) for package in ("torch", "megatron-core", "nemo-toolkit")},
        "dtype": "float64",
        "tolerance": tolerance,
        "seconds": round(seconds, 1),
        "rows": rows,
    }


if __name__ == "__main__":
    raise SystemExit(main())
