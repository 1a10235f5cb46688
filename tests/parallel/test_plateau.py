"""A run whose learning rate follows the validation loss: alike on all ranks, resumed bit for bit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen.recipe import Layout, Optim, Plateau, Validation
from parallel.runs import recipe, train_on_ranks, write_latents

RATE = 3e-3
OPTIM = Optim(
    learning_rate=RATE,
    warmup_steps=1,
    clip_grad=1e9,
    decay="plateau",
    plateau=Plateau(patience=1, threshold=0.9, cooldown=1, floor=0.2),
)
"""No loss falls by nine tenths: measured after every step, the second, fourth and sixth lower the rate."""


pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    write_latents(folder.with_name(f"{folder.name}_heldout"), num_samples=6, seed=1)
    return folder


def plateau_recipe(folder, latents, **changes):
    base = recipe(folder, latents, optim=OPTIM, num_steps=8, save_every=100, validation=Validation(every=1))
    return replace(base, **changes)


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def rates(folder):
    return [line["train/learning_rate"] for line in metrics(folder)]


def losses(folder):
    return [line["train/loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, latents):
    run = plateau_recipe(tmp_path_factory.mktemp("whole"), latents)
    train_on_ranks(run, 1)
    return run


def test_the_step_after_a_stalled_measurement_takes_the_lower_rate(whole):
    assert rates(whole.output) == pytest.approx(
        [RATE, RATE, RATE / 2, RATE / 2, RATE / 4, RATE / 4, RATE / 5, RATE / 5], rel=1e-12
    )


def test_two_ranks_lower_it_as_one_does(whole, tmp_path, latents):
    for name, layout in {"dp": Layout(sharding="full"), "tp": Layout(tensor=2)}.items():
        run = replace(whole, output=str(tmp_path / name), layout=layout, micro_batch=1)
        train_on_ranks(run, 2)
        assert rates(run.output) == rates(whole.output)
        assert losses(run.output) == pytest.approx(losses(whole.output), rel=0, abs=1e-9)


@pytest.mark.parametrize("save_every", [1, 3, 4])
def test_a_killed_run_goes_on_with_the_rates_and_losses_it_would_have_had(
    save_every, whole, tmp_path, latents
):
    run = replace(whole, output=str(tmp_path), save_every=save_every)
    with pytest.raises(AssertionError, match="died without a result"):
        train_on_ranks(run, 1, before=_die_after_step_5)
    train_on_ranks(run, 1)
    assert rates(run.output) == rates(whole.output)
    assert losses(run.output) == losses(whole.output)


def test_measurements_that_a_checkpoint_brings_do_not_count(whole, tmp_path, latents):
    """Or else how often a run saves, and where it once ended, would change its rates."""
    run = replace(whole, output=str(tmp_path / "rare"), validation=Validation(every=3))
    often = replace(run, output=str(tmp_path / "often"), save_every=2)
    train_on_ranks(run, 1)
    train_on_ranks(replace(often, num_steps=5), 1)
    train_on_ranks(often, 1)
    measured = [
        [line["step"] for line in metrics(r.output) if "validation/loss" in line] for r in (run, often)
    ]
    assert measured == [[3, 6, 8], [2, 3, 4, 5, 6, 8]]
    assert rates(often.output) == rates(run.output) == pytest.approx(6 * [RATE] + 2 * [RATE / 2])
    assert losses(often.output) == losses(run.output)


def test_a_plateau_without_a_validation_loss_is_refused(latents, tmp_path):
    with pytest.raises(ValueError, match=r"validation\.every is 0: set validation\.every to steps"):
        plateau_recipe(tmp_path, latents, validation=Validation())


def _die_after_step_5():
    from nemo_moviegen.training.callbacks import Metrics

    tell = Metrics.on_train_batch_end

    def tell_and_die(self, trainer, *args):
        tell(self, trainer, *args)
        if trainer.global_step == 5:
            for callback in trainer.callbacks:
                if hasattr(callback, "writer"):
                    callback.writer.wait()
            os._exit(1)

    Metrics.on_train_batch_end = tell_and_die
