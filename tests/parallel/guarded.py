"""Runs under the guard and the monitor, with faults planted into their ranks."""

import torch
import torch.distributed as dist


def guarded(*plants):
    """What runs in each rank before `train`; each `plant(trainer, data)` may break something."""

    def before():
        from nemo_moviegen.training import run

        make = run._trainer

        def make_with_guard(recipe, data, *rest):
            trainer = make(recipe, data, *rest)
            for plant in plants:
                plant(trainer, data)
            return trainer

        run._trainer = make_with_guard

    return before


def keep_end(trainer, data):
    """Write every parameter, moment and step count of a rank to end<rank>.pt in the run folder."""
    import lightning.pytorch as pl

    from parallel.runs import gather_weights

    class KeepEnd(pl.Callback):
        def on_train_end(self, trainer, module):
            gather_weights(module.module)
            kept = {n: getattr(p, "_local_tensor", p).detach() for n, p in module.named_parameters()}
            optimizer = trainer.optimizers[0].mcore_optimizer
            (optimizer,) = getattr(optimizer, "chained_optimizers", [optimizer])
            for g, group in enumerate(optimizer.optimizer.param_groups):
                kept[f"step {g}"] = torch.tensor(group["step"])
                for p, parameter in enumerate(group["params"]):
                    for name, value in optimizer.optimizer.state[parameter].items():
                        kept[f"{name} {g} {p}"] = getattr(value, "_local_tensor", value)
            torch.save(kept, f"{data.recipe.output}/end{dist.get_rank()}.pt")

    trainer.callbacks.append(KeepEnd())
