"""The same runs through NeMo-Run: `nemo moviegen train --factory tiny.t2i recipe.num_steps=100`.

NeMo-Run imports this module as its entry point `moviegen`. Every recipe is a factory of the task `train`,
whose settings are set below `recipe.`; every cluster is a factory of executors:

    (none)                       in this process, which starts the cluster's ranks on this machine
    run.executor=local           the same in a process of its own, with NeMo-Run's record of it
    run.executor=slurm.CLUSTER   a batch job on the nodes of that cluster, one torchrun a node

Settings of an executor are set below `run.executor.`, as in `run.executor.time=08:00:00`. A batch job works
bare, with this environment on its PATH, or in the cluster's container, which then has to hold this package.
It ends at its time limit; slurm/train.sbatch is the one that saves and requeues before.
"""

import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import fiddle
import nemo_run as run

import recipes
from nemo_moviegen.cluster import cluster_names, read_cluster
from nemo_moviegen.launch import check_run, launch
from nemo_moviegen.recipe import Recipe

DEFAULT_TIME = "24:00:00"
"""Time limit of a batch job whose cluster names none."""


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


def local_executor() -> run.Config[run.LocalExecutor]:
    """A process of its own on this machine; it starts the ranks."""
    # it starts `python`, which is another one where `nemo` was called by its path
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    environment = _environment(os.environ.get("MOVIEGEN_ROOT", ".")) | {"PATH": path}
    return run.Config(run.LocalExecutor, env_vars=environment)


def slurm_executor(cluster) -> run.Config[run.SlurmExecutor]:
    """A batch job on a `Cluster`: one task a node, which is torchrun with a rank for each GPU.

    Submitted from this machine. What SLURM is told of the site is the cluster's own section `slurm`.
    """
    names = ("account", "partition", "qos", "time_limit", "container", "mounts")
    stated = {name: getattr(cluster.slurm, name) or None for name in names}  # an empty one is SLURM's default
    container = stated["container"]
    bare = f"export PATH={Path(sys.executable).parent}:$PATH"
    options = [option.removeprefix("--").partition("=") for option in cluster.slurm.options]
    return run.Config(
        run.SlurmExecutor,
        account=stated["account"],
        partition=stated["partition"],
        qos=stated["qos"],
        time=stated["time_limit"] or DEFAULT_TIME,
        job_name_prefix="moviegen-",
        nodes=cluster.nodes,
        ntasks_per_node=cluster.ranks_per_node,  # the launcher makes it one task that starts so many ranks
        gpus_per_node=cluster.gpus_asked or None,
        exclusive=True,
        mem="0",  # all a node has
        container_image=container,
        container_mounts=list(stated["mounts"] or ()) if container else [],
        setup_lines=None if container else bare,
        env_vars=_environment(cluster.root) | cluster.slurm.variables,
        additional_parameters={name: value if is_set else True for name, is_set, value in options},
        launcher="torchrun",
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        packager=run.Config(run.Packager),  # nothing is copied: the package is installed where it runs
    )


class CheckedFirst(run.Plugin):
    """Refuses before anything is submitted what would be refused on the nodes."""

    def setup(self, task, executor):
        """ValueError where the recipe does not fit its cluster, or the executor is another cluster's."""
        recipe = fiddle.build(task).keywords["recipe"]
        cluster = read_cluster(recipe.cluster)
        check_run(recipe, cluster)
        nodes = getattr(executor, "nodes", None)
        if isinstance(executor, run.SlurmExecutor) and nodes != cluster.nodes:
            raise ValueError(
                f"{recipe.name} is for {cluster.name}, {cluster.nodes} nodes, and the executor has {nodes}: "
                f"set run.executor=slurm.{cluster.name}, or recipe.cluster to the executor's"
            )


def _environment(root):
    """A job starts in a folder of NeMo-Run's, and a recipe's relative paths start from the cluster's root."""
    return {"MOVIEGEN_ROOT": str(Path(root).resolve())}


def _register_recipe(name, function):
    def task() -> run.Partial:
        return run.Partial(train, recipe=as_config(function()))

    task.__doc__ = function.__doc__
    run.cli.factory(task, target=train, name=name)


def _register_cluster(name):
    def executor() -> run.Config[run.SlurmExecutor]:
        return slurm_executor(read_cluster(name))

    executor.__doc__ = f"A batch job on {name}."
    run.cli.factory(executor, name=f"slurm.{name}")


run.cli.entrypoint(train, namespace="moviegen", default_plugins=[run.Config(CheckedFirst)])
for _name, _function in recipes.RECIPES.items():
    _register_recipe(_name, _function)
run.cli.factory(local_executor, name="local")
for _name in cluster_names():
    _register_cluster(_name)
