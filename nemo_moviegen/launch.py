"""From a recipe to running ranks: checked first, then started once a rank, then handed to its trainer.

moviegen train, nemo moviegen train ---> launch --+--> as many ranks as the cluster has --> launch, each
                 torchrun, slurm/train.sbatch ----+--> the recipe's trainer
"""

import importlib.util
import os
import sys
from pathlib import Path

from nemo_moviegen.cluster import check_on_cluster, placed, read_cluster
from nemo_moviegen.planning.search import memory_problem
from nemo_moviegen.precision import multiplies_fp8
from nemo_moviegen.recipe import RECIPE_FILE, TaeRecipe, recipe_yaml
from nemo_moviegen.stopping import Stopped
from nemo_moviegen.writable import why_not_writable

LAUNCH_FILE = "launch.yaml"
"""In the output folder: the recipe as it was asked for, which the started ranks read."""


def launch(recipe, debug=False) -> int:
    """Train `recipe` on its cluster; returns the exit code: 0, or one of those of stopping.py.

    A process that no launcher started (no WORLD_SIZE) starts the cluster's ranks on this machine, with the
    cores shared evenly, and waits for them. Raises ValueError before anything starts where the layout, the
    batch, the number of ranks or the inputs do not fit.
    """
    cluster = read_cluster(recipe.cluster)
    check_run(recipe, cluster)
    here = placed(recipe, cluster)
    how = f"submit it with moviegen submit {recipe.name} --cluster {recipe.cluster}"
    starts = must_start_ranks(cluster, how)
    check_inputs(here)
    if starts:
        command = ["train", *(["--debug"] if debug else [])]
        return start_ranks(recipe, here.output, cluster, command)
    try:
        _train(here)
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"moviegen: {stopped}", file=sys.stderr, flush=True)
        return stopped.code
    return 0


def must_start_ranks(cluster, how) -> bool:
    """Whether this process has to start the cluster's ranks, and is not one of them.

    ValueError where another number was started, or where none was and they are on several nodes; `how` says
    what starts them there.
    """
    started = int(os.environ.get("WORLD_SIZE", 0))
    if not started and cluster.nodes > 1:
        raise ValueError(
            f"cluster {cluster.name} has {cluster.nodes} nodes, this is one process: {how}, or name a "
            "smaller cluster"
        )
    if started and started != cluster.num_ranks:
        raise ValueError(
            f"cluster {cluster.name} has {cluster.num_ranks} ranks, {started} were started: start "
            f"{cluster.nodes} nodes of {cluster.ranks_per_node}, or name a cluster of {started}"
        )
    return not started and cluster.num_ranks > 1


def check_run(recipe, cluster):
    """ValueError where layout, batch, memory or number format do not fit the cluster; looks at no path."""
    check_on_cluster(recipe, cluster)
    is_video = not isinstance(recipe, TaeRecipe)  # an autoencoder has no FP8, and no plan
    if is_video and multiplies_fp8(recipe.precision, recipe.fp8) and cluster.accelerator == "cpu":
        raise ValueError(
            f"{recipe.name} trains in {recipe.precision}, and cluster {cluster.name} has no GPU: set "
            "precision=bf16, fp8.emulated=true to try out its numbers, or a cluster of H100s"
        )
    if is_video and (problem := memory_problem(recipe, cluster)):
        raise ValueError(f"{problem}; or set memory_gib of the cluster to what its ranks have")


