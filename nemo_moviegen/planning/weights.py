"""Which rank holds how many of a model's parameters, exactly: tensor pieces, copies, shards."""

from functools import lru_cache

from nemo_moviegen.flops import parameters

CUT_BY_TENSOR = (
    "self_attention_projections",
    "cross_attention_queries",
    "cross_attention_keys_values",
    "ffn",
)
"""Components whose matrices tensor ranks share; each of those ranks has all of the others."""


def held_by_tensor_rank(size, tensor) -> dict[str, int]:
    """Parameters of each component that one tensor rank computes with, before data-parallel ranks share."""
    counts = _parameters(size)
    return {name: n // tensor if name in CUT_BY_TENSOR else n for name, n in counts.items()}


@lru_cache(maxsize=16)
def _parameters(size):
    return parameters(size)


def in_layers(size, tensor) -> int:
    """Of them, those inside one layer: what Megatron FSDP gathers at once."""
    counts = held_by_tensor_rank(size, tensor)
    norms = counts["norms"] - size.width  # the last one is the model's
    layers = norms + size.num_layers * 6 * size.width + sum(counts[name] for name in CUT_BY_TENSOR)
    return layers // size.num_layers


def kept_by_rank(size, layout, num_ranks, rank) -> dict[str, int]:
    """Parameters of each component that `rank` keeps between steps.

    With `layout.sharding` full the data- and context-parallel ranks of a tensor rank keep equal pieces, the
    first ones one number more where they do not divide. Else each keeps its tensor rank's. Summed over all
    ranks, every parameter is counted `copies_of` times: `tests/test_planning_weights.py`.
    """
    held = held_by_tensor_rank(size, layout.tensor)
    if layout.sharding != "full":
        return held
    pieces, index = num_ranks // layout.tensor, rank // layout.tensor
    return {name: n // pieces + (index < n % pieces) for name, n in held.items()}


def copies_of(component, layout, num_ranks) -> int:
    """Ranks that keep each parameter of a component."""
    tensor = 1 if component in CUT_BY_TENSOR else layout.tensor
    return tensor if layout.sharding == "full" else tensor * (num_ranks // layout.tensor)
