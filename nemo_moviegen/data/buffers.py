"""Memory that is used again: for samples and batches, a new page costs more than filling an old one."""

import weakref

import numpy as np

_LARGE = 1 << 18  # bytes; below, the allocator itself hands out again what came back
_STEP = 1 << 20  # sizes are rounded up to it, so that samples with other captions fit
_MOST_IDLE = 1 << 29  # bytes that wait to be used again, in all
_idle = {}


def take(nbytes) -> np.ndarray:
    """uint8 [nbytes], not initialised. When the last array that looks into it is gone, it is used again.

    Of a GPU's own copy in progress nothing is known here: for one, take pinned memory of torch's.
    """
    if nbytes < _LARGE:
        return np.empty(nbytes, np.uint8)
    size = -(-nbytes // _STEP) * _STEP
    try:
        whole = _idle.setdefault(size, []).pop()
    except IndexError:
        whole = np.empty(size, np.uint8)
    # numpy shortens a chain of views to the array that owns the memory, which would leave `part` behind; it
    # stops at another kind of object, so through a memoryview every view of `part` holds `part`
    part = np.frombuffer(memoryview(whole), np.uint8, nbytes)
    weakref.finalize(part, _give_back, whole).atexit = False
    return part


def _give_back(whole):
    if sum(size * len(arrays) for size, arrays in [*_idle.items()]) + len(whole) > _MOST_IDLE:
        _idle.clear()  # of sizes that nothing asks for any more, most likely
    _idle.setdefault(len(whole), []).append(whole)
