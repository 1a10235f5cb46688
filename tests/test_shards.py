"""The bytes of shards: spans read in pieces by threads, checksums over pieces, memory that is used again."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash

from nemo_moviegen.data import buffers
from nemo_moviegen.data.shards import (
    PIECE,
    ShardFile,
    SpanRead,
    checksum,
    pack_sample,
    part_of,
    read_spans,
    unpack_sample,
    write_whole,
)


def random_bytes(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("nbytes", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17])
@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_a_span_read_in_pieces_is_its_bytes_and_its_checksum_is_theirs(tmp_path, nbytes, helpers):
    data = random_bytes(nbytes + 100)
    (tmp_path / "shard").write_bytes(data.tobytes())
    span = SpanRead(ShardFile(tmp_path / "shard"), 50, nbytes)
    with ThreadPoolExecutor(3) as pool:
        read_spans([span], pool.submit, helpers)
    assert np.array_equal(span.span, data[50 : 50 + nbytes])
    assert span.problem(checksum(data[50 : 50 + nbytes])) == ""
    assert "checksum does not match" in span.problem(checksum(data[:nbytes]))


def test_the_checksum_is_xxh3_of_a_small_sample_and_of_the_pieces_of_a_large_one():
    small, large = random_bytes(1000), random_bytes(2 * PIECE + 5)
    assert checksum(small) == xxhash.xxh3_64_intdigest(small)
    pieces = [large[:PIECE], large[PIECE : 2 * PIECE], large[2 * PIECE :]]
    digests = b"".join(xxhash.xxh3_64_digest(piece) for piece in pieces)
    assert checksum(large) == xxhash.xxh3_64_intdigest(digests)


def test_every_piece_counts_and_so_does_their_order():
    data = random_bytes(3 * PIECE)
    for place in (0, PIECE - 1, PIECE, 3 * PIECE - 1):
        changed = data.copy()
        changed[place] ^= 1
        assert checksum(changed) != checksum(data)
    assert checksum(np.concatenate([data[PIECE:], data[:PIECE]])) != checksum(data)


def test_a_span_beyond_the_end_or_that_the_disk_refuses_says_so(tmp_path, monkeypatch):
    (tmp_path / "shard").write_bytes(bytes(2 * PIECE))
    span = SpanRead(ShardFile(tmp_path / "shard"), PIECE, PIECE + 1)
    read_spans([span])
    assert span.problem(0) == "the shard is truncated"

    def refuse(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    span = SpanRead(ShardFile(tmp_path / "shard"), 0, 10)
    read_spans([span])
    assert span.problem(0) == "Input/output error"


def test_arrays_of_a_sample_are_views_of_its_span_whatever_their_shape():
    latent = np.arange(48, dtype=np.float16).reshape(1, 3, 4, 4)
    contexts = {"ul2": np.ones((2, 3), np.float16), "byt5": np.zeros((0, 4), np.float16)}
    span = np.frombuffer(bytearray(pack_sample("k", latent, contexts, {"caption": "\u00e9"})), np.uint8)
    found, features, facts = unpack_sample(span)
    assert np.array_equal(found, latent) and facts == {"caption": "\u00e9"}
    assert [*features] == ["ul2", "byt5"] and features["byt5"].shape == (0, 4)
    assert np.shares_memory(found, span) and np.shares_memory(features["ul2"], span)
    assert found.flags.writeable, "torch warns of memory that is not"


@pytest.mark.parametrize(
    "look",
    [
        lambda part: part,
        lambda part: part[10:20],
        lambda part: part[10:][:5],
        lambda part: part[:400].view(np.float16).reshape(10, 20)[3],
        lambda part: np.frombuffer(part, np.float16, 10, 4).reshape(2, 5)[1:],
        lambda part: torch.from_numpy(part[:400].view(np.float32)).view(10, 10)[2, 3:],
        lambda part: memoryview(part)[10:20],
    ],
    ids=["itself", "slice", "slice of it", "view", "frombuffer", "tensor", "memoryview"],
)
def test_memory_is_not_used_again_while_anything_looks_into_it(look):
    """Seen to fail when `take` gave out a plain view: numpy lets go of it and keeps the owner alone."""
    nbytes = 3 << 20
    view = look(buffers.take(nbytes))
    taken = [buffers.take(nbytes) for _ in range(3)]
    where = torch.as_tensor(view).data_ptr()
    spans = [(t.ctypes.data, t.ctypes.data + nbytes) for t in taken]
    assert not any(first <= where < last for first, last in spans)


def test_memory_that_nothing_looks_into_is_used_again_and_little_of_it_waits():
    first = buffers.take(5 << 20)
    where = first.ctypes.data
    del first
    again = buffers.take((5 << 20) - 1000)
    assert again.ctypes.data == where
    held = [buffers.take(64 << 20) for _ in range(12)]
    del held
    assert sum(size * len(arrays) for size, arrays in buffers._idle.items()) <= 512 << 20


def test_threads_never_get_the_same_memory():
    found = []

    def work(seed):
        for number in range(200):
            part = buffers.take(300_000)
            part[:] = (seed + number) % 251
            threading.Event().wait(0)
            found.append(bool((part == (seed + number) % 251).all()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(found) == 800 and all(found)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
    )
    with pytest.raises(
        ValueError, match=r"file cannot be written: No space; make room .*the same command again"
    ):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and not part_of(path).exists()
