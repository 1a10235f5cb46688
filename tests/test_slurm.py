"""The batch scripts, run with stand-ins for SLURM's commands that write down how they were called."""

import os
import signal
import socket
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
    "python": 'printf "%s\\n" "$@" >"$CALLS/python"; echo "$*" >>"$CALLS/programs"; '
    'echo "$OMP_NUM_THREADS" >"$CALLS/threads"; '
    'touch "$CALLS/up"; until [ ! "${UNTIL_ASKED-}" ] || [ -e "$MOVIEGEN_STOP" ]; do sleep 0.02; done; '
    'sleep "${SECONDS_TO_RUN:-0}"; exit "${PYTHON_EXIT:-0}"',
    "scontrol": 'echo "$@" >>"$CALLS/scontrol"; case "$2" in hostnames) printf "%s\\n" ${HOSTS:-n07 n08} ;; '
    'job) echo "JobId=41234 JobName=moviegen JobState=${JOB_STATE:-RUNNING} Reason=None" ;; esac',
}


@pytest.fixture
def job(tmp_path):
    """Environment of a job on two nodes, with the stand-ins first on PATH; their calls land in tmp_path."""
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    project = tmp_path / "project"  # the job writes into the folder it was submitted from
    project.mkdir()
    for name in ("slurm", "recipes"):
        (project / name).symlink_to(ROOT / name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMP_NUM", "MOVIEGEN"))}
    return environment | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "VENV": "no-such-environment",
        "CALLS": str(tmp_path),
        "RECIPE": "video_30b.t2i_256_1536",
        "CLUSTER": "h100_1536",
        "PREFLIGHT": "0",
        "SLURM_SUBMIT_DIR": str(project),
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


def requeued(job):
    return "requeue 41234" in called(job, "scontrol")


@pytest.mark.parametrize("script", [SCRIPT, ARRAY], ids=lambda path: path.name)
def test_the_script_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_one_torchrun_a_node_starts_a_rank_for_each_gpu_and_trains_the_recipe(job):
    result = submit(job, "num_steps=10", "output=with space")
    assert result.returncode == 0, result.stderr
    python = called(job, "python")
    assert python[:7] == [
        "-m",
        "nemo_moviegen.node",
        "--nnodes=192",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=n07:21234",
        "--rdzv-id=41234",
    ]
    command = ["-m", "nemo_moviegen", "train", "video_30b.t2i_256_1536", "--cluster", "h100_1536"]
    assert python[7:] == [*command, "num_steps=10", "output=with space"]
    assert "--ntasks-per-node=1" in called(job, "srun")
    assert called(job, "scontrol") == ["show hostnames n[07-198]"]
    assert called(job, "threads") == ["12"]


def test_nodes_and_what_lies_between_them_are_looked_at_before_ranks_start(job, tmp_path):
    result = submit(job, PREFLIGHT="1")
    assert result.returncode == 0, result.stderr
    left = tmp_path / "project" / ".slurm" / "41234.preflight"
    *looked, started = called(job, "programs")
    assert looked == [
        "-m nemo_moviegen.preflight h100_1536",
        f"-m nemo_moviegen.preflight --compare {left}",
        "-m nemo_moviegen.preflight h100_1536 --between n07:21234",
    ]
    assert started.startswith("-m nemo_moviegen.node ")


def test_a_node_that_is_refused_ends_the_job_for_good(job):
    result = submit(job, PREFLIGHT="1", PYTHON_EXIT="3")
    assert result.returncode == 3 and not requeued(job)
    assert "nodes were refused (above): submit again with" in result.stderr
    assert called(job, "programs") == ["-m nemo_moviegen.preflight h100_1536"]


def test_the_ranks_arguments_are_ones_torchrun_and_the_command_line_take(job):
    from torch.distributed.run import get_args_parser

    from nemo_moviegen.arguments import parse

    submit(job, "num_steps=10")
    torchrun = get_args_parser().parse_args(called(job, "python")[2:])
    assert torchrun.module and torchrun.training_script == "nemo_moviegen"
    options = parse(torchrun.training_script_args)
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
        ({"CONTAINER": "/images/missing.sqsh"}, "the container /images/missing.sqsh is not on"),
        ({"CLUSTER": "/site/missing.yaml"}, "no cluster '/site/missing.yaml'"),
        ({"CLUSTER": "h100"}, "no cluster 'h100'; known: cpu_2 h100_1536"),
        ({"CLUSTER": ""}, "set CLUSTER"),
        ({"RECIPE": ""}, "set RECIPE"),
        ({"SLURM_JOB_ID": ""}, "submit it with sbatch, or train here with moviegen train"),
    ],
)
def test_a_missing_or_unknown_name_is_refused_before_ranks_start(job, changed, message):
    result = submit(job, **changed)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (Path(job["CALLS"]) / "srun").exists()


