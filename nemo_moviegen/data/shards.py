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

import numpy as np

END_OF_TAR = bytes(1024)
_BLOCK = 512  # a tar header, and what members are padded to
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checksum(span) -> int:
    """XXH3 of the bytes, 64 bits: faster than memory is read; other threads run meanwhile."""
    import xxhash

    return xxhash.xxh3_64_intdigest(span)


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

    def read(self, offset, nbytes) -> np.ndarray:
        """The bytes there, uint8 [nbytes]; fewer where the file ends."""
        # A buffer of its own for each sample, whose arrays are views of it. The allocator hands out again
        # what the last batch gave back: memory stays as it is.
        span = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes and (count := os.preadv(self._descriptor, [span[done:]], offset + done)):
            done += count
        return span[:done]

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


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
