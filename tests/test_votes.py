"""Votes: majority, net win rate, ratings, and the page they come from, driven in Chromium."""

import json
import re

import numpy as np
import pytest
from browser import needs_chromium, told_by

from nemo_moviegen.evaluation.compare import write_compare
from nemo_moviegen.evaluation.votes import (
    count_votes,
    elo,
    net_win_rate,
    outcomes,
    read_votes,
    votes_tables,
)


def export(path, choices, models=("a", "b"), rater="r1", axis="text"):
    """An exported file with a choice for each prompt."""
    votes = [
        {"number": number, "prompt": f"p{number}", "axis": axis, "choice": choice}
        for number, choice in enumerate(choices)
    ]
    path.write_text(json.dumps({"models": list(models), "rater": rater, "votes": votes}))
    return path


def test_three_raters_decide_by_majority(tmp_path):
    """Prompts: two of three for a; one each; two ties; all for b; a, b and a tie."""
    files = [
        export(tmp_path / "1.json", ["a", "a", "tie", "b", "a"], rater="1"),
        export(tmp_path / "2.json", ["a", "b", "tie", "b", "b"], rater="2", models=("b", "a")),
        export(tmp_path / "3.json", ["b", "tie", "a", "b", "tie"], rater="3"),
    ]
    assert outcomes(read_votes(files)) == {(("a", "b"), "text"): [1, 0, 0, -1, 0]}
    (row,) = count_votes(files)["rows"]
    assert (row["wins"], row["losses"], row["ties"], row["votes"], row["net"]) == (1, 1, 3, 15, 0)


def test_the_last_word_of_a_rater_counts(tmp_path):
    files = [export(tmp_path / "1.json", ["a"]), export(tmp_path / "2.json", ["b"])]
    assert outcomes(read_votes(files)) == {(("a", "b"), "text"): [-1]}


def test_net_win_rate_and_its_interval():
    signs = [1] * 60 + [-1] * 25 + [0] * 15
    net, low, high = net_win_rate(signs)
    deviation = 100 * np.std(signs) / np.sqrt(len(signs))
    assert net == pytest.approx(35)
    assert (low, high) == pytest.approx((35 - 1.96 * deviation, 35 + 1.96 * deviation), abs=1.5)
    assert net_win_rate([1, 1, 1]) == (100, 100, 100)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(300):
        _, low, high = net_win_rate(rng.choice([1, 0, -1], p=[0.5, 0.2, 0.3], size=100))
        held.append(low <= 20 <= high)
    assert 0.9 < np.mean(held) < 0.99


def test_ratings_give_back_the_odds_they_were_drawn_from():
    truth = {"a": 1100, "b": 1000, "c": 900}
    rng, found = np.random.default_rng(0), {}
    for model, other in (("a", "b"), ("b", "c"), ("a", "c")):
        wins = rng.random(20_000) < 1 / (1 + 10 ** ((truth[other] - truth[model]) / 400))
        found[model, other] = np.where(wins, 1, -1).tolist()
    assert elo(found) == pytest.approx(truth, abs=8)
    assert sum(elo(found).values()) == pytest.approx(3000)


def test_a_model_that_always_wins_has_a_finite_rating():
    ratings = elo({("a", "b"): [1] * 10})
    assert 1100 < ratings["a"] < 1500 and ratings["a"] + ratings["b"] == pytest.approx(2000)


