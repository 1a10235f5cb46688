"""Tensors of all ranks in one folder: any rectangles in, any out; nothing unpickled but tables of tensors."""

import os
import pickle
import resource

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nemo_moviegen.training.cpu import stand_in_for_cuda

stand_in_for_cuda()

from megatron.core import dist_checkpointing  # noqa: E402, after the stand-in

from nemo_moviegen.training.shards import Shard  # noqa: E402
from nemo_moviegen.training.storage import (  # noqa: E402
    BackgroundWriter,
    Piece,
    check_files,
    check_space,
    read_into,
    read_whole,
    write_folder,
)
from nemo_moviegen.video.weights import Part  # noqa: E402

WHOLE = torch.arange(40.0).view(10, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two ranks write WHOLE in four rectangles of different size, in the background."""
    path = tmp_path_factory.mktemp("written")
    run_on_ranks(_write_in_background, path, world_size=2)
    return path


def _write_in_background(path):
    mine = [[((0, 0), (3, 4)), ((3, 0), (1, 2))], [((3, 2), (1, 2)), ((4, 0), (6, 4))]][dist.get_rank()]
    tensors = {f"{row} {column}": WHOLE[row : row + h, column : column + w] for (row, column), (h, w) in mine}
    writer = BackgroundWriter()
    copies = writer.copy(tensors)
    for tensor in tensors.values():
        tensor.zero_()  # training goes on: what is written is the copy
    parts = [Piece(tuple(map(int, place.split())), (10, 4), copies[place]) for place in tensors]
    writer.start(lambda group: write_folder(path, {"a": parts}, group))
    writer.wait()


@settings(deadline=None)  # each example reads files
@given(st.integers(0, 9), st.integers(0, 3), st.data())
def test_any_rectangle_reads_back_whatever_ranks_wrote(folder, row, column, data):
    height, width = data.draw(st.integers(1, 10 - row)), data.draw(st.integers(1, 4 - column))
    out = torch.zeros(height, width)
    read_into(folder, {"a": [Piece((row, column), (10, 4), out)]})
    assert torch.equal(out, torch.arange(40.0).view(10, 4)[row : row + height, column : column + width])


def test_megatrons_own_reader_reads_the_folder(folder):
    (loaded,) = run_on_ranks(dist_checkpointing.load_plain_tensors, str(folder), world_size=1)
    assert torch.equal(loaded["a"], torch.arange(40.0).view(10, 4))
    assert torch.equal(read_whole(folder, ["a"])["a"], loaded["a"])


def test_another_shape_and_a_missing_tensor_are_named(folder):
    with pytest.raises(ValueError, match=r"a \(10, 4\) instead of \(10, 5\).*b is missing.*2 tensors differ"):
        read_into(
            folder,
            {
                "a": [Piece((0, 0), (10, 5), torch.zeros(10, 5))],
                "b": [Piece((0,), (2,), torch.zeros(2))],
            },
        )
    with pytest.raises(ValueError, match="holds no tensor b"):
        read_whole(folder, ["b"])


@pytest.mark.parametrize("called", [os.system, eval, pickle.loads])
def test_a_table_that_would_run_code_is_refused_before_it_runs(tmp_path, called):
    class Attack:
        def __reduce__(self):
            return called, ("touch harmed",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="which no table of tensors needs"):
        check_files(tmp_path)
    # a dotted name would reach the modules that an allowed module imports
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem"
        b"\x8c\x09os.system\x93\x8c\x0ctouch harmed\x85R."
    )
    with pytest.raises(ValueError, match="which no table of tensors needs"):
        read_whole(tmp_path, ["a"])
    assert not os.path.exists("harmed")


def test_a_full_disk_is_one_clear_error_on_every_rank(tmp_path):
    for said in run_on_ranks(_write_more_than_the_disk_takes, tmp_path / "full", world_size=2):
        assert "could not be written" in said and "File too large" in said
    with pytest.raises(RuntimeError, match=r"needs 1000000000\.0 GB for a checkpoint and its disk has"):
        check_space(tmp_path, 1e18)


def _write_more_than_the_disk_takes(path):
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    data = torch.zeros(1000)
    with pytest.raises(RuntimeError) as caught:
        write_folder(path, {"a": [Piece((1000 * dist.get_rank(),), (2000,), data)]})
    return str(caught.value)


def test_rectangles_that_overlap_or_leave_a_hole_are_refused(tmp_path):
    run_on_ranks(_write_badly, tmp_path / "overlap", 2, 6, world_size=2)
    run_on_ranks(_write_badly, tmp_path / "hole", 5, 9, world_size=2)


def _write_badly(path, second, size):
    piece = Piece((second * dist.get_rank(),), (size,), torch.zeros(4))
    with pytest.raises(RuntimeError, match="could not be written"):
        write_folder(path, {"a": [piece]})


@given(
    st.integers(1, 7),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["row", "column", "gated", "whole"]),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_the_rectangles_of_all_ranks_tile_the_parameter_in_any_cut(rows, columns, ranks, cut, copies, random):
    """Every element of the whole lies in exactly one rank's rectangle, with its own value."""
    rows *= 2  # a gated layer has two halves
    whole = _whole_of(cut, rows, columns, ranks)
    seen = torch.full(whole.shape, -1.0)
    for rank in range(ranks if cut != "whole" else 1):
        part, local = _part_of(cut, whole, rank, ranks, rows, columns)
        cuts = sorted(random.choices(range(local.numel() + 1), k=copies - 1))
        for start, stop in zip([0, *cuts], [*cuts, local.numel()], strict=True):
            shard = Shard("x", local.reshape(-1)[start:stop], start, part)
            for (row, column), view in shard.rectangles(shard.weight):
                target = seen[row : row + view.shape[0], column : column + view.shape[1]]
                assert (target == -1).all()
                target.copy_(view)
    assert torch.equal(seen, whole)


def _whole_of(cut, rows, columns, ranks):
    shape = {
        "row": (rows * ranks, columns),
        "gated": (rows * ranks, columns),
        "column": (rows, columns * ranks),
    }
    shape = shape.get(cut, (rows, columns))
    return torch.arange(float(shape[0] * shape[1])).view(shape)


def _part_of(cut, whole, rank, ranks, rows, columns):
    """(Part, local tensor) written out here as megatron's linears cut them."""
    if cut == "row":
        local, segments, column = whole[rank * rows : (rank + 1) * rows], ((0, rows, rank * rows),), 0
    elif cut == "column":
        local, segments, column = (
            whole[:, rank * columns : (rank + 1) * columns],
            ((0, rows, 0),),
            rank * columns,
        )
    elif cut == "gated":
        half = rows // 2
        gates, ups = whole.chunk(2)
        local = torch.cat((gates[rank * half : (rank + 1) * half], ups[rank * half : (rank + 1) * half]))
        segments, column = ((0, half, rank * half), (half, rows, (ranks + rank) * half)), 0
    else:
        local, segments, column = whole, ((0, rows, 0),), 0
    return Part(tuple(local.shape), tuple(whole.shape), segments, column), local


def test_each_replicated_parameter_is_saved_by_one_rank_and_they_take_turns():
    savers = set()
    for name in ("a", "b", "c", "d"):
        found = [
            rank
            for rank in range(4)
            if Shard(name, torch.zeros(1), 0, None, holder=rank, holders=4).replica == 0
        ]
        assert len(found) == 1
        savers.update(found)
    assert savers == {0, 1, 2, 3}
