"""Where a run's metrics go beside metrics.jsonl: TensorBoard, and Weights & Biases where a project is set."""

import os
import uuid
from dataclasses import asdict
from pathlib import Path

WANDB_ID_FILE = "wandb_id"
"""In the run folder: its name at Weights & Biases, so that a resumed run goes on in the same place."""


def loggers(recipe) -> list:
    """Lightning's loggers of a run; TensorBoard's first."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    found = [TensorBoardLogger(recipe.output, name="tensorboard", version="")]
    if recipe.progress.wandb_project:
        found.append(
            WandbLogger(
                project=recipe.progress.wandb_project,
                name=recipe.name,
                id=_run_id(Path(recipe.output)),
                save_dir=recipe.output,
                resume="allow",
                config=asdict(recipe),
            )
        )
    return found


def _run_id(output):
    """Drawn once a run folder, by rank 0; other ranks report nothing."""
    path = output / WANDB_ID_FILE
    if int(os.environ.get("RANK", 0)) == 0 and not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        os.replace(part, path)
    return path.read_text(encoding="utf-8") if path.is_file() else None
