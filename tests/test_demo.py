"""The demo: real commands in order, finished stages not repeated, failures told, memory measured."""

import itertools
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest

import recipes
from nemo_moviegen import demo
from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.data.buckets import assign
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.demo import NUM_HELDOUT_PROMPTS, NUM_SEEN_PROMPTS, choose_prompts, keyed, run_demo
from nemo_moviegen.demo_stages import Stage, demo_stages
from nemo_moviegen.video_files import read_frames
from nemo_moviegen.watch import resident_bytes, run_watched


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A three-stage demo of which every command writes its stage's file; returns the list of commands run."""
    ran, codes, threads_of = [], {}, {}

    def stages(out, scale, num_clips, recipe):
        def stage(name, resumes=False):
            return Stage(name=name, commands=((name, str(scale)),), outputs=(out / name,), resumes=resumes)

        return [stage("clips"), stage("train", resumes=True), stage("report")]

    def run(command, threads):
        name = command[3]
        ran.append(name)
        threads_of[name] = threads
        if codes.get(name):
            (tmp_path / name).write_text("half")
            return codes[name], 1.0, 100
        (tmp_path / name).write_text("whole")
        return 0, 2.0, 200

    monkeypatch.setattr(demo, "demo_stages", stages)
    monkeypatch.setattr(demo, "run_watched", run)
    return types.SimpleNamespace(ran=ran, codes=codes, threads_of=threads_of)


def test_finished_stages_are_not_repeated(told, tmp_path):
    assert run_demo(tmp_path) == tmp_path / "report"
    run_demo(tmp_path)
    assert told.ran == ["clips", "train", "report"]
    run_demo(tmp_path, fresh=True)
    assert told.ran == ["clips", "train", "report"] * 2


def test_a_command_of_one_process_has_both_cores(told, tmp_path, monkeypatch):
    """Ranks and workers have one each; a machine of 64 cores is not given to clips of 64 pixels."""
    for cores, of_one in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        run_demo(tmp_path, fresh=True)
        assert told.threads_of == {"clips": of_one, "train": 1, "report": of_one}


def test_another_scale_repeats_all_that_depends_on_it(told, tmp_path):
    run_demo(tmp_path)
    run_demo(tmp_path, 0.5)
    assert told.ran == ["clips", "train", "report"] * 2
    assert json.loads((tmp_path / "stages.json").read_text())["scale"] == 0.5


def test_a_stage_whose_output_is_gone_runs_again_with_all_after_it(told, tmp_path):
    run_demo(tmp_path)
    (tmp_path / "train").unlink()
    run_demo(tmp_path)
    assert told.ran[3:] == ["train", "report"]


@pytest.mark.parametrize(("name", "kept"), [("train", True), ("clips", False)])
def test_an_interrupted_training_goes_on_from_what_it_left_another_stage_anew(
    told, tmp_path, monkeypatch, name, kept
):
    told.codes[name] = 1
    with pytest.raises(ValueError, match=f"stage '{name}' of the demo ended with exit code 1"):
        run_demo(tmp_path)
    told.codes.clear()
    found, run = [], demo.run_watched

    def run_and_look(command, threads):
        found.append((tmp_path / command[3]).exists())
        return run(command, threads)

    monkeypatch.setattr(demo, "run_watched", run_and_look)
    run_demo(tmp_path)
    assert found[0] is kept
    assert not any(found[1:])
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [stage["finished"] for stage in stages] == [True] * 3


def test_seconds_of_an_interrupted_training_add_up(told, tmp_path):
    told.codes["train"] = -9
    with pytest.raises(ValueError, match="killed by signal 9"):
        run_demo(tmp_path)
    told.codes.clear()
    run_demo(tmp_path)
    record = json.loads((tmp_path / "stages.json").read_text())["stages"][1]
    assert (record["seconds"], record["peak_bytes"]) == (3.0, 200)


def test_seconds_before_ctrl_c_count_too(told, tmp_path, monkeypatch):
    run = demo.run_watched

    def interrupted(command, threads):
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path)
    record = json.loads((tmp_path / "stages.json").read_text())["stages"][0]
    assert 0.2 <= record["seconds"] < 5
    assert not record["finished"]
    monkeypatch.setattr(demo, "run_watched", run)
    run_demo(tmp_path)
    assert told.ran == ["clips", "train", "report"]


