"""What the planner says of a recipe: who holds what, how long a step takes, and which layouts there are."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SIZE

import recipes
from nemo_moviegen import __main__ as cli
from nemo_moviegen.cluster import Cluster, read_cluster
from nemo_moviegen.flops import parameters, train_flops
from nemo_moviegen.layout import CHOICES, Layout
from nemo_moviegen.planning import published
from nemo_moviegen.planning.plan import make_plan
from nemo_moviegen.planning.search import memory_problem, search, why
from nemo_moviegen.planning.seconds import link
from nemo_moviegen.planning.weights import copies_of, held_by_tensor_rank, kept_by_rank
from nemo_moviegen.recipe import override
from nemo_moviegen.sizes import SIZES

LAST_ROW = "video_30b.t2iv_768_cp2_4096"
TRANSFORMERS = [name for name in recipes.RECIPES if not name.startswith("tae.")]


def planned(name=LAST_ROW, *changes, **cluster):
    recipe = override(recipes.get(name), list(changes))
    return make_plan(recipe, replace(read_cluster(recipe.cluster), **cluster))


@st.composite
def legal_layouts(draw):
    """(size, layout, ranks): tensor divides heads and FFN, the model's ranks divide all."""
    size = draw(st.sampled_from([SIZE, *SIZES.values()]))
    divides = [n for n in range(1, size.num_heads + 1) if not size.num_heads % n and not size.ffn_width % n]
    tensor, context = draw(st.sampled_from(divides)), draw(st.integers(1, 8))
    sharding = draw(st.sampled_from(CHOICES["sharding"]))
    layout = Layout(tensor=tensor, context=context, sharding=sharding)
    return size, layout, tensor * context * draw(st.integers(1, 12))


@settings(deadline=None, max_examples=200)
@given(legal_layouts())
def test_all_ranks_together_keep_each_parameter_as_often_as_it_has_copies(case):
    size, layout, num_ranks = case
    kept = [kept_by_rank(size, layout, num_ranks, rank) for rank in range(num_ranks)]
    for name, count in parameters(size).items():
        whole = count * copies_of(name, layout, num_ranks)
        assert sum(rank[name] for rank in kept) == whole, name


@settings(deadline=None, max_examples=200)
@given(legal_layouts())
def test_fully_sharded_without_tensor_ranks_the_sum_is_the_model(case):
    size, layout, num_ranks = case
    layout = replace(layout, tensor=1, sharding="full")
    kept = [sum(kept_by_rank(size, layout, num_ranks, rank).values()) for rank in range(num_ranks)]
    assert sum(kept) == sum(parameters(size).values())
    assert max(kept) - min(kept) <= len(parameters(size))


@pytest.mark.parametrize("row", published.validation(), ids=lambda row: row["run"])
def test_a_published_run_is_predicted_within_10_percent(row):
    assert row["ratio"] == pytest.approx(1, abs=0.10)
    assert row["predicted_mfu"] == pytest.approx(row["published_mfu"] * row["ratio"])


def test_predictions_are_not_what_was_published_but_follow_from_the_layout():
    run = published.RUNS[0]
    whole = published.predict(run)[1]
    assert published.predict(replace(run, tensor=8))[1] < whole
    assert published.predict(replace(run, passes=2 * run.passes))[1] < whole


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_recipe_fits_the_cluster_it_names(name):
    plan = planned(name)
    assert plan.fits and plan.num_microbatches >= 1
    assert sum(asdict(plan.memory).values()) == pytest.approx(plan.memory.device_bytes)


def test_the_parts_of_a_step_sum_to_it_and_speed_follows_from_it():
    plan = planned()
    recipe = recipes.get(LAST_ROW)
    assert sum(plan.seconds_by_part().values()) == pytest.approx(plan.step_seconds)
    clips, images = plan.iterations
    shares = (1 - 1 / recipe.data.image_every, 1 / recipe.data.image_every)
    assert plan.shares == pytest.approx(shares)
    flops = sum(
        share * 512 * train_flops(recipe.size, i.shape)
        for share, i in zip(shares, plan.iterations, strict=True)
    )
    assert plan.mfu == pytest.approx(flops / (plan.step_seconds * 4096 * 989e12))
    again = clips.recomputed_flops / clips.model_flops
    assert plan.mfu < plan.hfu < plan.mfu * (1 + again) * 1.01
    assert plan.gpu_hours == pytest.approx(plan.step_seconds * 28_000 * 4096 / 3600)
    assert images.step.seconds < clips.step.seconds / 10


def test_an_image_batch_of_its_own_is_what_its_iterations_take():
    plan = planned("ablation_5b.t2iv")
    clips, images = plan.iterations
    assert (clips.samples, images.samples) == (256, 4096)
    assert images.share.micro_batch == 16 * clips.share.micro_batch


