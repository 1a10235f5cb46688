"""Which training steps are bad, by their loss and gradient norm: plain numbers, without torch."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

FLOOR = 0.05
"""Least deviation a window is given, as a share of its median: one of equal values has none of its own."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How a run watches itself (our defaults: the paper says nothing of it).

    A bad step is skipped; several in a row send the run back to its last checkpoint while the data go on,
    which is how PaLM passed its spikes.
    """

    check_every: int = 100
    """Steps between checks that ranks agree; 0 = never."""
    window: int = 128
    """Good steps of a kind (image, video) that the next one is compared with."""
    min_steps: int = 64
    """Good steps of a kind before any is called a spike; a loss that is not finite is bad from the first."""
    spike_mads: float = 20.0
    """Median absolute deviations above the median that make a spike. A deviation counts as at least 5% of
    the median, so the default calls no step below twice the median one."""
    rollback_after: int = 5
    """Steps skipped in a row that send the run back to its last checkpoint."""
    max_rollbacks: int = 3
    """Rollbacks without `window` good steps between them; one more ends the run."""

    def __post_init__(self):
        for name, least in (("check_every", 0), ("max_rollbacks", 0), ("rollback_after", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"guard.{name} is {getattr(self, name)}; use {least} or more")
        if not 1 <= self.min_steps <= self.window:
            raise ValueError(
                f"guard.min_steps {self.min_steps} and guard.window {self.window}: use 1 or more, and a "
                "window of at least min_steps"
            )
        if not self.spike_mads > 0:
            raise ValueError(f"guard.spike_mads is {self.spike_mads}; use a number above 0 (.inf: no spikes)")


class SpikeDetector:
    """Judges steps one after the other; ranks that see the same numbers judge alike."""

    def __init__(self, guard):
        self.guard = guard
        self.skipped = 0
        """Bad steps so far."""
        self.in_a_row = 0
        """Bad steps since the last good one, or since the last rollback."""
        self.rollbacks = 0
        """Rollbacks without `guard.window` good steps between them."""
        self._good_since_rollback = 0
        self._windows = {}

    def judge(self, kind, loss, grad_norm) -> str:
        """Why a step of this kind (image, video) is bad, "" for a good one, which joins the window."""
        values = {"loss": loss, "grad_norm": grad_norm}
        reason = next(filter(None, (self._reason(kind, *pair) for pair in values.items())), "")
        if reason:
            self.skipped += 1
            self.in_a_row += 1
            return reason
        for name, value in values.items():
            self._window(kind, name).append(value)
        self.in_a_row = 0
        self._good_since_rollback += 1
        if self._good_since_rollback >= self.guard.window:
            self.rollbacks = 0
        return ""

    def wants_rollback(self) -> bool:
        """Whether `guard.rollback_after` steps in a row were bad."""
        return self.in_a_row >= self.guard.rollback_after

    def rolled_back(self):
        """Count a rollback: the next bad step is the first of a new row."""
        self.rollbacks += 1
        self.in_a_row = self._good_since_rollback = 0

    def state(self) -> dict:
        """What decides about the next steps, as JSON can hold it."""
        return {
            "windows": {key: list(values) for key, values in self._windows.items()},
            "counts": [self.skipped, self.in_a_row, self.rollbacks, self._good_since_rollback],
        }

    def load_state(self, state):
        """Go on as the detector would that `state()` was asked of, or afresh from {}."""
        windows = state.get("windows", {}).items()
        self._windows = {key: deque(values, maxlen=self.guard.window) for key, values in windows}
        counts = state.get("counts", [0, 0, 0, 0])
        self.skipped, self.in_a_row, self.rollbacks, self._good_since_rollback = counts

    def _window(self, kind, name):
        return self._windows.setdefault(f"{kind}/{name}", deque(maxlen=self.guard.window))

    def _reason(self, kind, name, value):
        if not math.isfinite(value):
            return f"{name} is {value}"
        window = self._window(kind, name)
        if len(window) < self.guard.min_steps:
            return ""
        middle = median(window)
        deviation = max(median(abs(v - middle) for v in window), FLOOR * abs(middle))
        if value <= middle + self.guard.spike_mads * deviation:
            return ""
        return (
            f"{name} {value:.4g} is a spike: the median of the last {len(window)} good {kind} steps is "
            f"{middle:.4g}, the median deviation {deviation:.2g}"
        )
