"""Random orders, computed where they are asked for: nothing is stored, however many items there are."""

import hashlib

import numpy as np

_ROUNDS = 16  # with 12, some orders of 5 or 6 items come measurably more often than others
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*parts) -> np.uint64:
    """64-bit key of numbers and texts, the same on every machine."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big"))


def keys_of_epochs(keys_N, epochs_N) -> np.ndarray:
    """uint64 [N]: a key for each epoch, from that of a stream."""
    return _mix(keys_N + np.asarray(epochs_N).astype(np.uint64) * _GOLDEN)


def shuffled(ranks_N, counts_N, keys_N) -> np.ndarray:
    """int64 [N]: which of `counts_N` items is at a rank of a random order; each key has an order of its own.

    For one key the ranks 0 .. count - 1 give every item once. A Feistel network on a grid that just holds
    the items; a cell outside of them goes through it again until it is inside (Black and Rogaway 2002).
    """
    items_N = np.array(ranks_N, np.int64)
    counts_N, keys_N = (np.broadcast_to(values, items_N.shape) for values in (counts_N, keys_N))
    columns_N = np.ceil(np.sqrt(counts_N)).astype(np.int64)
    rows_N = -(-counts_N // columns_N)
    outside = np.arange(len(items_N))
    while len(outside):
        cells = _pass(items_N[outside], rows_N[outside], columns_N[outside], keys_N[outside])
        items_N[outside] = cells
        outside = outside[cells >= counts_N[outside]]
    return items_N


def _pass(cells_N, rows_N, columns_N, keys_N):
    row_N, column_N = (part.astype(np.uint64) for part in np.divmod(cells_N, columns_N))
    rows_N, columns_N = rows_N.astype(np.uint64), columns_N.astype(np.uint64)
    for number in range(_ROUNDS):
        keys_N = keys_N + _GOLDEN
        if number % 2:
            column_N = (column_N + _mix(row_N ^ keys_N) % columns_N) % columns_N
        else:
            row_N = (row_N + _mix(column_N ^ keys_N) % rows_N) % rows_N
    return (row_N * columns_N + column_N).astype(np.int64)


def _mix(numbers_N):
    """SplitMix64's finaliser: every bit of the result depends on every bit of the number."""
    numbers_N = (numbers_N ^ (numbers_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers_N = (numbers_N ^ (numbers_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers_N ^ (numbers_N >> np.uint64(31))
