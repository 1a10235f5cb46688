"""Runs under the guard and the monitor, with faults planted into their ranks."""

from pathlib import Path

import torch
import torch.distributed as dist


def no_checkpoint(trainer):
    """A rollback of a run that has not saved yet."""
    return ""


def guarded(*plants, rollback=no_checkpoint):
    """What runs in each rank before `train`; each `plant(trainer, data)` may break something."""

    def before():
        from nemo_moviegen.training import run
        from nemo_moviegen.training.guard import SkipBadSteps
        from nemo_moviegen.training.monitor import Monitor

        make = run._trainer

        def make_with_guard(recipe, data, *rest):
            trainer = make(recipe, data, *rest)
            guard = SkipBadSteps(recipe, data, rollback)
            trainer.callbacks[:0] = [guard, Monitor(recipe, data, guard)]
            for plant in plants:
                plant(trainer, data)
            return trainer

        run._trainer = make_with_guard

    return before


def to_the_start(output):
    """A rollback to the weights the run began with; notes in `output` at which steps it is called."""

    def rollback(trainer):
        for parameter, value in trainer.started_from:
            parameter.data.copy_(value)
        (chained,) = trainer.optimizers[0].mcore_optimizer.chained_optimizers
        chained.optimizer.state.clear()
        for group in chained.optimizer.param_groups:
            del group["step"]
        with Path(output, f"rollbacks{dist.get_rank()}").open("a") as file:
            file.write(f"{trainer.global_step} ")
        return "start"

    return rollback


def keep_start(trainer, data):
    """For `to_the_start`."""
    import lightning.pytorch as pl

    class KeepStart(pl.Callback):
        def on_train_start(self, trainer, module):
            trainer.started_from = [(p, p.detach().clone()) for p in module.parameters()]

    trainer.callbacks.append(KeepStart())


def keep_end(trainer, data):
    """Write every parameter, moment and step count of a rank to end<rank>.pt in the run folder."""
    import lightning.pytorch as pl

    class KeepEnd(pl.Callback):
        def on_train_end(self, trainer, module):
            kept = {name: p.detach() for name, p in module.named_parameters()}
            (chained,) = trainer.optimizers[0].mcore_optimizer.chained_optimizers
            for g, group in enumerate(chained.optimizer.param_groups):
                kept[f"step {g}"] = torch.tensor(group["step"])
                for p, parameter in enumerate(group["params"]):
                    kept |= {f"{g} {p} {name}": v for name, v in chained.optimizer.state[parameter].items()}
            torch.save(kept, f"{data.recipe.output}/end{dist.get_rank()}.pt")

    trainer.callbacks.append(KeepEnd())