def test_hardware_without_rates_gets_memory_and_no_seconds():
    plan = planned("tiny.t2iv")
    assert (plan.step_seconds, plan.mfu, plan.days, plan.seconds_by_part()) == (None, None, None, {})
    assert plan.memory.peak_bytes > 0
    assert any("rates of cpu are unknown" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("layout.recompute=full", "layout.recompute=selective"),
        ("layout.recompute=selective", "layout.recompute=none"),
        ("layout.tensor=8", "layout.tensor=4"),
        ("layout.context=4", "layout.context=2"),
        ("layout.sharding=full", "layout.sharding=optimizer"),
        ("layout.sharding=optimizer", "layout.sharding=none"),
        ("ema_decay=0", "ema_decay=0.9"),
    ],
)
def test_what_saves_memory_needs_less(less, more):
    needs = [planned(LAST_ROW, change).memory.peak_bytes for change in (less, more)]
    assert needs[0] < needs[1]


def test_recomputation_takes_time_and_fp8_saves_some():
    seconds = {r: planned(LAST_ROW, f"layout.recompute={r}").step_seconds for r in CHOICES["recompute"]}
    assert seconds["none"] < seconds["selective"] < seconds["full"]
    in_fp8 = planned(f"{LAST_ROW}_fp8").seconds_by_part()
    bf16 = planned().seconds_by_part()
    assert in_fp8["products"] < bf16["products"] and in_fp8["attention"] == bf16["attention"]


def test_a_group_within_a_node_talks_over_nvlink_and_one_over_nodes_shares_their_cards():
    cluster = read_cluster("h100_1536")
    inside, outside = link(cluster, 8, 1), link(cluster, 16, 1)
    assert inside.gbyte_s == inside.hop_gbyte_s == pytest.approx(360)
    assert outside.gbyte_s > 5 * outside.hop_gbyte_s and outside.hop_gbyte_s < 50
    assert link(cluster, 2, 8).gbyte_s < 50  # one rank of each of two nodes
    assert inside.all_reduce(2**30) == pytest.approx(2 * inside.gather(2**30))
    assert outside.exchange(2**30) > inside.exchange(2**30)
    assert link(cluster, 1, 1).gather(2**30) == 0


@pytest.fixture(scope="module")
def found():
    recipe = recipes.get(LAST_ROW)
    return search(recipe, read_cluster(recipe.cluster))


def test_a_search_ranks_layouts_that_are_legal_and_fit(found):
    recipe = recipes.get(LAST_ROW)
    assert len(found.plans) > 100
    for plan in found.plans[:20] + found.plans[-20:]:
        changed = replace(recipe, layout=plan.layout, micro_batch=plan.micro_batch)  # raises if illegal
        again = make_plan(changed, read_cluster(recipe.cluster))
        assert again == plan and again.fits
    seconds = [plan.step_seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    assert found.plans[found.rank() - 1].layout == recipe.layout


def test_a_search_leaves_out_no_legal_layout():
    """Against trying everything, on few ranks."""
    recipe = recipes.get("tiny.t2iv_768_cp2_4096")
    cluster = Cluster(name="cpu_2", accelerator="cpu", nodes=1, ranks_per_node=4, memory_gib=64)
    found = search(recipe, cluster)
    legal = set()
    for tensor in range(1, 5):
        for context in range(1, 5):
            for micro_batch in range(1, 9):
                for sharding in CHOICES["sharding"]:
                    for recompute in CHOICES["recompute"]:
                        changes = {"tensor": tensor, "context": context, "sharding": sharding}
                        layout = replace(recipe.layout, **changes, recompute=recompute)
                        try:
                            changed = replace(recipe, layout=layout, micro_batch=micro_batch)
                            changed.num_microbatches(4)
                        except ValueError:
                            continue
                        legal.add((layout, micro_batch))
    assert {(plan.layout, plan.micro_batch) for plan in found.plans} == legal


def test_what_does_not_fit_says_by_how_much_and_what_would():
    recipe = override(recipes.get(LAST_ROW), ["layout.recompute=none"])
    cluster = read_cluster(recipe.cluster)
    plan, problem = make_plan(recipe, cluster), memory_problem(recipe, cluster)
    over = (plan.memory.device_bytes - 79 * 2**30) / 2**30
    assert f"{over:.1f} too few" in problem and "activations" in problem
    changes = problem.split("nearest that fits: ")[1].split(" (")[0].split()
    assert changes == ["layout.recompute=selective"]
    assert memory_problem(override(recipe, changes), cluster) == ""


def test_where_nothing_fits_more_ranks_are_named():
    recipe = recipes.get(LAST_ROW)
    cluster = replace(read_cluster(recipe.cluster), memory_gib=3)
    assert "no layout fits on 4096 ranks" in memory_problem(recipe, cluster)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["tensor=5"], "refused: .* 48 heads do not split over tensor 5"),
        (["context=16"], "refused: .* do not split over context 16"),
        (["micro_batch=3"], "refused: .* does not split over 512 model copies x micro_batch 3"),
        (["recompute=none"], "too few .*nearest that fits: layout.recompute=selective"),
        (["recompute=selective"], r"place \d+ of \d+, .*% slower than TP"),
        (["tensr=4"], "refused: .*tensor"),
    ],
)
def test_why_a_layout_is_refused_or_where_it_stands(changes, said):
    recipe = recipes.get(LAST_ROW)
    assert re.search(said, why(recipe, read_cluster(recipe.cluster), changes))


