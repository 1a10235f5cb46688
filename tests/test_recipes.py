"""Every recipe builds and fits its cluster; changing and reading recipes names what is wrong."""

from dataclasses import replace

import pytest

import recipes
from nemo_moviegen.cluster import Cluster, check_on_cluster, cluster_names, placed, read_cluster
from nemo_moviegen.recipe import Layout, override, read_recipe, recipe_yaml
from nemo_moviegen.settings import nearest

STEPS = recipes.get("tiny.t2i").num_steps


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_builds_fits_its_cluster_and_cites_its_section(name):
    function, recipe = recipes.RECIPES[name], recipes.get(name)
    assert recipe.name == name
    assert "(s3." in function.__doc__
    assert check_on_cluster(recipe, read_cluster(recipe.cluster)) >= 1


def test_names_and_outputs_of_recipes_are_unique():
    built = [recipes.get(name) for name in recipes.RECIPES]
    assert len({recipe.name for recipe in built}) == len({recipe.output for recipe in built}) == len(built)


def test_an_override_changes_one_setting_and_keeps_its_type():
    before = recipes.get("tiny.t2iv")
    after = override(
        before, ["optim.learning_rate=1", "size.contexts.1.max_tokens=7", "output=a: b", "num_steps=1e3"]
    )
    assert after.optim.learning_rate == 1.0
    assert isinstance(after.optim.learning_rate, float)
    assert [c.max_tokens for c in after.size.contexts] == [24, 7, 16]
    assert isinstance(after.size.contexts, tuple)
    assert (after.output, after.num_steps) == ("a: b", 1000)
    contexts = (
        before.size.contexts[0],
        replace(before.size.contexts[1], max_tokens=7),
        before.size.contexts[2],
    )
    size, optim = replace(before.size, contexts=contexts), replace(before.optim, learning_rate=1.0)
    assert after == replace(before, size=size, optim=optim, output="a: b", num_steps=1000)


def test_a_tuple_is_set_as_a_whole_or_by_entry():
    tae = recipes.get("tae.tiny")
    assert override(tae, ["autoencoder.multipliers=[1,2,2,2]"]).autoencoder.multipliers == (1, 2, 2, 2)
    assert override(tae, ["autoencoder.multipliers.3=8"]).autoencoder.multipliers == (1, 2, 4, 8)


