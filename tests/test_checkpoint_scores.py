"""Loss and score of checkpoints side by side: each of them, both kinds of weights, how they go together."""

import json
from dataclasses import replace

import pytest

from nemo_moviegen.evaluation import checkpoints as room
from nemo_moviegen.evaluation.checkpoints import correlation, evaluate_checkpoints
from nemo_moviegen.evaluation.scores import checkpoints_table, correlation_note, shown_checkpoints
from nemo_moviegen.evaluation.shapes import ATTRIBUTES
from nemo_moviegen.generation.generate import Models
from nemo_moviegen.recipe import recipe_yaml
from recipes import tiny


def rows(losses, scores):
    return [{"loss": loss, "score": score} for loss, score in zip(losses, scores, strict=True)]


def test_a_loss_that_falls_as_the_score_rises_is_told():
    assert correlation(rows([3, 2, 1], [0.1, 0.5, 0.9])) == pytest.approx(
        {"pearson": -1, "spearman": -1, "points": 3}
    )
    curved = correlation(rows([4, 3, 2, 1], [0.1, 0.2, 0.3, 0.9]))
    assert curved["spearman"] == pytest.approx(-1) and -1 < curved["pearson"] < -0.8


@pytest.mark.parametrize(
    "some", [rows([2, 1], [0.1, 0.9]), rows([1, 1, 1], [0.1, 0.5, 0.9]), rows([3, 2, 1], [0.5] * 3)]
)
def test_what_says_nothing_has_no_correlation(some):
    assert correlation(some) is None


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A run with checkpoints of three steps, whose loss is 1 / step and whose score rises with it."""
    run = tmp_path / "run"
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step={step}").mkdir(parents=True)
        (run / "checkpoints" / f"step={step}" / "state.json").write_text("{}")
    (run / "recipe.yaml").write_text(recipe_yaml(tiny.t2iv()))

    def losses(of, output):
        return {"validation/loss": 1 / of.step, "validation/loss_t0.00-0.25": 2 / of.step}

    def scores(of, folder, **asked):
        right = of.step // 10 + (of.weights == "ema")
        samples = [{"right": dict.fromkeys(ATTRIBUTES, n < right)} for n in range(4)]
        return {"samples": samples}

    monkeypatch.setattr(room, "validation_losses", losses)
    monkeypatch.setattr(room, "evaluate_shapes", scores)
    return Models(run=run, autoencoder="", encoders="", latents="")


def test_every_checkpoint_is_measured_with_both_kinds_of_weights(models, tmp_path):
    found = evaluate_checkpoints(models, tmp_path / "out")
    told = [(row["step"], row["weights"], row["score"]) for row in found["rows"]]
    assert told == [
        (10, "averaged", 0.5),
        (10, "raw", 0.25),
        (20, "averaged", 0.75),
        (20, "raw", 0.5),
        (30, "averaged", 1.0),
        (30, "raw", 0.75),
    ]
    assert found["rows"][0]["loss"] == 0.1 and found["rows"][0]["losses"]["validation/loss_t0.00-0.25"] == 0.2
    assert {kind: c["spearman"] for kind, c in found["correlation"].items()} == pytest.approx(
        {"averaged": -1, "raw": -1}
    )
    assert json.loads((tmp_path / "out" / "checkpoints.json").read_text()) == found
    assert "Spearman -1.00" in (tmp_path / "out" / "loss_and_score.svg").read_text()
    assert correlation_note(found) == (
        "Averaged weights: Pearson -0.96, Spearman -1.00 over 3 checkpoints; raw weights: Pearson -0.96, "
        "Spearman -1.00 over 3 checkpoints."
    )
    heads, told = shown_checkpoints(found)
    assert told[0][:3] == ["10", "averaged", "0.1000"] and told[0][3].startswith("50.0% (")
    assert checkpoints_table(found).row_count == len(told) == 6 and len(heads) == len(told[0])


def test_one_kind_of_weights_may_be_asked_for(models, tmp_path):
    found = evaluate_checkpoints(replace(models, weights="weights"), tmp_path / "out")
    assert [row["weights"] for row in found["rows"]] == ["raw"] * 3 and list(found["correlation"]) == ["raw"]


def test_a_run_without_checkpoints_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        evaluate_checkpoints(replace(models, run=tmp_path), tmp_path / "out")