def run(capsys, *arguments):
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_prints_bars_and_what_follows(capsys):
    code, out, _ = run(capsys, LAST_ROW)
    assert code == 0
    for words in ("activations", "products", "GPU-hours", "MFU", "stay free", "of the longest clips"):
        assert words in out
    code, out, _ = run(capsys, LAST_ROW, "layout.recompute=none")
    assert code == 0 and "does not fit" in out and "nearest that fits" in out


def test_plan_as_json_has_the_numbers_of_the_plan(capsys):
    plan = planned(LAST_ROW, "layout.recompute=selective")
    values = json.loads(run(capsys, LAST_ROW, "layout.recompute=selective", "--json")[1])
    assert values["memory"]["device_bytes"] == plan.memory.device_bytes
    assert values["time"]["mfu"] == plan.mfu and values["layout"]["data"] == 512
    kept = held_by_tensor_rank(recipes.get(LAST_ROW).size, 4)
    pieces = 4096 // 4
    assert values["memory"]["parameters_of_rank_0"]["ffn"] == -(-kept["ffn"] // pieces)
    found = json.loads(run(capsys, LAST_ROW, "--search", "--top", "3", "--json")[1])
    assert len(found["plans"]) == 3 and found["fitting"] + found["refused"]["memory"] == found["legal"]


def test_plan_on_another_cluster_and_of_other_prompts(capsys):
    sft = ("video_30b.sft", "--json", "--cluster")
    small, large = (json.loads(run(capsys, *sft, name)[1]) for name in ("h100_512", "h200_8"))
    assert large["memory"]["limit_bytes"] > small["memory"]["limit_bytes"] and large["ranks"] == 8
    prompts = [json.loads(run(capsys, *sft, "h100_512", "--text-tokens", n)[1]) for n in ("8", "256")]
    assert prompts[0]["memory"]["device_bytes"] < prompts[1]["memory"]["device_bytes"]


def test_published_runs_as_a_table_and_as_json(capsys):
    rows = json.loads(run(capsys, "--validate", "--json")[1])
    assert [row["run"] for row in rows] == [r.name for r in published.RUNS]
    out = run(capsys, "--validate")[1]
    assert all(row["run"] in out and f"{row['ratio']:.3f}" in out for row in rows)


def test_the_readme_shows_the_rows_that_are_printed():
    rows = [
        f"| {r['run']} | {r['published_mfu']:.1%} | {r['predicted_mfu']:.1%} | {r['ratio']:.2f} |"
        for r in published.validation()
    ]
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- published:begin -->\n")[1].split("\n<!-- published:end -->")[0]
    assert table.splitlines()[2:] == rows


def test_the_page_shows_bars_and_layouts_and_asks_nobody_for_anything(capsys, tmp_path):
    page = tmp_path / "deep" / "plan.html"
    code, _, _ = run(capsys, LAST_ROW, "layout.recompute=none", "--html", str(page))
    html = page.read_text()
    assert code == 0 and "does not fit" in html and "nearest that fits" in html
    assert html.count("<i class=") > 20 and "http" not in html
    widths = [float(part.split("%")[0]) for part in html.split('style="width: ')[1:]]
    assert 190 < sum(widths) < 201  # two bars, each to its end but for slivers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "plan needs a recipe"),
        (["tae.tiny"], "trains an autoencoder"),
        (["video_30b.sfx"], "video_30b.sft"),
        ([LAST_ROW, "--cluster", "h100"], "no cluster 'h100'"),
        ([LAST_ROW, "--cluster", "h200_1"], "1 ranks do not split into tensor 4 x context 2"),
        ([LAST_ROW, "global_batch=511"], "global_batch 511 does not split"),
    ],
)
def test_what_can_not_be_planned_is_said_in_a_line(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_layout_that_is_none_is_refused_by_the_command_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", LAST_ROW, "--why", "TP4"])
    assert "write changes, as in tensor=8,context=2" in capsys.readouterr().err