def test_what_else_lies_in_the_folder_survives_a_fresh_demo(told, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    run_demo(tmp_path)
    run_demo(tmp_path, fresh=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("scale", [0, -1, 11])
def test_a_scale_that_makes_no_demo_is_refused(scale, tmp_path):
    with pytest.raises(ValueError, match="scale is"):
        run_demo(tmp_path, scale)


def test_keys_depend_on_all_stages_before():
    stages = [Stage(name=n, commands=((n,),), outputs=()) for n in "abc"]
    other = [stages[0], Stage(name="b", commands=(("x",),), outputs=()), stages[2]]
    same = [a == b for (_, a), (_, b) in zip(keyed(stages), keyed(other), strict=True)]
    assert same == [True, False, False]


def test_the_commands_of_the_standard_demo_change_nothing_of_the_recipes():
    stages = demo_stages(Path("out/demo"), 1.0)
    trained = [command for stage in stages for command in stage.commands if command[0] == "train"]
    names = ("tae.tiny_image", "tae.tiny", "tiny.t2i", "tiny.t2iv")
    assert trained == [("train", name) for name in names]


def test_an_edited_recipe_repeats_its_training_and_all_after_it(monkeypatch):
    """Its command is still `train NAME`. Seen to catch: keys of the commands alone."""
    before = {stage.name: key for stage, key in keyed(demo_stages(Path("out/demo"), 1.0))}
    edited = replace(recipes.get("tae.tiny"), num_steps=7)
    monkeypatch.setitem(recipes.RECIPES, "tae.tiny", lambda: edited)
    after = {stage.name: key for stage, key in keyed(demo_stages(Path("out/demo"), 1.0))}
    assert [name for name in after if after[name] == before[name]] == ["clips", "image autoencoder"]


def test_the_long_run_has_clips_of_both_rates_and_measures_its_checkpoints():
    stages = demo_stages(Path("out/shapes_long"), 1.0, recipe="tiny.shapes_long")
    commands = {stage.name: stage.commands for stage in stages}
    assert commands["images and video"] == (("train", "tiny.shapes_long"),), "as the recipe has it"
    manifests = [after for word, after in itertools.pairwise(commands["latents"][0]) if word == "--manifest"]
    assert manifests == [
        "out/shapes_long/clips/manifest.parquet",
        "out/shapes_long/videos_24_fps/manifest.parquet",
    ]
    assert commands["clips"][2][-4:] == ("--fps", "24", "--seed", "24")
    assert commands["scores"][0][-3:] == ("--fps", "16", "24")
    assert commands["checkpoints"][0][:2] == ("evaluate", "checkpoints")


def test_clips_of_the_long_run_fit_its_buckets_and_are_all_different(tmp_path):
    rows = write_moving_shapes(tmp_path / "a", 2, progress=False)
    rows += write_moving_shapes(tmp_path / "b", 2, fps=24, seed=24, progress=False)
    assigned = assign(rows, bucket_set("shapes"))
    assert (assigned.problem_N == 0).all()
    videos = [row.kind == "video" for row in rows]
    assert assigned.fps_N[videos].tolist() == [16, 16, 24, 24]
    assert len({row.clip_id for row in rows}) == len(rows)


def test_a_recipe_that_no_demo_leads_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"can not train tiny\.t2i: use tiny\.t2iv or tiny\.shapes_long"):
        run_demo(tmp_path, recipe="tiny.t2i")


@pytest.mark.parametrize("recipe", ["tiny.t2iv", "tiny.shapes_long"])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_every_command_of_the_demo_is_one_the_command_line_takes(scale, recipe, tmp_path):
    from nemo_moviegen.arguments import parse

    for stage in demo_stages(tmp_path / "elsewhere", scale, recipe=recipe):
        for command in stage.commands:
            assert parse(list(command)).command == command[0]


def test_prompts_are_unlike_each_other_and_cover_both_splits(tmp_path):
    clips = write_moving_shapes(tmp_path, 24, progress=False)
    clips += write_moving_shapes(tmp_path, 4, split="heldout", progress=False)
    prompts = choose_prompts(clips)
    split = {clip.caption: clip.split for clip in clips}
    assert [split[prompt] for prompt in prompts] == ["train"] * 4 + ["heldout"] * 2
    assert len(set(prompts)) == 6
    assert len({prompt.split()[1] for prompt in prompts[:4]}) == 4, "four colours"


def test_memory_of_children_counts(tmp_path):
    grandchild = "import time; held = bytearray(150 << 20); time.sleep(1.5)"
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {grandchild!r}]) + 7)"
    code, seconds, peak_bytes = run_watched([sys.executable, "-c", child])
    assert code == 7
    assert 1.5 < seconds < 30
    assert 150 << 20 < peak_bytes < 400 << 20


def test_threads_are_told_to_the_command_whatever_the_shell_says(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    child = "import os, sys; sys.exit(int(os.environ['OMP_NUM_THREADS']))"
    assert run_watched([sys.executable, "-c", child], 3)[0] == 3


def test_memory_of_a_process_that_is_gone_is_zero():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert resident_bytes(process.pid) == 0
    assert resident_bytes(os.getpid()) > 1 << 20


@pytest.mark.slow
def test_a_small_demo_runs_from_raw_video_to_the_report(tmp_path):
    command = [sys.executable, "-m", "nemo_moviegen", "demo", "--out", str(tmp_path), "--scale", "0.01"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    written = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [stage["finished"] for stage in written] == [True] * 10
    assert max(stage["peak_bytes"] for stage in written) < 8 << 30
    settings = json.loads((tmp_path / "generated" / "settings.json").read_text())
    assert len(settings["samples"]) == NUM_SEEN_PROMPTS + NUM_HELDOUT_PROMPTS
    for sample in settings["samples"]:
        assert read_frames(tmp_path / "generated" / sample["file"]).shape == (16, 64, 64, 3)
    page = (tmp_path / "report.html").read_text()
    scored = json.loads((tmp_path / "shapes" / "scores.json").read_text())["samples"]
    assert [sample["group"] for sample in scored] == ["seen"] * 2 + ["held out"]
    wrong = sum(not sample["right"]["all words"] for sample in scored)
    assert page.count("<video") == 3 * len(settings["samples"]) + wrong, "real, reconstructed and generated"
    assert f"{wrong} of 3 samples miss a word" in page
    assert page.count("data:image/svg+xml") == 5, "two curves of the autoencoder, one of each other run"

    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 10
    assert json.loads((tmp_path / "stages.json").read_text())["stages"] == written
