"""Tensors of all ranks in one folder, and back: megatron's `torch_dist` format, written in the background.

Each rank writes the rectangles it holds into one file; `.metadata` says where each lies in its whole tensor,
so any other set of ranks can read what it needs. Megatron's own tools read these folders too
(`dist_checkpointing.load_plain_tensors`). Here nothing is unpickled but plain tables of tensors: a checkpoint
from a stranger can not run code.
"""

import json
import pickle
import shutil
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

METADATA = ".metadata"
SAFE_NAMES = {
    "builtins": {"set"},
    "collections": {"OrderedDict", "defaultdict"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
    "torch": {"Size", "device"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole tensor, as this rank holds it."""

    offset: tuple
    whole_shape: tuple
    data: torch.Tensor


def write_folder(folder, pieces, group=None, make=None):
    """Write `pieces` ({name: [Piece]}) of all ranks of `group` into one empty folder; each element once.

    Called on every rank; returns when all have written. RuntimeError on every rank where one could not.
    With `make` the pieces are whole tensors on the meta device, and `make(name)` returns each when its turn
    comes: it is written to a file of its own and forgotten before the next.
    """
    folder = Path(folder)
    # torch keeps every tensor of a file until the file is written
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=make is None, sync_files=True)
    planner = _Planner(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its own deprecated names
        try:
            dcp.save(
                _state_dict(pieces),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not torch.distributed.is_initialized(),
            )
        except (dcp.CheckpointException, OSError) as error:
            raise RuntimeError(f"{folder} could not be written: {_cause(error)}") from None
    if not torch.distributed.is_initialized() or torch.distributed.get_rank(group) == 0:
        torch.save({}, folder / "common.pt")  # megatron's reader wants both; ours reads neither
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def read_into(folder, pieces):
    """Fill the data of `pieces` ({name: [Piece]}) from a folder that any number of ranks wrote.

    Each rank reads alone. ValueError where a tensor is missing, has another shape, or its file is damaged.
    """
    shapes = tensor_shapes(folder)
    wrong = [
        f"{name} {shapes.get(name, 'is missing')} instead of {parts[0].whole_shape}"
        for name, parts in pieces.items()
        if shapes.get(name) != parts[0].whole_shape
    ]
    if wrong:
        raise ValueError(
            f"{folder} holds another model: {'; '.join(wrong[:5])} ({len(wrong)} tensors differ)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(
                _state_dict(pieces),
                storage_reader=SafeReader(folder),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
        except (dcp.CheckpointException, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder} is damaged: {_cause(error)}") from None


def read_whole(folder, names):
    """{name: whole tensor} of some tensors of a folder, on this rank alone; ValueError as `read_into`."""
    stored, whole = meta_tensors(folder), {}
    for name in names:
        if name not in stored:
            raise ValueError(f"{folder} holds no tensor {name}")
        whole[name] = torch.empty_like(stored[name], device="cpu")
    read_into(folder, {n: [Piece((0,) * t.dim(), tuple(t.shape), t)] for n, t in whole.items()})
    return whole


def meta_tensors(folder) -> dict:
    """{name: whole tensor on the meta device} of a folder; ValueError where its table can not be read."""
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in _metadata(folder).state_dict_metadata.items()
    }


def tensor_shapes(folder) -> dict:
    """{name: shape} of the whole tensors in a folder; ValueError where its table can not be read."""
    return {name: tuple(entry.size) for name, entry in _metadata(folder).state_dict_metadata.items()}


def check_files(folder):
    """ValueError naming the first file of a folder that is missing or cut short."""
    ends = {}
    for place in _metadata(folder).storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in sorted(ends.items()):
        file = Path(folder, name)
        if not file.is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing")
        if file.stat().st_size < end:
            raise ValueError(
                f"{folder} is damaged: {name} has {file.stat().st_size:,} bytes, it needs {end:,}"
            )


class _Planner(MCoreSavePlanner):
    """Megatron's, which takes the tensors to write from `make` where there is one."""

    def __init__(self, make):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.make = make

    def resolve_data(self, write_item):
        return self.make(write_item.index.fqn) if self.make else super().resolve_data(write_item)


class SafeReader(dcp.FileSystemReader):
    """torch's reader, which unpickles `.metadata` as it comes; this one allows tables of tensors only."""

    def read_metadata(self, *_, **__):
        metadata = _metadata(self.path)
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class BackgroundWriter:
    """Writes one folder at a time in a thread, from a copy of the tensors, over gloo groups of its own."""

    def __init__(self):
        on_gpu = torch.distributed.get_backend() == "nccl"  # whose groups carry no host tensors
        self.group = torch.distributed.new_group(backend="gloo" if on_gpu else None)
        self.thread, self.error, self.buffers = None, None, {}

    def copy(self, tensors):
        """Host copies of `tensors` ({name: tensor}) that stay as they are while training goes on."""
        self.wait()
        for name, tensor in tensors.items():
            if name not in self.buffers:
                pinned = tensor.is_cuda
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self.buffers[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.buffers

    def start(self, write):
        """Run `write(group)` in the thread, once what was started before has ended."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, write):
        try:
            write(self.group)
        except BaseException as error:
            self.error = error

    def poll(self):
        """Raise what the thread has failed with, if it has."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self):
        """Return once the thread has ended; raises what it failed with."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.poll()


def check_space(folder, num_bytes):
    """RuntimeError where the disk of `folder` can not hold `num_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RuntimeError(
            f"{folder} needs {num_bytes / 1e9:.1f} GB for a checkpoint and its disk has {free / 1e9:.1f} GB: "
            "free some, or keep fewer (keep_last, keep_every)"
        )


def write_json(path, values):
    Path(path).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _state_dict(pieces):
    """What torch's checkpoint wants, through megatron's sharded tensors. They share the pieces' memory."""
    tensors = {}
    for name, parts in pieces.items():
        cut = [CheckpointableShardedTensor.from_sh_ten(_sharded(name, piece)) for piece in parts]
        tensors[name] = cut[0] if len(cut) == 1 else LocalShardsContainer(cut)
    return tensors


def _sharded(name, piece):
    return ShardedTensor(
        key=name,
        data=piece.data.detach(),
        dtype=piece.data.dtype,
        local_shape=tuple(piece.data.shape),
        global_shape=piece.whole_shape,
        global_offset=piece.offset,
        axis_fragmentations=None,  # rectangles of any size, no grid
    )


class _TableReader(pickle.Unpickler):
    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in SAFE_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no table of tensors needs")


def _metadata(folder):
    path = Path(folder, METADATA)
    try:
        with path.open("rb") as file:
            return _TableReader(file).load()
    except FileNotFoundError:
        raise ValueError(f"{folder} is incomplete: {METADATA} is missing") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} can not be read: {error}") from None


def _cause(error):
    """The first rank's own words out of torch's exception over all ranks."""
    for _, failure in sorted(getattr(error, "failures", {}).items()):
        inner = failure[0] if isinstance(failure, tuple) else failure
        return f"{type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"
