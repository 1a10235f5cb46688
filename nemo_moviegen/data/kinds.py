"""An order of rows, taken by kind: clips and images never share a batch."""

from collections import deque
from itertools import islice

_LOOK_AHEAD = 4096  # rows looked through for others of a kind: integers only


class RowsByKind:
    """Rows of an order, finite or not; those of the other kind wait their turn."""

    def __init__(self, order, clips):
        self._order, self._clips = enumerate(order), clips
        self._waiting = {"video": deque(), "image": deque()}

    def next_kind(self):
        """Kind of the earliest row not taken yet; None at the end."""
        if not any(self._waiting.values()) and not self._pull():
            return None
        return min((rows[0][0], kind) for kind, rows in self._waiting.items() if rows)[1]

    def next_of(self, kind):
        """The next row of this kind, taken; None where the order, or the look-ahead, holds no more."""
        return self._waiting[kind].popleft()[1] if self._see(kind, 1) else None

    def coming(self, kind, count) -> list[int]:
        """Up to `count` rows that `next_of` is going to give."""
        self._see(kind, count)
        return [row for _, row in islice(self._waiting[kind], count)]

    def _see(self, kind, count):
        """Whether a row of this kind waits; pulls until `count` do."""
        other = self._waiting["image" if kind == "video" else "video"]
        while len(self._waiting[kind]) < count and len(other) < _LOOK_AHEAD and self._pull():
            pass
        return bool(self._waiting[kind])

    def _pull(self):
        for position, row in self._order:
            self._waiting[self._clips[row].kind].append((position, row))
            return True
        return False
