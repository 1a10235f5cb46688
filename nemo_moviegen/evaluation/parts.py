"""What each task of a job array measured, kept until the last one puts it together.

    OUTPUT/parts/I-of-N.pt    settings, and what `measure` found: numbers, moments, a few pictures

A part that is there is not measured again. Whichever task ends last finds all parts and writes the results.
"""

import os
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.evaluation.frechet import Moments
from nemo_moviegen.evaluation.measuring import Found, together
from nemo_moviegen.evaluation.pictures import Dots, Shown

_NUMPY = (np.empty(0).__reduce__()[0], np.ndarray, np.dtype, *map(type, map(np.dtype, ("u1", "f4", "f8"))))
_KEPT = (Found, Shown, Dots, Moments, *_NUMPY)
"""What a part may hold: nothing else is unpickled."""


def read_part(output, task, settings) -> Found | None:
    """What a task found before, None where it has not; ValueError where it was of other settings."""
    path = _path(output, task)
    if not path.is_file():
        return None
    with torch.serialization.safe_globals(list(_KEPT)):
        part = torch.load(path, weights_only=True)
    if part["settings"] != settings:
        changed = sorted(key for key in settings if settings[key] != part["settings"].get(key))
        raise ValueError(
            f"{path} was measured with another {', '.join(changed)}: remove {path.parent}, or name another "
            "output folder"
        )
    return part["found"]


def write_part(output, task, settings, found):
    """Keep what a task found."""
    path = _path(output, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    torch.save({"settings": settings, "found": found}, part)
    os.replace(part, path)


def all_parts(output, count, settings) -> tuple[Found | None, int]:
    """(what all tasks found, 0), or (None, how many are missing)."""
    parts = [read_part(output, (index, count), settings) for index in range(count)]
    missing = sum(part is None for part in parts)
    return (None, missing) if missing else (together(parts), 0)


def _path(output, task):
    return Path(output, "parts", f"{task[0]}-of-{task[1]}.pt")
