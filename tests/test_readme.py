"""The README names only commands, recipes and files that are there."""

import re
from pathlib import Path

import pytest

from nemo_moviegen.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_paths():
    """Paths of the file tree: two spaces a level, a role after the name."""
    tree = re.search(r"## Where things are\s+```\n(.*?)```", README, re.DOTALL).group(1)
    parents = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents = [*parents[:depth], name.rstrip("/")]
        yield "/".join(parents)


@pytest.mark.parametrize("path", list(tree_paths()))
def test_the_file_tree_is_the_one_there_is(path):
    assert (ROOT / path).exists()


def test_every_module_is_in_the_file_tree():
    modules = {p.name for p in (ROOT / "nemo_moviegen").glob("*.py") if not p.name.startswith("report_")}
    assert modules - {"__init__.py"} <= {path.split("/")[-1] for path in tree_paths()}


def test_files_it_points_to_are_there():
    for path in re.findall(r"`((?:nemo_moviegen|recipes|slurm|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_its_commands_are_those_of_the_command_line():
    assert set(re.findall(r"`moviegen (\w+)", README)) == set(COMMANDS)


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)) <= targets
