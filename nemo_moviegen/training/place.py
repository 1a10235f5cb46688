"""Where a rank stands that samples: copies of the model share prompts, the ranks of a copy its work."""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_moviegen.layout import Layout


@dataclass(frozen=True)
class Place:
    """Where this rank stands."""

    layout: Layout
    rank: int
    copy: int
    """Which copy of the model it is part of, and how many there are."""
    num_copies: int
    is_first_of_copy: bool
    """Whether it writes for its copy."""
    group: object
    """Process group of its copy; None where the copy is this rank alone."""
    source: int
    """Rank of the first of its copy."""

    def share(self, make):
        """What `make()` returns on the first rank of the copy, on all of them."""
        if self.group is None:
            return make()
        made = [None, ""]
        if self.is_first_of_copy:
            try:
                made = [make(), ""]
            except ValueError as error:  # the others wait: they hear of it
                made = [None, str(error)]
        dist.broadcast_object_list(made, src=self.source, group=self.group)
        if made[1]:
            raise ValueError(made[1])
        return made[0]

    def of_first(self, value):
        """The value that the first of all ranks has, on every rank."""
        return self.together(value)[0]

    def together(self, value):
        """The values of all ranks in their order, on every rank."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def joined_world():
    """Join the ranks torchrun started, where this process is one and has not yet; yields whether it did."""
    starts = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if starts:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # ranks that share out samples meet once, at the end, where the others wait for the slowest
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=2))
    try:
        yield starts
    finally:
        if starts:
            dist.destroy_process_group()


@contextlib.contextmanager
def joined(layout):
    """The `Place` of this rank in `layout`; joins the ranks torchrun started, or is a world of one.

    ValueError where the ranks do not split into copies of that layout.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    layout.data_parallel(num_ranks)
    with joined_world() as starts:
        try:
            yield _place(layout)
        finally:
            if starts:
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()


def _place(layout):
    from nemo_moviegen.training.checkpoint import join_process_groups
    from nemo_moviegen.training.cpu import stand_in_for_cuda
    from nemo_moviegen.training.record import quiet

    quiet()
    stand_in_for_cuda()
    from megatron.core import parallel_state

    join_process_groups(layout)
    inner = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    group = parallel_state.get_tensor_and_context_parallel_group() if layout.model_ranks > 1 else None
    return Place(
        layout=layout,
        rank=dist.get_rank(),
        copy=parallel_state.get_data_parallel_rank(),
        num_copies=parallel_state.get_data_parallel_world_size(),
        is_first_of_copy=inner == (0, 0),
        group=group,
        source=dist.get_process_group_ranks(group)[0] if group else dist.get_rank(),
    )
