"""The batch scripts, run with stand-ins for SLURM's commands that write down how they were called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "train.sbatch"
ARRAY = ROOT / "slurm" / "array.sbatch"
ENCODE = (
    "encode",
    "--manifest",
    "with space.parquet",
    "--autoencoder",
    "t",
    "--encoders",
    "e",
    "--output",
    "o",
)

STAND_INS = {
    "srun": 'printf "%s\\n" "$@" >"$CALLS/srun"; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "python": 'printf "%s\\n" "$@" >"$CALLS/python"; touch "$CALLS/up"; sleep "${SECONDS_TO_RUN:-0}"; exit 5',
    "torchrun": 'printf "%s\\n" "$@" >"$CALLS/torchrun"; echo "$OMP_NUM_THREADS" >"$CALLS/threads"; '
    'touch "$CALLS/up"; sleep "${SECONDS_TO_RUN:-0}"; exit "${TORCHRUN_EXIT:-0}"',
    "scontrol": 'echo "$@" >>"$CALLS/scontrol"; [ "$1" != show ] || printf "n07\\nn08\\n"',
}


@pytest.fixture
def job(tmp_path):
    """Environment of a job on two nodes, with the stand-ins first on PATH; their calls land in tmp_path."""
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMP_NUM"))}
    return environment | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "VENV": "no-such-environment",
        "CALLS": str(tmp_path),
        "RECIPE": "video_30b.t2i_256_1536",
        "CLUSTER": "h100_1536",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "192",
        "SLURM_JOB_NODELIST": "n[07-198]",
        "SLURM_CPUS_ON_NODE": "96",
    }


def submit(job, *settings, **changed):
    command = ["bash", SCRIPT, *settings]
    return subprocess.run(command, env=job | changed, capture_output=True, text=True, timeout=30)


def called(job, name):
    return (Path(job["CALLS"]) / name).read_text().split("\n")[:-1]


@pytest.mark.parametrize("script", [SCRIPT, ARRAY], ids=lambda path: path.name)
def test_the_script_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_one_torchrun_a_node_starts_a_rank_for_each_gpu_and_trains_the_recipe(job):
    result = submit(job, "num_steps=10", "output=with space")
    assert result.returncode == 0, result.stderr
    torchrun = called(job, "torchrun")
    assert torchrun[:5] == [
        "--nnodes=192",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=n07:21234",
        "--rdzv-id=41234",
    ]
    command = ["-m", "nemo_moviegen", "train", "video_30b.t2i_256_1536", "--cluster", "h100_1536"]
    assert torchrun[5:] == [*command, "num_steps=10", "output=with space"]
    assert "--ntasks-per-node=1" in called(job, "srun")
    assert called(job, "scontrol") == ["show hostnames n[07-198]"]
    assert called(job, "threads") == ["12"]


def test_the_ranks_arguments_are_ones_the_command_line_takes(job):
    from nemo_moviegen.arguments import parse

    submit(job, "num_steps=10")
    torchrun = called(job, "torchrun")
    options = parse(torchrun[torchrun.index("nemo_moviegen") + 1 :])
    assert (options.command, options.recipe) == ("train", "video_30b.t2i_256_1536")
    assert (options.cluster, options.settings) == ("h100_1536", ["num_steps=10"])


def test_the_number_of_nodes_must_be_the_clusters(job):
    result = submit(job, SLURM_JOB_NUM_NODES="191")
    assert result.returncode == 2
    assert "cluster h100_1536 has 192 nodes, the job has 191: use sbatch --nodes=192" in result.stderr
    assert not (Path(job["CALLS"]) / "srun").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"CLUSTER": "h100"}, "no cluster 'h100'; known: cpu_2 h100_1536"),
        ({"CLUSTER": ""}, "set CLUSTER"),
        ({"RECIPE": ""}, "set RECIPE"),
    ],
)
def test_a_missing_or_unknown_name_is_refused_before_ranks_start(job, changed, message):
    result = submit(job, **changed)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (Path(job["CALLS"]) / "srun").exists()


def test_the_exit_code_is_that_of_the_ranks(job):
    assert submit(job, TORCHRUN_EXIT="7").returncode == 7


def test_near_its_time_limit_the_job_requeues_itself_and_waits_for_its_ranks(job, tmp_path):
    environment = job | {"SECONDS_TO_RUN": "1.5", "TORCHRUN_EXIT": "3"}
    process = subprocess.Popen(["bash", SCRIPT], env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert called(job, "scontrol")[-1] == "requeue 41234"
    assert b"requeueing job 41234" in said
    assert process.returncode == 3  # waited to the end: the code is the ranks', not the signal's


@pytest.fixture
def array(job):
    """Environment of the fourth of eight tasks of an array."""
    return job | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "16"}


def submit_array(array, *arguments, **changed):
    command = ["bash", ARRAY, *arguments]
    return subprocess.run(command, env=array | changed, capture_output=True, text=True, timeout=30)


def test_a_task_of_an_array_encodes_its_share(array):
    from nemo_moviegen.arguments import parse

    result = submit_array(array, *ENCODE, "--buckets", "video_768")
    assert result.returncode == 5, "the code is the task's"
    python = called(array, "python")
    assert python == ["-m", "nemo_moviegen", *ENCODE, "--buckets", "video_768", "--task", "3/8"]
    options = parse(python[2:])
    assert (options.command, options.task, options.manifests) == ("encode", (3, 8), ["with space.parquet"])


def test_some_tasks_of_a_larger_array_keep_their_numbers(array):
    submit_array(array, *ENCODE, SLURM_ARRAY_TASK_ID="17", SLURM_ARRAY_TASK_COUNT="2", NUM_TASKS="64")
    assert called(array, "python")[-1] == "17/64"


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        (ENCODE, {"SLURM_ARRAY_TASK_ID": "8"}, "task 8 of 8: let the array start at 0, or set NUM_TASKS"),
        (ENCODE, {"SLURM_ARRAY_TASK_ID": ""}, "submit it as an array"),
        (("train", "video_30b"), {}, "'train' has no tasks; use curate or encode"),
        ((), {}, "'' has no tasks"),
    ],
)
def test_what_is_no_array_of_shared_work_is_refused(array, arguments, changed, message):
    result = submit_array(array, *arguments, **changed)
    assert result.returncode != 0 and message in result.stderr
    assert not (Path(array["CALLS"]) / "srun").exists()


def test_near_its_time_limit_a_task_requeues_itself_alone(array, tmp_path):
    process = subprocess.Popen(
        ["bash", ARRAY, *ENCODE], env=array | {"SECONDS_TO_RUN": "1.5"}, stderr=subprocess.PIPE
    )
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert called(array, "scontrol") == ["requeue 41234"]
    assert b"requeueing task 3" in said and process.returncode == 5
