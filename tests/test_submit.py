"""`moviegen submit`: what it checks, what it hands to sbatch, and a site's own cluster file."""

import os
import shlex
from pathlib import Path

import pytest

from nemo_moviegen import __main__ as cli
from nemo_moviegen.cluster import Slurm, read_cluster

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "recipes" / "clusters" / "site.yaml.template"
ROW = "video_30b.t2iv_768_cp2_4096"


@pytest.fixture(autouse=True)
def from_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def sbatch(monkeypatch, tmp_path):
    """A stand-in that writes its arguments and what the recipe's environment is, and gives a job number."""
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/arguments\nenv >{tmp_path}/environment\necho 4711\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def site(tmp_path):
    """A cluster file made from the template; call it with the changes."""

    def write(**changes):
        text = TEMPLATE.read_text().replace("name: NAME ", "name: here ")
        for key, value in changes.items():
            (line,) = (row for row in text.splitlines() if row.strip().startswith(f"{key}: "))
            indent = line[: len(line) - len(line.lstrip())]
            text = text.replace(line, f"{indent}{key}: {value}" if value is not None else "")
        path = tmp_path / "here.yaml"
        path.write_text(text)
        return str(path)

    return write


def run(capsys, *arguments):
    code = cli.main(["submit", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_dry_run_prints_a_line_that_can_be_typed_and_submits_nothing(capsys, sbatch):
    code, out, _ = run(capsys, ROW, "num_steps=10", "output=a b", "--dry-run", "--skip-paths")
    assert code == 0 and not (sbatch / "arguments").exists()
    typed = shlex.split(out.splitlines()[-1])
    assert typed[:3] == [f"RECIPE={ROW}", "CLUSTER=h100_4096", "sbatch"]
    assert {"--nodes=512", "--gpus-per-node=8", f"--job-name={ROW}"} <= set(typed)
    assert typed[-3:] == ["slurm/train.sbatch", "num_steps=10", "output=a b"]
    assert "of 79.0 GiB" in out and "GPU-hours" in out and "TP4 CP2 DP512" in out
    assert "512: 1 micro-batches of 1" in out and "recompute selective" in out


def test_a_folder_in_brackets_is_shown_as_it_is(capsys):
    _, out, _ = run(capsys, ROW, "output=runs/[red]", "--dry-run", "--skip-paths")
    assert "output            runs/[red]" in out


def test_options_for_this_job_alone_stand_behind_the_sites(capsys, site):
    cluster = site(options="[--exclude=n01]")
    arguments = ("video_30b.sft", "--cluster", cluster, "--dry-run", "--skip-paths", "--name", "second try")
    _, out, _ = run(capsys, *arguments, "--sbatch=--exclude=n07,n08", "--sbatch", "--time=60 --hold")
    typed = shlex.split(out.splitlines()[-1])
    assert "--job-name=second try" in typed
    ours = ["--exclude=n01", "--exclude=n07,n08", "--time=60", "--hold", "slurm/train.sbatch"]
    assert typed[-len(ours) :] == ours
    code, _, err = run(capsys, *arguments, "--sbatch", "exclude=n07")
    assert code == 2 and "--sbatch has 'exclude=n07'; it needs options of sbatch" in err


def test_how_often_the_time_limit_ends_the_job_is_said(capsys, site):
    cluster = site(time_limit='"4:00:00"')
    _, out, _ = run(capsys, "video_30b.sft", "--cluster", cluster, "--dry-run", "--skip-paths")
    days = float(out.split("the recipe")[1].split("days")[0])
    (starts,) = (int(line.split(": ")[1].split()[0]) for line in out.splitlines() if "time limit" in line)
    assert abs(starts - 24 * days / (4 - 300 / 3600)) < 1


def test_a_stage_may_wait_for_the_run_it_starts_from(capsys, monkeypatch, tmp_path, sbatch):
    monkeypatch.setenv("MOVIEGEN_ROOT", str(tmp_path))
    latents = tmp_path / "out" / "demo" / "latents"
    latents.mkdir(parents=True)
    (latents / "index.parquet").touch()
    (tmp_path / "out" / "demo" / "latents_heldout").mkdir()
    (tmp_path / "out" / "demo" / "latents_heldout" / "index.parquet").touch()
    code, _, err = run(capsys, "tiny.t2iv")
    assert code == 2 and "starts from the run in" in err
    code, out, err = run(capsys, "tiny.t2iv", "--after", "12")
    assert code == 0, err
    assert "--dependency=afterok:12" in (sbatch / "arguments").read_text() and "job 4711" in out


def test_a_root_that_the_container_does_not_see_is_refused(capsys, site):
    def submits(**changes):
        cluster = site(container="nvcr.io#nvidia/nemo:25.09", root="/shared/movies", **changes)
        return run(capsys, "video_30b.sft", "--cluster", cluster, "--dry-run", "--skip-paths")

    code, _, err = submits()
    assert code == 2 and "add /shared/movies:/shared/movies to slurm.mounts" in err
    assert submits(mounts="[/lustre:/shared]")[0] == 0


def test_what_is_submitted_is_what_the_dry_run_printed(capsys, sbatch, site, tmp_path):
    image = tmp_path / "image.sqsh"
    image.touch()
    cluster = site(
        partition="train",
        account="video",
        container=image,
        mounts="[/data:/data, /scratch:/scratch:ro]",
        options="[--constraint=h100]",
        environment="[NCCL_IB_HCA=mlx5]",
    )
    arguments = ("video_30b.sft", "output=a b", "--cluster", cluster, "--skip-paths", "--after", "12")
    _, printed, _ = run(capsys, *arguments, "--dry-run")
    code, out, _ = run(
        capsys, "video_30b.sft", "output=a b", "--cluster", cluster, "--after", "12", "--skip-paths"
    )
    assert code == 0 and "job 4711" in out
    given = (sbatch / "arguments").read_text().splitlines()
    typed = shlex.split(printed.splitlines()[-1])
    assert typed[typed.index("sbatch") + 1 :] == given
    wanted = {"--partition=train", "--account=video", "--time=24:00:00", "--constraint=h100", "--nodes=64"}
    assert wanted | {"--dependency=afterok:12"} <= set(given) and given[-1] == "output=a b"
    assert not [option for option in given if option.startswith("--qos")]
    environment = (sbatch / "environment").read_text().splitlines()
    assert {
        "RECIPE=video_30b.sft",
        f"CLUSTER={cluster}",
        f"CONTAINER={image}",
        "MOUNTS=/data:/data,/scratch:/scratch:ro",
        "NCCL_IB_HCA=mlx5",
    } <= set(environment)


def test_a_cpu_cluster_asks_for_no_gpus_and_an_autoencoder_has_no_plan(capsys, sbatch):
    _, out, _ = run(capsys, "tae.tiny", "--dry-run", "--skip-paths")
    assert "gpus-per-node" not in out and "planned" not in out
    assert "--nodes=1" in out


def test_without_sbatch_it_says_where_to_go(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run(capsys, ROW, "--skip-paths")
    assert code == 2 and "there is no sbatch here" in err and "--dry-run" in err


def test_what_sbatch_refuses_is_passed_on(capsys, sbatch):
    (sbatch / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: x' >&2\nexit 1\n")
    code, _, err = run(capsys, ROW, "--skip-paths")
    assert code == 2 and f"sbatch refused {ROW}: invalid partition specified: x" in err


def test_outside_the_project_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, ROW, "--dry-run", "--skip-paths")
    assert code == 2 and "submit from the folder of the project" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([ROW], "reads the latents of data/latents_768, which holds no index.parquet"),
        ([ROW, "layout.recompute=none", "--skip-paths"], "nearest that fits: layout.recompute=selective"),
        ([ROW, "global_batch=500", "--skip-paths"], "does not split over 512 model copies"),
        ([ROW, "--cluster", "h100_4095"], "did you mean 'h100_4096'"),
        ([ROW, "--cluster", "nowhere.yaml"], "no cluster file nowhere.yaml: copy"),
        (["tiny.t2iv_fp", "--skip-paths"], "no recipe 'tiny.t2iv_fp'"),
        (["tiny.t2i", "precision=fp8_current", "--skip-paths"], "has no GPU"),
    ],
)
def test_what_can_not_run_is_refused_before_sbatch(capsys, sbatch, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (sbatch / "arguments").exists()


def test_a_container_that_is_not_there_is_refused(capsys, sbatch, site, tmp_path):
    cluster = site(container=tmp_path / "missing.sqsh")
    code, _, err = run(capsys, "video_30b.sft", "--cluster", cluster)
    assert code == 2 and "missing.sqsh, which is not there" in err


@pytest.mark.parametrize(
    ("folder", "said"),
    [("/proc/runs", "/proc can not be written"), ("FILE/runs", "FILE can not be written (Not a directory)")],
)
def test_an_output_that_can_not_be_written_is_refused(capsys, sbatch, tmp_path, folder, said):
    (tmp_path / "FILE").touch()
    folder = folder.replace("FILE", str(tmp_path / "FILE"))
    code, _, err = run(capsys, "video_30b.sft", f"output={folder}")
    assert code == 2 and said in err and "set output=" in err


def test_the_template_is_a_cluster_and_no_name_of_one(site):
    cluster = read_cluster(site())
    assert (cluster.num_ranks, cluster.slurm.time_limit) == (512, "24:00:00")
    with pytest.raises(ValueError, match="no cluster 'site'"):
        read_cluster("site")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": None}, "lacks nodes"),
        ({"nodes": "0"}, "nodes is 0"),
        ({"nodes": "many"}, "needs a value of type int"),
        ({"name": "there"}, "its name must be 'here'"),
        (
            {"ranks_per_node": "16"},
            "16 ranks on a node of 8 GPUs .* set ranks_per_node to 8, and nodes to 128",
        ),
        ({"time_limit": "24:00:00"}, "must be in quotes"),
        ({"time_limit": '"a day"'}, "slurm.time_limit is 'a day'; sbatch takes"),
        ({"time_limit": '"5"'}, "a run saves itself 300 s before: use 10 minutes or more, or --signal"),
        ({"mounts": "[/data]"}, "slurm.mounts has '/data'; it needs SOURCE:TARGET"),
        ({"options": "[constraint=h100]"}, "slurm.options has 'constraint=h100'"),
        ({"environment": "[NCCL]"}, "slurm.environment has 'NCCL'; it needs NAME=value"),
        ({"gpus_per_node": "-2"}, "slurm.gpus_per_node is -2"),
    ],
)
def test_a_cluster_file_that_is_wrong_says_what(site, changes, said):
    with pytest.raises(ValueError, match=said):
        read_cluster(site(**changes))


