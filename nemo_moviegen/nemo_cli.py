"""The same runs through NeMo-Run: `nemo moviegen train --factory tiny.t2i recipe.num_steps=100`.

NeMo-Run imports this module as its entry point `moviegen`. Every recipe is a factory of the task `train`; its
settings are set below `recipe.`, and executors (local, SLURM, containers) are NeMo-Run's own.
"""

from dataclasses import fields, is_dataclass

import nemo_run as run

import recipes
from nemo_moviegen.launch import launch
from nemo_moviegen.recipe import Recipe


def train(recipe: Recipe):
    """Train a recipe on its cluster, as `moviegen train` does; SystemExit with the code of a failed rank."""
    code = launch(recipe)
    if code:
        raise SystemExit(code)


def as_config(value):
    """A tree of dataclasses as NeMo-Run's `Config`s, which its command line can change."""
    if is_dataclass(value):
        entries = {f.name: as_config(getattr(value, f.name)) for f in fields(value)}
        return run.Config(type(value), **entries)
    return [as_config(entry) for entry in value] if isinstance(value, tuple) else value


def _register(name, function):
    def task() -> run.Partial:
        return run.Partial(train, recipe=as_config(function()))

    task.__doc__ = function.__doc__
    run.cli.factory(task, target=train, name=name)


run.cli.entrypoint(train, namespace="moviegen")
for _name, _function in recipes.RECIPES.items():
    _register(_name, _function)
