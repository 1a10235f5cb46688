"""What this rank holds of every parameter: one description for checkpoints, the EMA and resharding.

A parameter of the whole model is cut twice. Tensor ranks hold rectangles of it; data-parallel ranks (with
`layout.sharding`) hold a range of the elements of such a rectangle, read row by row:

    whole [rows, columns]         tensor rank 1          data-parallel rank 0 of 2, flat range [0, 10)
    . . . . | x x x x             x x x x                x x x x
    . . . . | x x x x             x x x x                x x x x
    . . . . | x x x x             x x x x                x x
    . . . . | x x x x             x x x x

So what a rank holds is a handful of rectangles of the whole, whatever the layout, and a checkpoint that
stores them by their place in the whole is read by any other layout without gathering anything.
"""

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from nemo_moviegen.video.model import VideoTransformer
from nemo_moviegen.video.weights import Part, part_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """The elements [start, start + n) of this rank's tensor-parallel part of a parameter, flat."""

    name: str
    """As in `VideoTransformer.named_parameters()`."""
    weight: torch.Tensor
    """[n]: what the optimiser steps, in full precision; a view: writing to it changes the training state."""
    start: int
    part: Part
    holder: int = 0
    """This rank's number among the `holders` ranks that hold the same elements."""
    holders: int = 1
    moments: dict = field(default_factory=dict)
    """Adam's first and second moment, [n] each; empty before the first step."""

    @property
    def replica(self):
        """0 on the one rank that saves it; ranks that hold the same elements take turns by name."""
        return (self.holder - sum(self.name.encode())) % self.holders

    def rectangles(self, flat_n):
        """[(offset in the whole parameter, view of `flat_n` [n] with the rectangle's shape)]."""
        found, used = [], 0
        for row, column, height, width in _rows(self.start, self.start + flat_n.numel(), self.part.shape):
            for first, last, target in self.part.segments:  # rows of the part lie apart in a gated FFN
                top, bottom = max(row, first), min(row + height, last)
                if top >= bottom:
                    continue
                begin = used + (top - row) * width
                view = flat_n[begin : begin + (bottom - top) * width]
                offset = (target + top - first, self.part.first_column + column)
                if len(self.part.shape) == 1:
                    found.append((offset[:1], view))
                else:
                    found.append((offset, view.view(bottom - top, width)))
            used += height * width
        return found


def unwrapped(module) -> VideoTransformer:
    """The transformer inside the wrappers of NeMo, DDP or FSDP."""
    while not isinstance(module, VideoTransformer):
        module = module.module
    return module


def gathers_late(chunk) -> bool:
    """Whether weights travel from where DDP's `chunk` optimises them only when a forward pass asks for them
    (`layout.overlap`): until then a rank has old ones. Megatron FSDP's shards are never old."""
    return chunk.ddp_config.overlap_param_gather and not chunk.ddp_config.use_megatron_fsdp


def whole_shards(model) -> list[Shard]:
    """The weights of a model without an optimiser: each rank holds its tensor-parallel parts whole."""
    shares = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shards = []
    for name, parameter in model.named_parameters():
        part = part_of(name, parameter, model.config)
        shards.append(Shard(name, parameter.detach().view(-1), 0, part, *_holders(part, shares)))
    return shards


def own_shards(model, optimizer) -> list[Shard]:
    """What `optimizer` (megatron's) steps on this rank, with its moments."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    inner = optimizer.optimizer
    replicated = not isinstance(optimizer, DistributedOptimizer)
    shares = parallel_state.get_data_parallel_group(with_context_parallel=True) if replicated else None
    shards = []
    for parameter, main, start, name in _stepped(optimizer):
        local = _local(main)
        if local.numel() == 0:
            continue
        name = name or names[parameter]
        state = inner.state.get(main, {})
        part = part_of(name, parameter, model.config)
        moments = {m: _local(state[m]).view(-1) for m in MOMENTS if m in state}
        shards.append(Shard(name, local.detach().view(-1), start, part, *_holders(part, shares), moments))
    return shards


def init_moments(optimizer):
    """Zero moments where there are none yet, so that a checkpoint can be read into them."""
    optimizer.init_state_fn(optimizer.optimizer)


def _stepped(optimizer):
    """(model parameter, tensor the optimiser steps, its first element in the parameter, name if known)."""
    if isinstance(optimizer, FP32Optimizer):
        for group in optimizer.optimizer.param_groups:
            yield from ((p, p, 0, None) for p in group["params"])
    elif not isinstance(optimizer, DistributedOptimizer):
        for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from ((p, main, 0, None) for p, main in zip(models, mains, strict=True))
        for group in optimizer.fp32_from_fp32_groups:
            yield from ((p, p, 0, None) for p in group)
    elif optimizer.ddp_config.use_megatron_fsdp:
        for chunk in optimizer.model_chunks:
            for name, main in chunk.param_and_grad_buffer.optimizer_named_parameters:
                yield main.orig_param, main, main.megatron_fsdp_slice.start, name.removeprefix("module.")
    else:
        yield from _ranges(
            optimizer, optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups
        )
        yield from _ranges(optimizer, optimizer.model_fp32_groups, optimizer.shard_fp32_groups)


def _ranges(optimizer, model_groups, main_groups):
    for models, mains in zip(model_groups, main_groups, strict=True):
        for parameter, main in zip(models, mains, strict=True):
            yield parameter, main, optimizer._get_model_param_range_map(parameter)["param"].start, None


def _local(tensor):
    """The rows of a Megatron FSDP DTensor that this rank holds; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def _holders(part, shares):
    """(this rank's number among the ranks that hold the same elements, how many they are).

    `shares`: the data-parallel group whose ranks all hold them, or None where its ranks share them out.
    """
    holder, holders = (0, 1) if shares is None else (shares.rank(), shares.size())
    if part.is_cut:
        return holder, holders
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    return holder * tensor_group.size() + tensor_group.rank(), holders * tensor_group.size()


def _rows(start, stop, shape):
    """The flat range [start, stop) of `shape` as at most three (row, column, height, width)."""
    width = shape[1] if len(shape) > 1 else 1
    row, column = divmod(start, width)
    if column:  # the rest of a row
        length = min(width - column, stop - start)
        yield row, column, 1, length
        start += length
    height = (stop - start) // width
    if height > 0:
        yield start // width, 0, height, width
        start += height * width
    if start < stop:
        yield start // width, 0, 1, stop - start
