"""What every training run shares: learning rate, metrics file, progress bar, quiet libraries.

Imports neither Lightning nor NeMo.
"""

import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_moviegen.recipe import METRICS_FILE, RECIPE_FILE, recipe_yaml
from nemo_moviegen.writable import write_whole

VERBOSE = "MOVIEGEN_VERBOSE"
"""Environment variable that brings back what the libraries say at start-up."""
_CHATTERERS = (
    "lightning",
    "lightning.fabric",
    "lightning.pytorch",
    "lightning_fabric",
    "lightning_utilities",
    "megatron",
    "NeMo",
    "nv_one_logger",
    "pytorch_lightning",
    "torch",
)


def quiet():
    """Errors only from the libraries: their start-up chatter drowns what an operator needs to see."""
    if os.environ.get(VERBOSE):
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes megatron's checkpoints start
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "nemo.utils" in sys.modules:
        sys.modules["nemo.utils"].logging.setLevel(logging.ERROR)


def write_recipe(recipe):
    """Put the recipe into its run folder, whole or not at all."""
    path = Path(recipe.output, RECIPE_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, recipe_yaml(recipe))


def learning_rate_factor(step, optim, num_steps) -> float:
    """Share of the peak at `step` (0 is the first): linear warm-up, then constant or cosine to a tenth.

    Where it follows the validation loss, what that has left of it is another factor.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.decay != "cosine":
        return 1.0
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(trainer, step):
    """Give the optimiser the rate of `step`, as if every step before had been taken."""
    for config in trainer.lr_scheduler_configs:
        config.scheduler.last_epoch = step - 1
        config.scheduler.step()


class RunRecord:
    """metrics.jsonl, a line a step, and a progress bar: in no terminal, a line every tenth of the run.

    A run that resumes at `first_step` first forgets the lines past it: it writes them again.
    """

    def __init__(self, name, folder, first_step, num_steps):
        self.name, self.num_steps = name, num_steps
        self._file = open_after(Path(folder) / METRICS_FILE, first_step)
        facts = TextColumn("{task.fields[facts]}")
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), facts, TimeRemainingColumn()
        )
        self._task = self._bar.add_task(name, total=num_steps, completed=first_step, facts="")
        self._bar.start()

    def write(self, step, values):
        """Append `values` (numbers by name) as the line of `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def show(self, step, facts):
        """Move the bar to `step`, with `facts` beside it."""
        self._bar.update(self._task, completed=step, facts=facts)
        if not self._bar.console.is_terminal and step % max(1, self.num_steps // 10) == 0:
            print(f"{self.name} {step}/{self.num_steps}  {facts}", flush=True)

    def close(self):
        """Stop the bar, close the file; a second call does nothing."""
        self._bar.stop()
        self._file.close()


def memory() -> dict[str, float]:
    """memory/peak_gib: the most torch has allocated on the GPU; without one memory/resident_gib, now, and
    memory/peak_gib where the run counts its tensors (tensor_bytes.py)."""
    import torch

    if torch.cuda.is_available():
        return {"memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    import psutil

    from nemo_moviegen.training import tensor_bytes

    resident = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    counted = tensor_bytes.peak_bytes()
    return resident if counted is None else resident | {"memory/peak_gib": counted / 2**30}


def open_after(path, step):
    """The file of JSON lines to append to, without the lines past `step`: a resumed run writes them again."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break  # the line a killed run was writing
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(kept))  # a run killed here keeps the old lines
    return path.open("a", buffering=1, encoding="utf-8")
