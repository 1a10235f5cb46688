"""The bytes of a latent shard: a WebDataset tar, and one sample's span of it. Plain numpy, no index here.

A sample is a run of tar members `KEY.latent.npy`, `KEY.CONTEXT.npy` for each text encoder and `KEY.json`; the
`webdataset` package reads the tar as it is. The span of one sample can be read on its own.
"""

import ast
import contextlib
import errno
import functools
import io
import json
import os
import socket
import tarfile
from collections import deque

import numpy as np
import xxhash

from nemo_moviegen.data import buffers

END_OF_TAR = bytes(1024)
PIECE = 1 << 20
"""Bytes of a sample that are read, and summed up, at a time: as many as a core's cache holds."""
_BLOCK = 512  # a tar header, and what members are padded to
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checksum(span) -> int:
    """XXH3, 64 bits, of a sample's bytes; of those of its pieces where it has several."""
    view = memoryview(span)
    return _joined([_digest(view[start : start + PIECE]) for start in range(0, len(view), PIECE)])


def pack_sample(key, latent_TCHW, contexts, facts) -> bytes:
    """Tar members of one sample, the same bytes every time. Arrays are stored as they are."""
    members = {"latent.npy": _npy(latent_TCHW)}
    members |= {f"{name}.npy": _npy(features) for name, features in contexts.items()}
    members["json"] = json.dumps(facts, ensure_ascii=False).encode()
    parts = []
    for ending, data in members.items():
        header = tarfile.TarInfo(f"{key}.{ending}")
        header.size = len(data)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)]
    return b"".join(parts)


def unpack_sample(span) -> tuple[np.ndarray, dict[str, np.ndarray], dict]:
    """Latents, features by encoder and facts out of a sample's span, uint8 [N]; arrays are views of it."""
    view, arrays, facts, place = memoryview(span), {}, None, 0
    while place < len(view):
        ending = bytes(view[place : place + 100]).rstrip(b"\0").partition(b".")[2].decode()
        nbytes, start = int(bytes(view[place + 124 : place + 135]), 8), place + _BLOCK
        if ending == "json":
            facts = json.loads(bytes(view[start : start + nbytes]))
        else:
            arrays[ending.removesuffix(".npy")] = _view(span, view, start)
        place = start + nbytes + -nbytes % _BLOCK
    return arrays.pop("latent"), arrays, facts


class ShardFile:
    """An open shard, read by position: safe from several threads and after a fork."""

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, view, offset) -> int:
        """Fill the memory from there on; returns how many bytes there were: fewer where the file ends."""
        done = 0
        while done < len(view) and (count := os.preadv(self._descriptor, [view[done:]], offset + done)):
            done += count
        return done

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class SpanRead:
    """One span while it is read: uint8 memory, filled and summed up piece by piece, by any thread."""

    def __init__(self, file, offset, nbytes):
        self.span = buffers.take(nbytes)
        self._file, self._offset, self._view = file, offset, memoryview(self.span)
        self.starts = range(0, nbytes, PIECE)
        self._digests, self._problem = [b""] * len(self.starts), None

    def read_piece(self, start):
        """Read one of the pieces that start at `starts`, and take its digest while the cache has it."""
        piece = self._view[start : start + PIECE]
        try:
            if self._file.read_into(piece, self._offset + start) < len(piece):
                self._problem = "the shard is truncated"
        except OSError as error:
            self._problem = error.strerror
        self._digests[start // PIECE] = _digest(piece)

    def problem(self, wanted) -> str:
        """What is wrong with the span, all of it read; "" where its checksum is the wanted one."""
        if self._problem or _joined(self._digests) == wanted:
            return self._problem or ""
        return "its checksum does not match, the shard is corrupt"


def read_spans(spans, submit=None, helpers=0):
    """Read every piece of the spans; `submit` hands work to that many helping threads."""
    pieces = deque((span, start) for span in spans for start in span.starts)

    def work():
        while True:
            try:
                span, start = pieces.popleft()
            except IndexError:
                return
            span.read_piece(start)

    started = [submit(work) for _ in range(helpers)]
    work()
    for helper in started:
        helper.result()


def write_whole(path, data):
    """The file at `path`, written beside and renamed. ValueError where the file system is full."""
    part = part_of(path)
    with named_if_full(path, part), part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def part_of(path):
    """Where a file is written until it is whole: a name of this process, for a task may run twice."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")


@contextlib.contextmanager
def named_if_full(path, part):
    """Within it, a full file system is a ValueError that names `path`; whatever ends it removes `part`."""
    try:
        yield
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno not in _FULL:
            raise
        reason = error.strerror
    else:
        return
    raise ValueError(
        f"{path} cannot be written: {reason}; make room on its file system, or raise the quota, and run the "
        "same command again: finished shards stand"
    )


def _digest(piece):
    return xxhash.xxh3_64_digest(piece)


def _joined(digests):
    return int.from_bytes(digests[0] if len(digests) == 1 else _digest(b"".join(digests)), "big")


def _view(span, view, start):
    """The array of the .npy file that starts there."""
    length = int.from_bytes(view[start + 8 : start + 10], "little") + 10
    dtype, shape, count = _npy_header(bytes(view[start : start + length]))
    return np.frombuffer(span, dtype, count, start + length).reshape(shape)


@functools.lru_cache(maxsize=4096)  # samples of a bucket share theirs
def _npy_header(header):
    facts = ast.literal_eval(header[10:].decode("latin1"))
    if header[:7] != b"\x93NUMPY\x01" or facts["fortran_order"]:
        raise ValueError("not an array that `pack_sample` wrote")
    return np.dtype(facts["descr"]), facts["shape"], int(np.prod(facts["shape"], dtype=np.int64))


def _npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
    return buffer.getvalue()
