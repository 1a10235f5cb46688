"""Fresh weights, and which part of a parameter a tensor-parallel rank holds.

Each parameter is drawn whole from a generator of its own, keyed by (seed, name), and cut afterwards: the
model at step 0 is a function of the seed, not of the layout. Left to themselves, megatron's linears give a
gated feed-forward cut over two ranks other gates than one rank has, and Transformer Engine's draw by rank.
"""

import hashlib
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)


@dataclass(frozen=True)
class Part:
    """The rectangle of a whole parameter that this rank's tensor-parallel part is."""

    shape: tuple
    whole_shape: tuple
    segments: tuple
    """((first row, last row + 1, row in the whole), ...) of the part."""
    first_column: int = 0
    is_cut: bool = False
    """Whether tensor ranks hold different parts; else each holds the whole."""

    def of(self, whole):
        """This rank's part of a whole tensor."""
        rows = [whole[target : target + last - first] for first, last, target in self.segments]
        part = rows[0] if len(rows) == 1 else torch.cat(rows)
        return part if part.dim() == 1 else part[:, self.first_column : self.first_column + self.shape[1]]


def part_of(name, parameter, config) -> Part:
    """`name` as in `VideoTransformer.named_parameters()`; shape and megatron's marks decide."""
    shape = tuple(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return Part(shape, shape, ((0, shape[0], 0),))
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = group.size(), group.rank()
    if parameter.partition_dim == 1:
        return Part(shape, (shape[0], shape[1] * ranks), ((0, shape[0], 0),), rank * shape[1], True)
    whole_shape = (shape[0] * ranks, *shape[1:])
    if name.endswith("linear_fc1.weight") and config.gated_linear_unit:
        half = shape[0] // 2  # [gates; values] on each rank, all gates before all values in the whole
        segments = ((0, half, rank * half), (half, 2 * half, (ranks + rank) * half))
        return Part(shape, whole_shape, segments, 0, True)
    return Part(shape, whole_shape, ((0, shape[0], rank * shape[0]),), 0, True)


def fresh_weight(name, whole_shape, config, seed):
    """A whole parameter at step 0, fp32, on the GPU if there is one.

    Zero: modulation (gates are closed, adaLN-Zero), head (the first velocity is 0) and biases of linears.
    One: norms. Normal: the rest; linears that write to the residual with a deviation smaller by
    sqrt(2 * layers), as megatron's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deviation = _deviation(name, config)
    if deviation is None:
        return torch.full(whole_shape, float(name.endswith("weight")), device=device)
    if not deviation:
        return torch.zeros(whole_shape, device=device)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(whole_shape, generator=generator, device=device) * deviation


def mark_cut_weights(model):
    """Megatron's marks on the weights of its own linears, which set them with their own draw only."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


@torch.no_grad()
def draw_weights(model, seed):
    """Fill all parameters of a `VideoTransformer`, whatever holds them; on the meta device there are none."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            part = part_of(name, parameter, model.config)
            parameter.copy_(part.of(fresh_weight(name, part.whole_shape, model.config, seed)))


def _deviation(name, config):
    """Standard deviation of a parameter's normal, 0 for zeros, None for a norm."""
    size = config.size
    if "norm" in name:
        return None
    if "modulation" in name or name.startswith("head.") or name.endswith(".bias"):
        return 0.0
    if name.startswith("positions."):
        return 0.02
    if name.startswith("patch_embedding."):
        return size.input_patch_width**-0.5
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / (2 * size.num_layers) ** 0.5
    return config.init_method_std
