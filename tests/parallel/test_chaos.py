"""Training killed at random instants is the training nobody killed; and what would break that is noticed."""

import functools
import os
import random
import re
import time

import chaos
import pytest

from nemo_moviegen.training import record

STEPS, SAVE_EVERY = 12, 4


@pytest.fixture(scope="module", autouse=True)
def imports():
    """Once, before the ranks fork."""
    return chaos.warm_up()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return chaos.write_latents(tmp_path_factory.mktemp("chaos") / "latents")


@pytest.fixture(scope="module")
def whole(latents):
    return chaos.uninterrupted(
        chaos.ForkedRun, latents.parent / "whole", latents, "optimizer", STEPS, SAVE_EVERY
    )


def test_a_run_killed_three_times_at_random_instants_is_the_run_nobody_killed(tmp_path, latents, whole):
    seen = list(
        chaos.kill_and_resume(
            chaos.ForkedRun,
            whole,
            tmp_path,
            latents,
            "optimizer",
            num_kills=3,
            num_steps=STEPS,
            save_every=SAVE_EVERY,
            rng=random.Random(1),
        )
    )
    assert sum(done.was_killed for _, done in seen) == 3
    assert [done.differs for _, done in seen] == [""] * len(seen)
    assert not [line for line in whole.metrics if line["train/skipped"]]


def _forget_moments():
    from nemo_moviegen.training import state

    read_into = state.read_into

    def read_weights_alone(folder, pieces):
        read_into(folder, {name: parts for name, parts in pieces.items() if not name.startswith("exp_avg")})

    state.read_into = read_weights_alone


def _restart_the_data():
    from nemo_moviegen.training import data

    init = data.MicroBatches.__init__

    def from_the_first_step(self, *args, first_step):
        init(self, *args, first_step=0)

    data.MicroBatches.__init__ = from_the_first_step


def _rename_too_early():
    """The second checkpoint gets its name and its state before its tensors."""
    from nemo_moviegen.training import saving

    write_folder = saving.write_folder

    def write_late(folder, pieces, group):
        if f"step={2 * SAVE_EVERY}" in str(folder) and os.environ["RANK"] == "0":
            early = folder.parent.with_name(f"step={2 * SAVE_EVERY}")
            early.mkdir()
            saving.write_json(early / "state.json", {"step": 2 * SAVE_EVERY, "optimizer_steps": 8})
            time.sleep(0.3)
        write_folder(folder, pieces, group)

    saving.write_folder = write_late


@pytest.mark.parametrize(
    ("bug", "noticed"),
    [
        (_forget_moments, r"step \d+ differs: train/"),
        (_restart_the_data, r"step \d+ differs: train/"),
        (_rename_too_early, r"exit code(.|\n)*tensors is incomplete"),
    ],
)
def test_a_resume_that_goes_wrong_is_noticed(bug, noticed, tmp_path, latents, whole):
    start = functools.partial(chaos.ForkedRun, break_it=bug)
    run = functools.partial(
        chaos.attempt,
        start,
        chaos.settings(tmp_path / "run", latents, "optimizer", STEPS, SAVE_EVERY),
        tmp_path / "run",
        reference=whole.metrics,
    )
    killed = run(chaos.Kill("all ranks", 0.01, in_save=2))
    assert killed.was_killed and not killed.differs
    try:
        said = run(None).differs
    except AssertionError as error:
        said = str(error)
    assert re.search(noticed, said), said


def test_a_run_killed_while_it_takes_up_its_metrics_keeps_the_old_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            record.open_after(path, 2)
    assert [line["step"] for line in chaos.read_metrics(tmp_path)] == [1, 2, 3]
    record.open_after(path, 2).close()
    assert [line["step"] for line in chaos.read_metrics(tmp_path)] == [1, 2]