def test_a_short_time_limit_may_come_with_its_own_notice(site):
    cluster = read_cluster(site(time_limit='"5"', options='["--signal=B:USR1@60"]'))
    assert cluster.slurm.limit_seconds == 300


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("2-12:30", 217800)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(limit, seconds):
    assert Slurm(time_limit=limit).limit_seconds == seconds


def test_a_cluster_file_may_end_with_an_empty_slurm_section(site):
    path = Path(site())
    path.write_text(path.read_text().split("slurm:")[0] + "slurm:\n")
    assert read_cluster(str(path)).slurm == Slurm()
    path.write_text("- a list\n")
    with pytest.raises(ValueError, match="it needs the keys of Cluster"):
        read_cluster(str(path))


def test_a_misspelt_field_names_the_nearest(site):
    path = Path(site())
    path.write_text(path.read_text().replace("partition:", "partitoin:"))
    with pytest.raises(ValueError, match="no setting 'partitoin'; did you mean 'partition'"):
        read_cluster(str(path))


def test_a_run_that_does_not_fit_its_memory_is_refused_before_ranks_start(capsys, monkeypatch, tmp_path):
    text = (ROOT / "recipes" / "clusters" / "cpu_2.yaml").read_text()
    path = tmp_path / "small.yaml"
    path.write_text(text.replace("name: cpu_2", "name: small").replace("memory_gib: 4", "memory_gib: 0.1"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["train", "tiny.t2iv", "--cluster", str(path)]) == 2
    err = capsys.readouterr().err
    assert "too few" in err and "set memory_gib" in err
