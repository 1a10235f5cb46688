"""What slurm/README.md tells an operator to type can be typed, and its figures are the planner's."""

import re
import shlex
from pathlib import Path

import pytest

import recipes
from nemo_moviegen import preflight, stopping
from nemo_moviegen.arguments import parse
from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.planning.plan import make_plan
from recipes.video_30b import TABLE_3

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
ROWS = re.findall(r"^\| `((?:video_30b|ablation_5b)\.\w+)` \| (.*) \|$", README, re.MULTILINE)


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.startswith("moviegen ") and "..." not in line]
)
def test_its_moviegen_lines_parse_and_name_recipes_there_are(line):
    options = parse(shlex.split(line, comments=True)[1:])
    if getattr(options, "recipe", None):
        recipes.get(options.recipe)
    cluster = getattr(options, "cluster", None)
    if cluster and cluster != "NAME":
        read_cluster(str(ROOT / cluster) if "/" in cluster else cluster)


def test_files_it_names_are_there():
    named = re.findall(r"(?:tests|slurm|recipes)/[\w/.]+\.(?:sh|sbatch|yaml\.template|yaml)", README)
    for path in set(named) - {"recipes/clusters/NAME.yaml"}:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("name", "cells"), ROWS, ids=lambda value: value.split(" ")[0])
def test_what_it_says_of_a_recipe_is_what_the_planner_says(name, cells):
    recipe = recipes.get(name)
    plan, layout = make_plan(recipe, read_cluster(recipe.cluster)), recipe.layout
    assert cells.split(" | ") == [
        f"{plan.num_ranks:,}",
        f"TP{layout.tensor} CP{layout.context}, {layout.recompute}",
        f"{plan.memory.device_bytes / 2**30:.1f}",
        f"{plan.step_seconds:.2f}",
        f"{plan.mfu:.1%}",
        f"{plan.days:.1f}",
        f"{plan.gpu_hours:,.0f}",
    ]


def test_all_rows_of_table_3_are_planned():
    assert {f"video_30b.{row.__name__}" for row in TABLE_3} <= {name for name, _ in ROWS}


def test_its_exit_codes_are_those_there_are():
    table = README.split("| what happens |")[1].split("\n\n")[0]
    codes = {int(code) for code in re.findall(r"\| (\d+) \|$", table, re.MULTILINE)}
    ours = {stopping.MISTAKE, stopping.TO_GO_ON, stopping.TO_STAY, stopping.HUNG, preflight.REFUSED}
    assert codes == ours | {0}
