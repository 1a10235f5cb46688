"""A recipe as a batch job: checked as far as one can without the cluster, then slurm/train.sbatch."""

import math
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_moviegen.cluster import NOTICE_SECONDS, Cluster, placed
from nemo_moviegen.launch import check_inputs, check_run
from nemo_moviegen.planning.plan import Plan, make_plan
from nemo_moviegen.recipe import Recipe, TaeRecipe

SCRIPT = "slurm/train.sbatch"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What would be handed to SLURM."""

    recipe: Recipe
    cluster: Cluster
    command: tuple[str, ...]
    environment: dict[str, str]
    """Set for sbatch, which hands its environment on to the job."""
    plan: Plan | None
    """None for an autoencoder."""

    @property
    def line(self) -> str:
        """What one would type for the same."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.command)])


def make_job(recipe, cluster, typed, settings=(), *, name="", after="", options=(), check_paths=True) -> Job:
    """The `Job` of a recipe on a cluster; `typed` and `settings` are the recipe's name and changes as typed.

    `name` is the job's (the recipe's), `after` a job that it waits for, `options` go to sbatch besides the
    cluster's own. ValueError where layout, batch or memory do not fit, where the container does not see the
    root or this project's script is not there, and, with `check_paths`, where the container or inputs are
    missing or the output can not be written.
    """
    check_run(recipe, cluster)
    if not Path(SCRIPT).is_file():
        raise ValueError(f"{SCRIPT} is not below {Path.cwd()}: submit from the folder of the project")
    check_mounts(cluster)
    if check_paths:
        check_container(cluster)
        here = placed(recipe, cluster)
        check_inputs(replace(here, init_from="") if after else here)  # the job before may be to write it
    site = cluster.slurm
    environment = {"RECIPE": typed, "CLUSTER": recipe.cluster}
    if site.container:
        environment["CONTAINER"] = site.container
    if site.container and site.mounts:
        environment["MOUNTS"] = ",".join(site.mounts)
    environment |= site.variables
    asked = _options(recipe, cluster, name, after)
    return Job(
        recipe=recipe,
        cluster=cluster,
        command=("sbatch", *asked, *_sbatch_options(options), SCRIPT, *settings),
        environment=environment,
        plan=None if isinstance(recipe, TaeRecipe) else make_plan(recipe, cluster),
    )


def submit(job) -> str:
    """Hand the job to SLURM; returns its number. ValueError where there is no sbatch or it refuses."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch here: run this on a login node of the cluster, or look with --dry-run"
        )
    done = subprocess.run(
        job.command, env=os.environ | job.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"sbatch refused {job.recipe.name}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().split(";")[0]


def check_container(cluster):
    """ValueError where the cluster's container is a file that is not there."""
    container = cluster.slurm.container
    if container.startswith(("/", "./")) and not Path(container).exists():
        raise ValueError(
            f"cluster {cluster.name} runs in the container {container}, which is not there: import it "
            f"(enroot import -o {container} docker://...), or set slurm.container; empty = without one"
        )


def check_mounts(cluster):
    """ValueError where the cluster's root would not be seen in its container."""
    site, root = cluster.slurm, os.path.abspath(cluster.root)
    seen = [os.getcwd(), os.path.expanduser("~"), *(mount.split(":")[1] for mount in site.mounts)]
    if site.container and not any(Path(root).is_relative_to(folder) for folder in seen):
        raise ValueError(
            f"cluster {cluster.name} has its data and runs below {root}, which its container does not see: "
            f"add {root}:{root} to slurm.mounts"
        )


def summary(job) -> list[tuple[str, str]]:
    """(what, value) of what one wants to see before it is submitted."""
    recipe, cluster, layout = job.recipe, job.cluster, job.recipe.layout
    copies = layout.data_parallel(cluster.num_ranks)
    rows = [
        ("recipe", recipe.name),
        (
            "cluster",
            f"{cluster.name}: {cluster.nodes:,} nodes x {cluster.ranks_per_node} {cluster.accelerator}",
        ),
        (
            "layout",
            f"TP{layout.tensor} CP{layout.context} DP{copies}, sharding {layout.sharding}, "
            f"recompute {layout.recompute}",
        ),
        (
            "batch",
            f"{recipe.global_batch:,}: {recipe.num_microbatches(cluster.num_ranks)} micro-batches of "
            f"{recipe.micro_batch} a copy of the model",
        ),
        ("output", placed(recipe, cluster).output),
        ("time limit", _time_limit(job)),
    ]
    plan = job.plan
    if plan is not None:
        limit, needed = plan.memory_limit_bytes / 2**30, plan.memory.device_bytes / 2**30
        rows.append(("memory of a rank", f"{needed:.1f} of {limit:.1f} GiB (planned)"))
    if plan is not None and plan.step_seconds is not None:
        mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
        rows.append(("a step", f"{plan.step_seconds:.2f} s{mfu} (planned)"))
        rows.append(("the recipe", f"{plan.days:.1f} days, {plan.gpu_hours:,.0f} GPU-hours (planned)"))
    return rows


def _time_limit(job) -> str:
    limit = job.cluster.slurm.limit_seconds
    if math.isinf(limit):
        return job.cluster.slurm.time_limit or "SLURM's own"
    if job.plan is None or job.plan.days is None:
        return job.cluster.slurm.time_limit
    starts = math.ceil(job.plan.days * 86400 / (limit - NOTICE_SECONDS))
    return f"{job.cluster.slurm.time_limit}: {starts:,} starts of the job, one after the other (planned)"


def _sbatch_options(texts):
    options = [option for text in texts for option in shlex.split(text)]
    for option in options:
        if not option.startswith("-"):
            raise ValueError(
                f"--sbatch has {option!r}; it needs options of sbatch as --NAME=value, in "
                "--sbatch=--exclude=n07 for example"
            )
    return options


def _options(recipe, cluster, name, after):
    site = cluster.slurm
    options = ["--parsable", f"--nodes={cluster.nodes}", f"--job-name={name or recipe.name}"]
    for flag, value in (
        ("partition", site.partition),
        ("account", site.account),
        ("qos", site.qos),
        ("time", site.time_limit),
        ("gpus-per-node", cluster.gpus_asked),
        ("dependency", f"afterok:{after}" if after else ""),
    ):
        options += [f"--{flag}={value}"] if value else []
    return [*options, *site.options]