def test_the_tables_show_pairs_and_from_three_models_on_ratings(tmp_path):
    two = count_votes([export(tmp_path / "1.json", ["a", "b", "a"])])
    assert len(votes_tables(two)) == 1
    files = [tmp_path / "1.json", export(tmp_path / "2.json", ["a", "c"], models=("a", "c"))]
    assert len(votes_tables(count_votes(files))) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no export of votes"),
        ('{"models": ["a", "b"]}', "is no export of votes"),
        ('{"models": ["a", "b"], "rater": "r", "votes": [{"choice": "a"}]}', "is no export of votes"),
        ('{"models": ["a", "b"], "rater": "r", "votes": {"1": "a"}}', "is no export of votes"),
        ('{"models": ["a", "a"], "rater": "r", "votes": []}', "two different models"),
        (
            '{"models": ["a", "b"], "rater": "r", "votes": [{"number": 1, "axis": "text", "choice": "c"}]}',
            "choice 'c'",
        ),
        ('{"models": ["a", "b"], "rater": "r", "votes": []}', "there are no votes"),
    ],
)
def test_a_file_that_is_no_export_is_named(tmp_path, text, words):
    (tmp_path / "votes.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_votes([tmp_path / "votes.json"])


@pytest.fixture
def folders(tmp_path):
    """Samples of two models from the same three prompts."""
    prompts = ["a cat", "</script><b>bold</b>", "\u732b & \U0001f680"]
    made = []
    for name in ("first model", "second"):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"number": n, "prompt": p, "file": f"{n:03d}-x.png"} for n, p in enumerate(prompts)]
        for row in rows:
            (folder / row["file"]).write_bytes(b"")
        (folder / "settings.json").write_text(json.dumps({"samples": rows}))
        made.append(folder)
    return made


def test_models_that_can_not_be_compared_are_refused(folders, tmp_path):
    page = tmp_path / "page.html"
    for arguments, words in (
        ((folders, ["x", "x"], page), "of different names"),
        ((folders, ["x", "tie"], page), "none of them `tie`"),
        (([folders[0], tmp_path], ["x", "y"], page), "holds no samples"),
    ):
        with pytest.raises(ValueError, match=words):
            write_compare(*arguments)
    with pytest.raises(ValueError, match="no axis beauty; use text"):
        write_compare(folders, ["x", "y"], page, axes=["beauty"])
    (folders[1] / "001-x.png").unlink()
    with pytest.raises(ValueError, match=r"lacks .*001-x\.png"):
        write_compare(folders, ["x", "y"], page)
    other = {"samples": [{"number": 0, "prompt": "a dog", "file": "000-x.png"}]}
    (folders[1] / "settings.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="different prompts"):
        write_compare(folders, ["x", "y"], page)
    assert not page.exists()


def test_the_page_links_the_videos_and_no_prompt_ends_its_script(folders, tmp_path):
    page, number = write_compare(folders, ["x", "y"], tmp_path / "sub" / "page.html", limit=2)
    assert number == 2
    text = page.read_text()
    assert text.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);", text)[1])
    assert data["pairs"][1]["prompt"] == "</script><b>bold</b>"
    assert data["pairs"][0]["files"] == ["../first model/000-x.png", "../second/000-x.png"]


@needs_chromium
def test_keys_vote_and_the_export_has_the_model_behind_each_side(folders, tmp_path):
    """Sides are shuffled: the model shown left is the one that the left arrow votes for."""
    page, _ = write_compare(folders, ["x", "y"], tmp_path / "page.html")
    drive = """
    const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
    const expected = {};
    for (const way of ["Left", "Right", "Down", "Left", "Up", "Right", "Left", "Right"]) {
      const key = "Arrow" + way;
      const task = tasks[place];
      const left = document.getElementById("left").firstChild;
      if (task && key !== "ArrowUp") {
        const first = left.getAttribute("src").startsWith("first") ? "x" : "y";
        const other = first === "x" ? "y" : "x";
        expected[name(task)] = { ArrowLeft: first, ArrowRight: other, ArrowDown: "tie" }[key];
      }
      press(key);
    }
    const done = !document.getElementById("done").hidden;
    tell({ exported: JSON.parse(exported()), expected, done });
    """
    seen = set()
    for profile in range(4):
        found, problems = told_by(page, drive, tmp_path / str(profile))
        assert not problems
        votes = {f"{v['number']}/{v['axis']}": v["choice"] for v in found["exported"]["votes"]}
        assert votes == found["expected"] and len(votes) == 6 and found["done"]
        assert sorted(votes.values()).count("tie") == 1
        seen.add(json.dumps(found["exported"]["votes"]))
        (tmp_path / f"votes-{profile}.json").write_text(json.dumps(found["exported"]))
    assert len(seen) > 1, "order and sides differ between raters"
    assert count_votes(sorted(tmp_path.glob("votes-*.json")))["rows"]
