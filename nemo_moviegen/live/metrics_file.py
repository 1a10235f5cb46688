"""metrics.jsonl while a run appends to it: only new lines are read, and of a long run only a share is kept.

What a run of 210,000 steps wrote is 200 MB. Each line has a number; kept are those whose number times the
golden ratio has a fractional part below a share, which halves each time too many are kept. So lines stay
evenly spread, those that are kept now were kept before, and no period of the data (images every eleventh
step) meets one of ours.
"""

import json
import math
from collections import deque
from pathlib import Path

from nemo_moviegen.recipe import METRICS_FILE

MOST_ROWS = 4096
"""Lines kept of the steps; and of the steps with a validation loss, all of which are looked at."""
NUM_RECENT = 200
"""The last lines, each of which is kept: what a run does now."""
_GOLDEN = 2654435769  # 2**32 / golden ratio, odd
_ALL = 1 << 32
_MEASURED = (b'"validation/loss"', b'"heldout/')


class MetricsFile:
    """Rows of a run folder's metrics.jsonl; `read` takes in what was appended since."""

    def __init__(self, run_folder, most_rows=MOST_ROWS):
        self.path, self.most_rows = Path(run_folder, METRICS_FILE), most_rows
        self._start()

    def _start(self):
        self.num_lines = self.num_bytes = 0
        self.file_id = None
        self._steps, self._measured = _Thinned(self.most_rows), _Thinned(self.most_rows)
        self._tail = deque(maxlen=NUM_RECENT)
        self._last_measured = {}

    def read(self):
        """Take in new lines; from the start where a resumed run has written the file anew."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            stat = self.path.stat()
            if (stat.st_ino, stat.st_dev) != self.file_id or stat.st_size < self.num_bytes:
                self._start()
                self.file_id = (stat.st_ino, stat.st_dev)
            file.seek(self.num_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the line that is being written
                self._take(line)
                self.num_bytes += len(line)

    def _take(self, line):
        number, self.num_lines = self.num_lines, self.num_lines + 1
        self._tail.append(line)
        is_measured = any(key in line for key in _MEASURED)
        kept = self._steps.wants(number)
        if not (kept or is_measured) or (row := _parsed(line)) is None:
            return
        if kept:
            self._steps.add(number, row)
        if is_measured:
            self._last_measured = row
            # by its own count: one line in a thousand has none of a golden ratio's evenness
            self._measured.add(self._measured.count, row)

    @property
    def rows(self) -> list[dict]:
        """An even share of all rows, in the order of the file."""
        return self._steps.rows

    @property
    def measured(self) -> list[dict]:
        """Rows with a validation loss or another number of held-out samples, with the last of them."""
        rows = self._measured.rows
        return rows if rows[-1:] == [self._last_measured] or not rows else [*rows, self._last_measured]

    @property
    def recent(self) -> list[dict]:
        """The last rows, each."""
        return [row for line in self._tail if (row := _parsed(line)) is not None]


class _Thinned:
    """At most `most` of numbered rows."""

    def __init__(self, most):
        self.most, self.share, self.count = most, _ALL, 0
        self._pairs = []

    def wants(self, number):
        return number * _GOLDEN % _ALL < self.share

    def add(self, number, row):
        self.count += 1
        if self.wants(number):
            self._pairs.append((number, row))
        while len(self._pairs) > self.most:
            self.share //= 2
            self._pairs = [pair for pair in self._pairs if self.wants(pair[0])]

    @property
    def rows(self):
        return [row for _, row in self._pairs]


def _parsed(line):
    """The row of a line; None where it is none: a run that was killed left half of it."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def series(rows, key, where=None) -> tuple[list[int], list[float]]:
    """Steps and values of rows with a finite number under `key`; of those `where(row)` takes, if given."""
    pairs = [
        (row["step"], row[key])
        for row in rows
        if isinstance(row.get(key), (int, float))
        and math.isfinite(row[key])
        and (where is None or where(row))
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]