def check_inputs(recipe):
    """ValueError naming what `recipe` reads and does not find, or where it can not write."""
    _check_output(recipe)
    _check_progress(recipe)
    if isinstance(recipe, TaeRecipe):
        _check_autoencoder_inputs(recipe)
        return
    if not (Path(recipe.data.folder) / "index.parquet").is_file():
        raise ValueError(
            f"{recipe.name} reads the latents of {recipe.data.folder}, which holds no index.parquet: "
            f"write them with `moviegen encode`, or set data.folder"
        )
    heldout = recipe.validation.latents(recipe.data.folder)
    readers = {
        "validation.every": (recipe.validation.every, "measures its validation loss on"),
        "progress.samples_every": (recipe.progress.samples_every, "takes the prompts of its samples from"),
    }
    for key, (every, does) in readers.items():
        if every and not (heldout / "index.parquet").is_file():
            raise ValueError(
                f"{recipe.name} {does} the latents of {heldout}, which holds no index.parquet: run "
                "`moviegen encode` on a manifest with clips of the split heldout (`moviegen shapes "
                f"--heldout N` makes some), set validation.folder, or set {key}=0"
            )
    resumes = (Path(recipe.output) / RECIPE_FILE).is_file()
    if recipe.init_from and not resumes and not (Path(recipe.init_from) / RECIPE_FILE).is_file():
        raise ValueError(
            f"{recipe.name} starts from the run in {recipe.init_from}, which holds no recipe.yaml: "
            f"train that stage first, or set init_from (empty = fresh weights)"
        )


def _check_output(recipe):
    if int(os.environ.get("RANK", 0)):  # thousands of ranks need not ask the same disk
        return
    output = Path(recipe.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if problem := why_not_writable(there):
        raise ValueError(
            f"{recipe.name} writes into {output}, and {there} can not be written ({problem}): set "
            "output=..., or MOVIEGEN_ROOT to a folder of yours"
        )


def _check_progress(recipe):
    progress = recipe.progress
    if progress.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"{recipe.name} reports to project {progress.wandb_project} of Weights & Biases, whose package "
            "is not installed: pip install wandb, or set progress.wandb_project= (metrics.jsonl and "
            "TensorBoard have the same numbers)"
        )
    decodes = progress.samples_every and progress.autoencoder
    if decodes and not Path(progress.autoencoder, RECIPE_FILE).is_file():
        raise ValueError(
            f"{recipe.name} decodes its samples with the autoencoder in {progress.autoencoder}, which holds "
            "no recipe.yaml: set progress.autoencoder to a run folder of one, or to nothing "
            "(progress.autoencoder=) to see the latents"
        )


def _check_autoencoder_inputs(recipe):
    if not Path(recipe.data.manifest).is_file():
        raise ValueError(
            f"{recipe.name} reads the clips of {recipe.data.manifest}, which is not there: write it with "
            "`moviegen shapes` or `moviegen cut`, or set data.manifest (a manifest, or one video file)"
        )
    if recipe.loss.perceptual and not Path(recipe.loss.vgg_weights).is_file():
        raise ValueError(
            f"{recipe.name} compares features of VGG16, whose weights {recipe.loss.vgg_weights} are not "
            "there: set loss.vgg_weights to torchvision's vgg16-397923af.pth, or train without by "
            "loss.perceptual=0"
        )
    start = Path(recipe.init_from)
    resumes = (Path(recipe.output) / RECIPE_FILE).is_file()
    is_there = any((start / file).is_file() for file in (RECIPE_FILE, "config.json"))
    if recipe.init_from and not resumes and not is_there:
        raise ValueError(
            f"{recipe.name} starts from the autoencoder in {recipe.init_from}, which is not there: train it "
            "first, or set init_from to its run folder, to a folder of diffusers' AutoencoderKL, or to "
            "nothing (init_from=) for fresh weights"
        )


def _train(recipe):
    if isinstance(recipe, TaeRecipe):
        from nemo_moviegen.training.autoencoder import train_autoencoder

        train_autoencoder(recipe)
    else:
        from nemo_moviegen.training.run import train

        train(recipe)


def start_ranks(recipe, output, cluster, command) -> int:
    """Start the cluster's ranks on this machine, each as `moviegen COMMAND... RECIPE`, and wait for them.

    The recipe is handed over as a file in the folder `output`. Returns the exit code, as `node.run_ranks`.
    """
    from nemo_moviegen.node import run_ranks

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / LAUNCH_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // cluster.num_ranks)))
    arguments = ["--standalone", f"--nproc-per-node={cluster.num_ranks}", "-m", "nemo_moviegen"]
    return run_ranks([*arguments, *command, str(output / LAUNCH_FILE)])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
