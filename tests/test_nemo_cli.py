"""NeMo-Run's way to the same runs: executors made from clusters, and what they start."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recipes
from nemo_moviegen.cluster import Cluster, Slurm, cluster_names, read_cluster
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.sizes import VIDEO_TINY

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of leptonai and fastapi, at import
NEMO = Path(sys.executable).with_name("nemo")
STAND_INS = {
    "sbatch": 'for last; do :; done; cp "$last" "$CALLS/script"; echo 4711',
    "srun": "exit 1",  # NeMo-Run takes a machine that has it for a login node
    "sacct": 'echo "JobID|State"; echo "4711|PENDING"',
    "squeue": "exit 1",
}


def nemo(tmp_path, *arguments, **environment):
    """Type `nemo moviegen train ...`; NeMo-Run's records go to tmp_path."""
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "nemo"), **environment}
    command = [NEMO, "moviegen", "train", "--yes", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def stand_ins(tmp_path):
    """An environment whose SLURM keeps the script that is submitted."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path)}


@pytest.mark.slow
def test_the_local_executor_trains_with_the_losses_of_moviegen_train(tmp_path):
    write_random_latents(tmp_path / "latents", VIDEO_TINY, 24, np.random.default_rng(0), shapes=((2, 8, 8),))
    settings = {"num_steps": 2, "global_batch": 4, "micro_batch": 2, "data.folder": tmp_path / "latents"}
    runs = {name: [*settings.items(), ("output", tmp_path / name)] for name in ("nemo", "moviegen")}
    result = nemo(
        tmp_path,
        *("--factory", "tiny.t2i", "run.executor=local"),
        *(f"recipe.{key}={value}" for key, value in runs["nemo"]),
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert (tmp_path / "nemo" / "metrics.jsonl").is_file(), said  # NeMo-Run ends well if its job does not
    command = [sys.executable, "-m", "nemo_moviegen", "train", "tiny.t2i"]
    command += [f"{key}={value}" for key, value in runs["moviegen"]]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    losses = [
        [json.loads(line)["train/loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in runs
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_slurm_executor_submits_one_torchrun_a_node_of_the_cluster(tmp_path, stand_ins):
    import fiddle
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    result = nemo(
        tmp_path,
        *("--detach", "--factory", "video_30b.t2iv_768_cp2_4096", "recipe.num_steps=10"),
        *("run.executor=slurm.h100_4096", "run.executor.time=08:00:00"),
        **stand_ins,
        MOVIEGEN_ROOT="/shared/us",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    script = (tmp_path / "script").read_text()
    for flag in ("nodes=512", "ntasks-per-node=1", "gpus-per-node=8", "time=08:00:00", "exclusive"):
        assert f"#SBATCH --{flag}\n" in script
    assert "--account" not in script and "--partition" not in script and "--container" not in script
    (command,) = (line for line in script.splitlines() if "torchrun" in line)
    for part in ("--nnodes 512 ", "--nproc-per-node 8 ", "-m nemo_run.core.runners.fdl_runner "):
        assert part in command
    assert "export MOVIEGEN_ROOT=/shared/us\n" in script
    assert f"export PATH={Path(sys.executable).parent}:$PATH\n" in script
    task = Path(command.split()[-1]).read_text()  # where the job finds it: no container, so a real path
    recipe = fiddle.build(ZlibJSONSerializer().deserialize(task)).keywords["recipe"]
    assert recipe == replace(recipes.get("video_30b.t2iv_768_cp2_4096"), num_steps=10)


def rendered(cluster, monkeypatch, tmp_path):
    """The batch script of a recipe on a cluster, as NeMo-Run writes it in a dry run."""
    import fiddle
    import nemo_run as run

    from nemo_moviegen.nemo_cli import as_config, slurm_executor, train

    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # it hands ours to the commands it runs
    executor = fiddle.build(slurm_executor(cluster))
    task = run.Partial(train, recipe=as_config(recipes.get("video_30b.sft")))
    with run.Experiment("moviegen", executor=executor, base_dir=str(tmp_path)) as experiment:
        experiment.add(task, executor=executor, name="train")
        experiment.dryrun(log=False, delete_exp_dir=False)
    (script,) = tmp_path.rglob("*_sbatch.sh")
    return script.read_text()


def test_partition_account_limit_and_container_are_the_clusters(monkeypatch, tmp_path):
    site = Slurm(
        partition="train",
        account="video",
        time_limit="2-00:00:00",
        container="/images/moviegen.sqsh",
        mounts=("/shared:/shared", "/data:/data:ro"),
        gpus_per_node=8,
        options=("--constraint=h100", "--spread-job"),
        environment=("NCCL_IB_HCA=mlx5",),
    )
    facts = {"accelerator": "h100", "nodes": 3, "ranks_per_node": 4, "memory_gib": 79, "root": "/shared"}
    cluster = Cluster(name="x", slurm=site, **facts)
    script = rendered(cluster, monkeypatch, tmp_path)
    stated = ("partition=train", "account=video", "time=2-00:00:00", "nodes=3", "gpus-per-node=8")
    for flag in (*stated, "constraint=h100", "spread-job"):
        assert f"#SBATCH --{flag}\n" in script
    assert "--qos" not in script and "export NCCL_IB_HCA=mlx5\n" in script
    (command,) = (line for line in script.splitlines() if "torchrun" in line)
    assert "--container-image /images/moviegen.sqsh " in command
    assert "--container-mounts /shared:/shared,/data:/data:ro," in command
    assert "--nnodes 3 --nproc-per-node 4 " in command
    assert f"export PATH={Path(sys.executable).parent}" not in script  # the container has its own


def test_a_cluster_of_cpus_asks_for_no_gpus(monkeypatch, tmp_path):
    script = rendered(read_cluster("cpu_2"), monkeypatch, tmp_path)
    assert "gpus" not in script
    assert "--nnodes 1 --nproc-per-node 2 " in script


def test_every_cluster_is_an_executor_by_its_name():
    import fiddle
    import nemo_run as run
    from nemo_run.cli.cli_parser import parse_factory

    import nemo_moviegen.nemo_cli  # noqa: F401, registers them

    for name in cluster_names():
        executor = fiddle.build(parse_factory(object, "executor", run.SlurmExecutor, f"slurm.{name}"))
        assert executor.nodes * executor.ntasks_per_node == read_cluster(name).num_ranks
    assert isinstance(
        fiddle.build(parse_factory(object, "executor", run.LocalExecutor, "local")), run.LocalExecutor
    )


def test_what_does_not_fit_is_refused_before_it_is_submitted():
    import fiddle
    import nemo_run as run

    from nemo_moviegen.nemo_cli import CheckedFirst, as_config, slurm_executor, train

    def check(cluster, **changes):
        task = run.Partial(train, recipe=as_config(recipes.get("video_30b.sft")))
        for key, value in changes.items():
            setattr(task.recipe, key, value)
        CheckedFirst().setup(task, fiddle.build(slurm_executor(read_cluster(cluster))))

    check("h100_512")
    with pytest.raises(
        ValueError, match=r"h100_512, 64 nodes, and the executor has 192: set run\.executor=slurm"
    ):
        check("h100_1536")
    with pytest.raises(ValueError, match=r"video_30b\.sft on h100_512 \(512 ranks\): global_batch 63"):
        check("h100_512", global_batch=63)
    with pytest.raises(ValueError, match="nearest that fits"):
        check("h100_512", layout=as_config(replace(recipes.get("video_30b.sft").layout, recompute="none")))


def test_an_fp8_recipe_is_refused_on_a_cluster_of_cpus():
    from nemo_moviegen.launch import launch
    from nemo_moviegen.recipe import override

    fp8 = override(recipes.get("video_30b.t2i_256_1536_fp8"), ["cluster=cpu_2", "global_batch=12"])
    with pytest.raises(ValueError, match="cluster cpu_2 has no GPU: set precision=bf16"):
        launch(fp8)
