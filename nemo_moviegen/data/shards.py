"""The bytes of a latent shard: a WebDataset tar, and one sample's span of it. Plain numpy, no index here.

A sample is a run of tar members `KEY.latent.npy`, `KEY.CONTEXT.npy` for each text encoder and `KEY.json`; the
`webdataset` package reads the tar as it is. The span of one sample can be read on its own.
"""

import io
import json
import os
import tarfile

import numpy as np

_BLOCK = 512  # a tar header, and what members are padded to


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
    """Latents, features by encoder and facts out of a sample's span. ValueError where it is no such span."""
    members, place = {}, 0
    while place < len(span):
        name = span[place : place + 100].rstrip(b"\0").decode()
        nbytes = int(span[place + 124 : place + 135], 8)
        members[name.partition(".")[2]] = span[place + _BLOCK : place + _BLOCK + nbytes]
        place += _BLOCK + nbytes + -nbytes % _BLOCK
    facts = json.loads(members.pop("json"))
    arrays = {ending.removesuffix(".npy"): np.load(io.BytesIO(data)) for ending, data in members.items()}
    return arrays.pop("latent"), arrays, facts


class ShardFile:
    """An open shard, read by position: safe from several threads and after a fork."""

    def __init__(self, path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset, nbytes) -> bytes:
        """The bytes there; fewer where the file ends."""
        return os.pread(self._descriptor, nbytes, offset)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()