def test_overrides_are_checked_together_not_one_by_one():
    recipe = override(recipes.get("tiny.t2iv"), ["size.num_heads=7", "size.width=196"])
    assert recipe.size.head_width == 28


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("context=2", "tiny.t2iv has no setting 'context'; did you mean 'layout.context'"),
        ("lr=1e-3", "did you mean 'optim.learning_rate'"),
        ("optim.lr=1e-3", "did you mean 'optim.learning_rate'"),
        ("optim.warmup=3", "did you mean 'optim.warmup_steps'"),
        ("nmu_steps=3", "did you mean 'num_steps'"),
        ("size.contexts.0.tokens=3", "did you mean 'size.contexts.0.max_tokens'"),
        ("size.contexts.7.width=3", "did you mean 'size.contexts.0.width'"),
        ("data=3", "did you mean 'data.batching'"),
        ("zzz=1", "known: cluster, compiles, data.batching"),
        ("num_steps", "'num_steps' is not an assignment: write key=value"),
        ("num_steps=many", "'many' of type 'str' could not be converted to Integer"),
        ("num_steps=3.5", "'3.5' of type 'float' could not be converted to Integer"),
        ("num_steps=", "'num_steps' is not Optional"),
        ("num_steps=[1", "'[1' is not a value"),
        ("layout.sequence=maybe", "'maybe' is not a valid bool"),
        ("num_steps=0", "num_steps is 0; use 1 or more"),
        ("layout.tensor=4", "6 heads do not split over tensor 4"),
        ("layout.context=3", "has 16 tokens, which do not split over context 3"),
        ("layout.sharding=all", "layout.sharding is 'all'; use one of none, optimizer, full"),
        (
            "image_batch=40",
            "image_batch 40 does not split like the clips: use 0 or a multiple of global_batch 16",
        ),
        ("image_batch=-32", "image_batch -32 does not split like the clips"),
        ("data.buckets=video_512", "there are no buckets called 'video_512'; use video_256"),
        ("data.buckets=video_256", "latent width 36 needs 18 positions, video_tiny has 16"),
        ("optim.decay=slowly", "optim.decay is 'slowly'; use constant, cosine or plateau"),
        ("optim.plateau.factor=1", "optim.plateau.factor is 1.0; use a number above 0 and below 1"),
        ("optim.plateau.floor=0", "optim.plateau.floor is 0.0; use a share above 0, at most 1"),
        ("optim.plateau.threshold=1", "optim.plateau.threshold is 1.0; it is a share"),
        ("optim.plateau.patience=0", "optim.plateau.patience is 0; use 1 or more"),
        ("optim.plateau.cooldown=-1", "optim.plateau.cooldown is -1; use 0 or more"),
        ("fp8.bf16_parts=[haed]", "fp8.bf16_parts has haed; use some of patch_embedding, time_embedding"),
        ("fp8.bf16_layers=-1", "fp8.bf16_layers is -1, fp8.report_every 0: use 0 or more"),
        ("size.num_heads=0", "num_heads is 0; use 1 or more"),
        ("size.width=190", "width 190 does not split into 6 heads"),
        ("optim.learning_rate=nan", "optim.learning_rate is nan; use a number above 0"),
        ("optim.beta2=1", "optim.beta2 is 1.0; use 0 or more and less than 1"),
        ("data.prompt_drop=2", "data.prompt_drop is 2.0; it is a share"),
        ("data.prefetch=-1", "data.prefetch is -1; use 0 or more"),
        ("precision=bf8", "precision is 'bf8'; use bf16, fp8_delayed, fp8_current, fp8_block, fp32, fp64"),
        ("output=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_bad_override_says_what_to_change(assignment, message):
    with pytest.raises(ValueError) as error:
        override(recipes.get("tiny.t2iv"), [assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_or_cluster_names_the_nearest():
    with pytest.raises(ValueError, match=r"no recipe 'tiny\.t2v'; did you mean 'tiny\.t2iv'"):
        recipes.get("tiny.t2v")
    with pytest.raises(ValueError, match="no cluster 'h100-1536'; did you mean 'h100_1536'"):
        read_cluster("h100-1536")


def test_nearest_lists_what_there_is_where_nothing_is_near():
    assert nearest("q", ["alpha", "beta"]) == "; known: alpha, beta"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_written_recipe_reads_back_equal(name, tmp_path):
    recipe = replace(recipes.get(name), output="with: colon # and hash")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe))
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "a: [", "is not YAML"),
        (lambda text: "- 1", "is no recipe: its kind is None"),
        (lambda text: text.replace("kind: VideoRecipe", "kind: Video"), "its kind is 'Video'"),
        (lambda text: text.replace(f"num_steps: {STEPS}", ""), "lacks num_steps"),
        (lambda text: text.replace(f"num_steps: {STEPS}", f"num_step: {STEPS}"), "did you mean 'num_steps'"),
        (
            lambda text: text.replace(f"num_steps: {STEPS}", f"num_steps: '{STEPS}'"),
            f"num_steps is '{STEPS}'; it needs a value of type int",
        ),
        (
            lambda text: text.replace("width: 64", "width: wide"),
            "width is 'wide'; it needs a value of type int",
        ),
        (
            lambda text: text.replace("tensor: 1", "tensor: true"),
            "tensor is True; it needs a value of type int",
        ),
        (lambda text: text.replace("tensor: 1", "tensor: 4"), "6 heads do not split over tensor 4"),
    ],
)
def test_a_damaged_recipe_file_says_what_is_wrong(change, message, tmp_path):
    text = recipe_yaml(recipes.get("tiny.t2i"))
    assert change(text) != text
    path = tmp_path / "recipe.yaml"
    path.write_text(change(text))
    with pytest.raises(ValueError) as error:
        read_recipe(path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", cluster_names())
def test_a_cluster_file_is_complete(name):
    cluster = read_cluster(name)
    assert cluster.num_ranks == int(name.split("_")[1])
    assert (cluster.peak_dense_tflops > 0) == (cluster.accelerator != "cpu")
    assert (cluster.network_gbit_s > 0) == (cluster.nodes > 1)


def test_a_layout_or_batch_that_does_not_divide_is_refused_before_launch():
    recipe, cluster = recipes.get("tiny.t2iv"), read_cluster("cpu_2")
    with pytest.raises(
        ValueError, match=r"tiny.t2iv on cpu_2 \(2 ranks\): 2 ranks do not split into tensor 2 x context 2"
    ):
        check_on_cluster(replace(recipe, layout=Layout(tensor=2, context=2)), cluster)
    with pytest.raises(
        ValueError, match="global_batch 24 does not split over 2 model copies x micro_batch 8"
    ):
        check_on_cluster(replace(recipe, global_batch=24), cluster)


def test_the_root_of_a_cluster_comes_from_the_environment_and_moves_relative_paths(monkeypatch):
    monkeypatch.setenv("MOVIEGEN_ROOT", "/scratch/me")
    cluster = read_cluster("cpu_2")
    video = placed(replace(recipes.get("tiny.t2iv"), output="/else/where"), cluster)
    assert video.data.folder == "/scratch/me/out/demo/latents"
    assert video.init_from == "/scratch/me/out/demo/t2i"
    assert video.output == "/else/where"
    assert placed(recipes.get("tiny.t2i"), cluster).init_from == ""
    assert video.data.text_encoders == ""
    online = replace(video.data, text="online", text_encoders="encoders")
    assert placed(replace(video, data=online), cluster).data.text_encoders == "/scratch/me/encoders"
    assert (
        placed(recipes.get("tae.tiny"), cluster).data.manifest
        == "/scratch/me/out/demo/clips/manifest.parquet"
    )


def test_a_cluster_without_ranks_is_refused():
    with pytest.raises(ValueError, match="nodes is 0; use a number above 0"):
        Cluster(name="none", accelerator="cpu", nodes=0, ranks_per_node=1, memory_gib=1)