def test_a_container_sees_the_project_and_what_the_site_mounts(job, tmp_path):
    submit(job, CONTAINER="site/moviegen:1", MOUNTS="/data:/data")
    srun = called(job, "srun")
    project = tmp_path / "project"
    assert "--container-image=site/moviegen:1" in srun
    assert f"--container-mounts={project}:{project},/data:/data" in srun
    assert f"--container-workdir={project}" in srun
    submit(job)
    assert not [argument for argument in called(job, "srun") if "container" in argument]


def test_a_sites_own_file_says_nodes_container_and_mounts(job, tmp_path):
    text = (ROOT / "recipes" / "clusters" / "site.yaml.template").read_text()
    text = text.replace('container: ""', "container: nvcr.io#nvidia/nemo:25.09")
    text = text.replace("mounts: []", "mounts: [/data:/data, /scratch:/scratch]")
    (tmp_path / "site.yaml").write_text(text)
    result = submit(job, CLUSTER=str(tmp_path / "site.yaml"), SLURM_JOB_NUM_NODES="64")
    assert result.returncode == 0, result.stderr
    srun = called(job, "srun")
    assert "--container-image=nvcr.io#nvidia/nemo:25.09" in srun
    assert next(a for a in srun if a.startswith("--container-mounts=")).endswith(
        f",/data:/data,/scratch:/scratch,{tmp_path}/site.yaml:{tmp_path}/site.yaml"
    ), "ranks read the file too, and it lies outside of the project"


def test_a_port_that_someone_listens_at_is_not_taken(job):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 21234))
        taken.listen()
        submit(job, HOSTS="localhost")
    assert "--rdzv-endpoint=localhost:21235" in called(job, "python")


@pytest.mark.parametrize("code", [0, 2, 76])
def test_a_run_that_ended_for_good_is_not_started_again(job, code):
    """Finished; a user's mistake; stopped by an operator."""
    assert submit(job, PYTHON_EXIT=str(code)).returncode == code
    assert not requeued(job)


def test_a_run_that_was_saved_before_its_end_is_requeued_however_often(job):
    for _ in range(5):
        result = submit(job, PYTHON_EXIT="75")
        assert result.returncode == 75 and requeued(job)
        assert "requeueing job 41234" in result.stderr
        (Path(job["CALLS"]) / "scontrol").unlink()


