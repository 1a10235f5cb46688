"""What a user sees of the command line: output, exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_imports import HEAVY

import recipes
from nemo_moviegen import __main__ as cli
from nemo_moviegen.arguments import parse
from nemo_moviegen.launch import check_inputs, launch

MOVIEGEN = (sys.executable, "-m", "nemo_moviegen")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch, tmp_path):
    for name in ("WORLD_SIZE", "RANK", "MOVIEGEN_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def mistake(capsys, *arguments):
    """The one line on stderr of a command that a user got wrong."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moviegen: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "tae.tiny"], ["count", "video_30b"], ["--help"]]
)
def test_answers_without_importing_what_is_heavy(arguments):
    code = (
        "import atexit, sys; from nemo_moviegen.__main__ import main\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        f"sys.exit(main({arguments}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert result.stdout


def test_recipes_lists_all_with_ranks_and_layout(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in recipes.RECIPES:
        assert any(line.split()[:1] == [name] for line in lines)
    row = next(line for line in lines if line.split()[:1] == ["video_30b.t2iv_768_cp2_4096"])
    assert "h100_4096   4,096   TP4 CP2 DP512             512    28,000" in row


def test_the_recipes_of_curation_are_listed_and_printed_too(capsys):
    assert cli.main(["recipes"]) == 0
    assert "curation.high_res" in capsys.readouterr().out
    assert cli.main(["recipes", "curation.low_res", "filters.text.high=0.4"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert {f["name"]: f["high"] for f in told["filters"]}["text"] == 0.4


def test_recipes_prints_one_as_yaml_with_overrides(capsys):
    assert cli.main(["recipes", "tiny.t2iv", "num_steps=7", "optim.learning_rate=0.5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["kind"], printed["num_steps"], printed["optim"]["learning_rate"]) == (
        "VideoRecipe",
        7,
        0.5,
    )


def test_count_prints_the_30b_as_json(capsys):
    assert cli.main(["count", "video_30b", "--latent", "32x96x96", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["parameters"] == 29_303_482_368
    assert f"{counted['train_flops_per_sample']:.2e}" == "3.05e+16"
    parts = counted["components"].values()
    assert counted["parameters"] == sum(part["parameters"] for part in parts)
    assert counted["train_flops_per_sample"] == sum(part["train_flops"] for part in parts)
    assert all(part["train_flops"] == 3 * part["forward_flops"] for part in parts)


def test_count_prints_a_table_that_says_how_it_counted(capsys):
    assert cli.main(["count", "video_30b", "--text-tokens", "512"]) == 0
    printed = capsys.readouterr().out
    assert "29,303,482,368" in printed
    assert "73,728 tokens" in printed
    assert "512 real text tokens" in printed


def test_count_takes_a_recipe_and_a_recipe_file(capsys, tmp_path):
    assert cli.main(["count", "video_30b.t2iv_256_3072", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latent_shape"] == [32, 32, 32]
    assert cli.main(["recipes", "tiny.t2iv"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["count", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latent_shape"] == [2, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "tiny.t2"], "did you mean 'tiny.t2i'"),
        (["recipes", "nowhere.yaml"], "nowhere.yaml: no such file or directory; check the path"),
        (["count", "video_30"], "did you mean 'video_30b'"),
        (["count", "tae.tiny"], "trains an autoencoder"),
        (["bench", "tae", "--parts", "decode"], "no part decode; use production, small, long"),
        (["count", "video_30b", "--latent", "33x96x96"], "33 positions, video_30b has 32"),
        (["train", "tini.t2i"], "no recipe 'tini.t2i'; did you mean 'tiny.t2i'"),
        (["train", "tiny.t2i", "context=2"], "did you mean 'layout.context'"),
        (["train", "tiny.t2i", "--cluster", "cpu-2"], "did you mean 'cpu_2'"),
        (["train", "tiny.t2i", "layout.tensor=2", "layout.context=2"], "2 ranks do not split"),
        (["train", "tiny.t2i", "global_batch=3"], "global_batch 3 does not split over 2 model copies"),
        (["train", "tiny.t2i"], "reads the latents of out/demo/latents, which holds no index.parquet"),
        (["train", "tae.tiny"], "reads the clips of out/demo/clips/manifest.parquet, which is not there"),
        (["train", "video_30b.t2i_256_1536"], "cluster h100_1536 has 192 nodes, this is one process"),
        (["cut", "nothing.mp4", "--manifest", "m.parquet"], "nothing.mp4: no such file"),
        (["shapes", "clips", "--size", "63"], "sizes are even"),
        (["report", "empty"], "empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert message in mistake(capsys, *arguments)


def test_what_only_a_later_rank_finds_is_said_with_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0)
    assert mistake(capsys, "train", "tiny.t2").endswith("(rank 1)")


def test_debug_shows_where_a_mistake_was_found():
    with pytest.raises(ValueError, match="no recipe"):
        cli.main(["train", "tiny.t2", "--debug"])


def test_a_bug_keeps_its_stack_trace(monkeypatch):
    """A ValueError is a user's mistake only where a check of ours raised it."""
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train", "tiny.t2i"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "tiny.t2i", "--steps=3"], "unknown arguments: --steps=3"),
        (["count", "video_30b", "--latent", "32x96"], "'32x96' is no latent shape"),
        (["generate", "run", "a prompt", "--size", "64"], "'64' is no frame size"),
    ],
)
def test_misuse_says_how(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_may_stand_on_both_sides_of_an_option():
    options = parse(["train", "tiny.t2i", "num_steps=3", "--cluster", "h200_1", "seed=4"])
    assert (options.settings, options.cluster) == (["num_steps=3", "seed=4"], "h200_1")


def test_every_command_has_a_function():
    with pytest.raises(SystemExit):
        parse(["none"])
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            parse([name, "--help"])
        assert exit.value.code == 0


def test_ranks_that_do_not_match_the_cluster_are_refused(monkeypatch, tmp_path):
    (tmp_path / "index.parquet").touch()
    recipe = cli_recipe("tiny.t2i", f"data.folder={tmp_path}")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="cluster cpu_2 has 2 ranks, 3 were started: start 1 nodes of 2"):
        launch(recipe)


def test_the_run_a_stage_starts_from_must_be_there_unless_it_resumes(tmp_path):
    (tmp_path / "index.parquet").touch()
    recipe = cli_recipe(
        "tiny.t2iv", f"data.folder={tmp_path}", f"output={tmp_path / 'run'}", "validation.every=0"
    )
    with pytest.raises(ValueError, match="starts from the run in out/demo/t2i, which holds no recipe"):
        check_inputs(recipe)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    check_inputs(recipe)


def cli_recipe(name, *settings):
    from nemo_moviegen.recipe import override

    return override(recipes.get(name), list(settings))


def test_shapes_and_cut_write_one_manifest(capsys, tmp_path):
    from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, read_manifest

    shapes = ["shapes", "clips", "--clips", "2", "--heldout", "1", "--frames", "8"]
    assert cli.main(shapes) == 0
    manifest = tmp_path / "clips" / "manifest.parquet"
    before = len(read_manifest(manifest))
    assert cli.main(["cut", str(BIG_BUCK_BUNNY), "--manifest", str(manifest), "--seconds", "2"]) == 0
    clips = read_manifest(manifest)
    assert len(clips) > before >= 3
    assert {clip.split for clip in clips} == {"train", "heldout"}
    assert str(manifest.relative_to(tmp_path)) in capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_said_once(tmp_path):
    (tmp_path / "junk.parquet").write_text("no parquet")
    settings = ["data.manifest=junk.parquet", "init_from=", "output=run", "num_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*MOVIEGEN, "train", "tae.tiny", *settings], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("moviegen: ")]
    assert len(said) == 1
    assert "junk.parquet is not a readable Parquet manifest" in said[0]
    assert "Traceback" not in result.stderr
    assert yaml.safe_load((tmp_path / "run" / "launch.yaml").read_text())["num_steps"] == 1


@pytest.mark.slow
def test_nemo_hands_a_recipe_to_the_same_launch(tmp_path):
    nemo = Path(sys.executable).with_name("nemo")
    command = [nemo, "moviegen", "train", "--factory", "tiny.t2i", "--yes", "recipe.data.folder=nowhere"]
    environment = {**os.environ, "NEMORUN_HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode != 0
    assert "tiny.t2i reads the latents of nowhere, which holds no index.parquet" in run.stdout + run.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of leptonai and fastapi, at import
def test_every_recipe_is_a_nemo_run_factory_of_equal_value():
    import fiddle
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    from nemo_moviegen.nemo_cli import train

    for name in recipes.RECIPES:
        task = parse_factory(train, "", train, name)
        assert fiddle.build(task).keywords["recipe"] == recipes.get(name)
    changed = parse_cli_args(
        parse_factory(train, "", train, "tiny.t2iv"), ["recipe.optim.learning_rate=3e-5"]
    )
    assert fiddle.build(changed).keywords["recipe"] == cli_recipe("tiny.t2iv", "optim.learning_rate=3e-5")
