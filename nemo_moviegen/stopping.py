"""How a run is asked to stop before its end, and what its exit codes say. No torch.

A rank that gets SIGTERM or SIGUSR1, a file `OUTPUT/stop` (an operator's) or the file that `MOVIEGEN_STOP`
names (the batch script's): after the step all ranks save a checkpoint and end (training/stopping.py).
"""

import os
import signal
from pathlib import Path

MISTAKE, TO_GO_ON, TO_STAY, HUNG = 2, 75, 76, 77
"""Exit codes: a user's mistake, said in one line; stopped with all saved, start it again; stopped by an
operator, with all saved; ended because a rank hung. Anything else but 0 is a failure."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "stop"
"""In the run folder: `touch` it and the run saves and ends; the next start removes it."""
STOP_VARIABLE = "MOVIEGEN_STOP"
"""Environment variable with the path of the batch script's stop file."""


class Stopped(Exception):
    """The run has saved and ends before its last step; `code` is TO_GO_ON or TO_STAY."""

    def __init__(self, said, code):
        super().__init__(said, code)
        self.code = code

    def __str__(self):
        return self.args[0]


def forget_stop(output):
    """Remove the stop file of an earlier run in that folder."""
    Path(output, STOP_FILE).unlink(missing_ok=True)


def stop_asked(output) -> tuple[int, str]:
    """(exit code, who asked) by the stop files there are, (0, "") where there is none; the operator's wins"""
    file = Path(output, STOP_FILE)
    if file.exists():
        return TO_STAY, str(file)
    theirs = os.environ.get(STOP_VARIABLE)
    if theirs and os.path.exists(theirs):
        return TO_GO_ON, Path(theirs).read_text(encoding="utf-8").strip() or theirs
    return 0, ""
