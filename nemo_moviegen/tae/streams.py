"""A clip in chunks of frames through layers that look both ways in time, with the numbers of the whole clip.

A stream is an iterator of (chunk [B, T, H, W, C], is_last); every layer's `stream` turns one into another.
A layer that looks p frames ahead gives its output p frames late and keeps what the next chunk needs, so
memory grows with the chunk and not with the clip:

    in       0 1 2 3 | 4 5 6 7 | 8 9 (last)
    kept               2 3       6 7
    out      0 1 2   | 3 4 5 6 | 7 8 9           a convolution over three frames; the ends are replicated

Chunks may have any number of frames, but a stream has one at least, and its last chunk is not empty. A
generator that waits keeps what its names stand for: so each lets go of a chunk before it hands one on.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Stream = Iterator[tuple[Tensor, bool]]


def marked(chunks: Iterable[Tensor]) -> Stream:
    """Each chunk with whether it is the last: one is read ahead. ValueError where there is none."""
    chunks = iter(chunks)
    ready = next(chunks, None)
    if ready is None:
        raise ValueError("a stream of no chunks has no clip: pass one frame or more")
    for chunk in chunks:
        yield ready, False
        ready = chunk
    yield ready, True


def in_parts(chunk: Tensor, is_last: bool, most: int) -> Stream:
    """The chunk in parts of at most `most` frames: a layer that held frames back gives more at the end."""
    parts = deque(chunk.split(most, dim=1))
    del chunk
    while parts:
        yield parts.popleft(), is_last and not parts


def finer(stream: Stream, most: int) -> Stream:
    """The stream in chunks of at most `most` frames."""
    for chunk, is_last in stream:
        parts = in_parts(chunk, is_last, most)
        del chunk
        yield from parts


def frame_by_frame(stream: Stream, function: Callable[[Tensor], Tensor]) -> Stream:
    """What looks at no other frame."""
    for chunk, is_last in stream:
        made = [function(chunk)]
        del chunk
        yield made.pop(), is_last


def windowed(stream: Stream, function, kernel: int, stride: int, most: int) -> Stream:
    """`function` of whole windows of `kernel` frames every `stride`, the edge frames repeated at both ends.

    Odd kernels; output t is that of the window around input frame t * stride. `function` takes frames and
    gives one for each window that lies wholly inside.
    """
    pad, kept = kernel // 2, None
    step = max(kernel, stride)  # a window waits for all frames before the next: the end gives one or more
    for chunk, is_last in stream:
        before = chunk[:, :1].expand(-1, pad, -1, -1, -1) if kept is None else kept
        after = chunk[:, -1:].expand(-1, pad + step - kernel if is_last else 0, -1, -1, -1)
        frames = torch.cat([before, chunk, after], dim=1)
        del before, chunk, after
        ready = max(0, (frames.shape[1] - step) // stride + 1)
        kept = frames[:, ready * stride :].clone()
        for first in range(0, ready, most):
            end = min(first + most, ready)
            made = [function(frames[:, first * stride : (end - 1) * stride + kernel])]
            if end == ready:
                del frames
            yield made.pop(), is_last and end == ready


class Waiting:
    """Frames of a shortcut, which wait for the branch beside it to give theirs."""

    def __init__(self):
        self._chunks = deque()

    def passing(self, stream: Stream, shortcut: Callable[[Tensor], Tensor]) -> Stream:
        """The stream itself; `shortcut` of what passes is kept."""
        for chunk, is_last in stream:
            self._chunks.append(shortcut(chunk))
            made = [chunk]
            del chunk
            yield made.pop(), is_last

    def take(self, num_frames: int) -> Tensor:
        """The oldest frames that wait."""
        taken, missing = [], num_frames
        while missing:
            chunk = self._chunks.popleft()
            if chunk.shape[1] > missing:
                self._chunks.appendleft(chunk[:, missing:])
                chunk = chunk[:, :missing]
            taken.append(chunk)
            missing -= chunk.shape[1]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)
