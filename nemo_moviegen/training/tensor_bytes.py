"""Bytes of all live tensors of a process without a GPU: what `torch.cuda.max_memory_allocated` is there.

The resident set of a process holds interpreter, libraries and freed pages too; a plan says nothing of those.
"""

import contextlib
import os
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRACK = "MOVIEGEN_TRACK_MEMORY"
"""Environment variable: 1 makes a run on a CPU count the bytes of its tensors (steps take up to double)."""


class TensorBytes(TorchDispatchMode):
    """Counts storages from their first appearance in an operation until they are freed.

    `live` and `peak` are bytes. What a kernel needs inside itself is not seen, nor is what was allocated
    before the mode was entered and is used in no operation.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self):
        torch.UntypedStorage.resize_ = self._resized()  # no operation: collected keys are freed by it
        return super().__enter__()

    def __exit__(self, *problem):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*problem)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor)
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._see(tensor)
        return result

    def reset_peak(self) -> int:
        """The peak since the last call; counts on from what is live."""
        peak, self.peak = self.peak, self.live
        return peak

    def _see(self, tensor):
        if not isinstance(tensor, torch.Tensor):
            return
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, this rank's piece
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            self._set(key, storage.nbytes())
            return
        self._sizes[key] = 0
        self._set(key, storage.nbytes())
        weakref.finalize(storage, self._freed, key).atexit = False

    def _set(self, key, size):
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _freed(self, key):
        self.live -= self._sizes.pop(key, 0)

    def _resized(self):
        resize, tracker = self._resize, self

        def resize_(storage, size):
            result = resize(storage, size)
            if storage._cdata in tracker._sizes:
                tracker._set(storage._cdata, size)
            return result

        return resize_


_counting = []


@contextlib.contextmanager
def counted():
    """While this lasts the bytes of tensors are counted, if `TRACK` asks for it and there is no GPU."""
    if os.environ.get(TRACK) != "1" or torch.cuda.is_available():
        yield
        return
    with TensorBytes() as tensors:
        _counting.append(tensors)
        try:
            yield
        finally:
            _counting.remove(tensors)


def peak_bytes() -> int | None:
    """The most that was live at once so far; None where nothing is counted."""
    return _counting[-1].peak if _counting else None
