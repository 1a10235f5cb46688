"""A run that is asked to stop, in any way, saves on all ranks at one step, and goes on as if it never had."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_on_ranks

from nemo_moviegen.recipe import Layout
from nemo_moviegen.stopping import TO_GO_ON, TO_STAY
from nemo_moviegen.training.checkpoint import last_checkpoint
from parallel.runs import recipe, train_on_ranks
from parallel.test_training import losses

pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, latents):
    """The run that nobody stops, on two ranks that share a layer: both see every sample."""
    run = recipe(tmp_path_factory.mktemp("whole"), latents, precision="fp32", layout=Layout(tensor=2))
    train_on_ranks(run, 2)
    return run


class AtStep:
    """Before a run: have one rank do something at the end of a step."""

    def __init__(self, step, rank, act):
        self.step, self.rank, self.act = step, rank, act

    def __call__(self):
        from nemo_moviegen.training.guard import SkipBadSteps

        end = SkipBadSteps.on_train_batch_end

        def act_at_step(callback, trainer, *args):
            if trainer.global_step == self.step and int(os.environ["RANK"]) == self.rank:
                self.act(callback)
            end(callback, trainer, *args)

        SkipBadSteps.on_train_batch_end = act_at_step


def terminate(callback):
    os.kill(os.getpid(), signal.SIGTERM)


def raise_usr1(callback):
    os.kill(os.getpid(), signal.SIGUSR1)


def touch_stop(callback):
    Path(callback.recipe.output, "stop").touch()


def write_the_batch_scripts_file(callback):
    Path(callback.recipe.output, "job.stop").write_text("the time limit is near\n")
    os.environ["MOVIEGEN_STOP"] = f"{callback.recipe.output}/job.stop"


@pytest.mark.parametrize(
    ("rank", "act", "code", "said"),
    [
        (1, terminate, TO_GO_ON, "a signal to another rank"),
        (0, terminate, TO_GO_ON, "SIGTERM"),
        (1, raise_usr1, TO_GO_ON, "a signal to another rank"),
        (0, touch_stop, TO_STAY, "/stop"),
        (0, write_the_batch_scripts_file, TO_GO_ON, "the time limit is near"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_all_ranks_stop_after_the_same_step_with_all_saved_and_the_run_goes_on_bit_for_bit(
    rank, act, code, said, tmp_path, latents, whole
):
    """Seen to catch: Lightning's own SIGTERM handler left in place, and the other rank waiting for good."""
    run = replace(whole, output=str(tmp_path))
    ended = train_on_ranks(run, 2, before=AtStep(2, rank, act))
    assert [stopped.code for stopped in ended] == [code, code]
    assert f"stopped after step 2 of 6 ({'' if said[0] != '/' else tmp_path}{said})" in str(ended[0])
    assert last_checkpoint(tmp_path).name == "step=2"
    assert len(losses(tmp_path)) == 2
    (tmp_path / "job.stop").unlink(missing_ok=True)
    assert train_on_ranks(run, 2)[0]["train/loss"] == losses(tmp_path)[-1]
    assert losses(tmp_path) == losses(whole.output)
    assert not (tmp_path / "stop").exists(), "an operator's stop holds until the run is started again"


def test_asked_during_its_last_step_a_run_is_simply_done(tmp_path, latents, whole):
    run = replace(whole, output=str(tmp_path))
    metrics, _ = train_on_ranks(run, 2, before=AtStep(6, 1, terminate))
    assert metrics["train/loss"] == losses(whole.output)[-1]
    assert last_checkpoint(tmp_path).name == "step=6"


def test_a_run_does_not_stop_on_a_bad_step(tmp_path, latents, whole):
    """A checkpoint inside a series of bad steps would be what a rollback goes back to."""
    run = replace(whole, output=str(tmp_path))
    stopped, _ = train_on_ranks(run, 2, before=_bad_step_and_stop)
    assert "stopped after step 3 of 6" in str(stopped)
    assert last_checkpoint(tmp_path).name == "step=3"


def _bad_step_and_stop():
    from nemo_moviegen.spikes import SpikeDetector

    judge, judged = SpikeDetector.judge, []

    def bad_at_step_2(detector, *args):
        judged.append(1)
        return "planted" if len(judged) == 2 else judge(detector, *args)

    SpikeDetector.judge = bad_at_step_2
    AtStep(2, 0, terminate)()


def test_the_process_gets_its_signal_handlers_back(tmp_path, latents, whole):
    (handlers,) = run_on_ranks(
        _handlers_after_training, replace(whole, layout=Layout(), output=str(tmp_path)), world_size=1
    )
    assert handlers == [True, True]


def _handlers_after_training(run):
    from nemo_moviegen.training.stopping import StopWhenAsked

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stopping = StopWhenAsked(run)
    with stopping.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.signal_name == "SIGTERM"
    return [signal.getsignal(n) == h for n, h in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True)]
