"""One frozen encoder spread over ranks with torch FSDP2: UL2 in the paper's plan (Movie Gen s3.1.6).

Each rank keeps a slice of the first dimension of every weight and gathers one block at a time. The gathered
weights are those of the file, so the features are bit for bit those of an encoder on one rank.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def shard_over(model, group_or_mesh, device_type="cpu"):
    """A T5 encoder, in place, in slices over the ranks of a process group or of a mesh of one dimension.

    `device_type` (cpu or cuda) says where a group's ranks compute. Afterwards a forward is collective: every
    rank of the group makes the same number of them, see `most_of`. Works on the meta device too, so that no
    rank ever holds the whole: `weights.fill` then reads a rank's own slices.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = group_or_mesh
    if not isinstance(mesh, DeviceMesh):
        mesh = DeviceMesh.from_group(mesh, device_type)
    # the model last: it takes what no block has, the table and a norm
    for part in (*model.encoder.block, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


def held_rows(parameter):
    """(first, one past the last) row of a parameter that this rank holds: all of it where it is whole."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter)
    mesh = parameter.device_mesh
    chunk = -(-len(parameter) // mesh.size())  # as torch.chunk: the last ranks may get fewer rows, or none
    first = min(mesh.get_local_rank() * chunk, len(parameter))
    return first, min(first + chunk, len(parameter))


def local(parameter):
    """What this rank holds of a parameter, as a plain tensor that shares its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def most_of(number, group_or_mesh, device):
    """The largest `number` any rank of the group has: how many forwards all of them make."""
    group = group_or_mesh.get_group() if isinstance(group_or_mesh, DeviceMesh) else group_or_mesh
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)