def test_a_run_that_dies_is_tried_three_times_in_a_row_and_one_that_was_saved_begins_anew(job):
    def dies():
        (Path(job["CALLS"]) / "scontrol").unlink(missing_ok=True)
        result = submit(job, PYTHON_EXIT="137")
        assert result.returncode == 137
        return requeued(job), result.stderr

    told = [dies() for _ in range(4)]
    assert [again for again, _ in told] == [True, True, True, False]
    assert "failure 1 of 3" in told[0][1] and "4 times in a row: job 41234 ends" in told[3][1]
    submit(job, PYTHON_EXIT="75")
    assert dies()[0]


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING", "PREEMPTED"])
def test_a_job_that_slurm_has_ended_itself_is_left_alone(job, state):
    """A cancelled job must not come back, a pre-empted one is in the queue already."""
    result = submit(job, PYTHON_EXIT="75", JOB_STATE=state)
    assert not requeued(job)
    assert f"job 41234 is {state}, so it is left alone" in result.stderr


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGUSR1, "the time limit is near"), (signal.SIGTERM, "SIGTERM to the batch script")],
)
def test_a_signal_asks_the_ranks_to_stop_and_waits_for_them(job, tmp_path, number, why):
    environment = job | {"UNTIL_ASKED": "1", "PYTHON_EXIT": "75"}
    process = subprocess.Popen(["bash", SCRIPT], env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (tmp_path / "project" / ".slurm" / "41234.stop").read_text() == f"{why}\n"
    assert f"{why}: job 41234 saves" in said.decode()
    assert requeued(job) and process.returncode == 75


def test_what_asked_an_earlier_start_to_stop_does_not_stop_the_next(job, tmp_path):
    stop = tmp_path / "project" / ".slurm" / "41234.stop"
    stop.parent.mkdir()
    stop.write_text("the time limit is near\n")
    submit(job)
    assert not stop.exists()


@pytest.fixture
def array(job):
    """Environment of the fourth of eight tasks of an array."""
    return job | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "16"}


def submit_array(array, *arguments, **changed):
    command = ["bash", ARRAY, *arguments]
    return subprocess.run(command, env=array | changed, capture_output=True, text=True, timeout=30)


def test_a_task_of_an_array_encodes_its_share(array):
    from nemo_moviegen.arguments import parse

    result = submit_array(array, *ENCODE, "--buckets", "video_768", PYTHON_EXIT="5")
    assert result.returncode == 5, "the code is the task's"
    python = called(array, "python")
    assert python == ["-m", "nemo_moviegen", *ENCODE, "--buckets", "video_768", "--task", "3/8"]
    options = parse(python[2:])
    assert (options.command, options.task, options.manifests) == ("encode", (3, 8), ["with space.parquet"])


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "run", "--prompts-file", "p.txt", "--output", "o", *("--autoencoder", "t"))
        + ("--encoders", "e", "--latents", "l"),
        ("evaluate", "tae", "run", "clips.parquet"),
        ("curate", "videos", "out", "--recipe", "curation.tiny"),
    ],
    ids=lambda command: command[0],
)
def test_generation_evaluation_and_curation_are_shared_too_in_a_container(array, tmp_path, command):
    from nemo_moviegen.arguments import parse

    submit_array(array, *command, CONTAINER="site/moviegen:1", MOUNTS="/data:/data")
    options = parse(called(array, "python")[2:])
    assert (options.command, options.task) == (command[0], (3, 8))
    project = tmp_path / "project"
    assert f"--container-mounts={project}:{project},/data:/data" in called(array, "srun")


def test_some_tasks_of_a_larger_array_keep_their_numbers(array):
    submit_array(array, *ENCODE, SLURM_ARRAY_TASK_ID="17", SLURM_ARRAY_TASK_COUNT="2", NUM_TASKS="64")
    assert called(array, "python")[-1] == "17/64"


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        (ENCODE, {"SLURM_ARRAY_TASK_ID": "8"}, "task 8 of 8: let the array start at 0, or set NUM_TASKS"),
        (ENCODE, {"SLURM_ARRAY_TASK_ID": ""}, "submit it as an array"),
        (("train", "video_30b"), {}, "'train' has no tasks; use curate, encode, generate, evaluate tae or"),
        (("evaluate", "votes", "a.json"), {}, "'evaluate votes' has no tasks"),
        ((), {}, "'' has no tasks"),
    ],
)
def test_what_is_no_array_of_shared_work_is_refused(array, arguments, changed, message):
    result = submit_array(array, *arguments, **changed)
    assert result.returncode != 0 and message in result.stderr
    assert not (Path(array["CALLS"]) / "srun").exists()


def test_near_its_time_limit_a_task_requeues_itself_alone(array, tmp_path):
    process = subprocess.Popen(
        ["bash", ARRAY, *ENCODE],
        env=array | {"SECONDS_TO_RUN": "1.5", "PYTHON_EXIT": "5"},
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert called(array, "scontrol") == ["requeue 41234"]
    assert b"requeueing task 3" in said and process.returncode == 5
