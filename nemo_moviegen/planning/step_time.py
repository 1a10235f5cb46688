"""Seconds of a training step, split by what takes them, and what follows: MFU, HFU, tokens a second."""

from dataclasses import dataclass, fields

from nemo_moviegen.planning import hardware
from nemo_moviegen.planning.seconds import (
    LayerSeconds,
    Link,
    layer_seconds,
    memory_seconds,
    product_seconds,
)
from nemo_moviegen.planning.work import OPTIMIZER_BYTES, LayerWork, Product


@dataclass(frozen=True, kw_only=True)
class Links:
    """Of the groups of one rank."""

    tensor: Link
    context: Link
    state: Link
    """Data- and context-parallel ranks of one tensor rank: they share weights, gradients, optimiser."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a training stack does what a `LayerWork` says: facts of the stack, no assumptions."""

    recompute: str = "none"
    recomputed_share: float = 1.0
    """Of the layers."""
    context_comm: str = "all_gather"
    """all_gather, a2a or p2p."""
    gathers_again: bool = True
    """Whether keys and values are collected again for the backward pass."""
    tensor_overlap: bool = False
    """Userbuffers: collectives of tensor ranks in pieces behind the products."""
    backward_overlap: bool = True
    """Of a column-cut linear's collectives behind its two products."""
    is_full: bool = False
    """Weights and gradients are shared out (FSDP)."""
    state_overlap: bool = True
    """Whether the collectives of data-parallel ranks hide behind computation."""
    weight_bytes: int = 2
    gradient_bytes: int = 4
    fp8_share: float = 0.0
    """Of the layers whose products are FP8."""
    attention: tuple | None = None
    """(forward, backward) curves of another attention kernel than the GPU's best."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one optimiser step on the slowest rank, by part."""

    layers: LayerSeconds
    """Of all layers and micro-batches."""
    ends: float
    """Patches, positions, text projections, head, loss."""
    bubble: float
    """Pipeline ranks without work; published runs only."""
    data_parallel: float
    """Gradients and weights that travel when no kernel is left to hide behind."""
    tensor_gradients: float
    """Sums of gradients of parameters that every tensor rank has."""
    optimizer: float
    overhead: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        rest = sum(getattr(self, field.name) for field in fields(self) if field.name != "layers")
        return self.layers.total + rest

    def parts(self) -> dict[str, float]:
        """Seconds by name, the layers' and the others; they sum to `seconds`."""
        layers = {field.name: getattr(self.layers, field.name) for field in fields(self.layers)}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return layers | rest


def step_of(
    work: LayerWork,
    *,
    gpu,
    links,
    settings,
    num_layers,
    num_microbatches,
    held,
    replicated,
    ends_flops,
    pieces,
    pipeline=1,
) -> Step:
    """A step of `num_microbatches` micro-batches through `num_layers` layers of this rank.

    `held` are the parameters of this tensor rank (and pipeline stage), `replicated` those of them that every
    tensor rank has, `pieces` into how many the optimiser's states are cut. `ends_flops` is the forward pass
    around the layers, a micro-batch.
    """
    one = layer_seconds(work, gpu, links, settings)
    count = num_layers * num_microbatches
    layers = LayerSeconds(**{f.name: getattr(one, f.name) * count for f in fields(one)})
    ends = 3 * num_microbatches * _ends_seconds(ends_flops, gpu)
    busy = layers.total + ends
    return Step(
        layers=layers,
        ends=ends,
        bubble=busy * (pipeline - 1) / num_microbatches,
        data_parallel=_data_parallel(held, links.state, settings, busy / num_microbatches),
        tensor_gradients=links.tensor.all_reduce(replicated * settings.gradient_bytes / pieces)
        if settings.is_full
        else links.tensor.all_reduce(replicated * settings.gradient_bytes),
        optimizer=memory_seconds(held / pieces * OPTIMIZER_BYTES, gpu),
        overhead=hardware.STEP_SECONDS,
    )


def _ends_seconds(flops, gpu):
    side = (flops / 2) ** (1 / 3) if flops else 1.0
    product = Product(name="ends", rows=side, columns=256, depth=flops / 2 / side / 256 if flops else 0.0)
    return product_seconds(product, gpu) if flops else 0.0


def _data_parallel(held, link, settings, microbatch):
    """Exposed seconds of what data-parallel ranks exchange once a step, where FSDP does not do it by layer.

    Overlapped, gradients travel behind the backward pass of the last micro-batch and weights behind the
    forward pass of the first, all but an eighth.
    """
    if settings.is_full or link.ranks == 1:
        return 0.0
    scatter = link.gather(held * settings.gradient_bytes)
    gather = link.gather(held * settings.weight_bytes)
    if not settings.state_overlap:
        return scatter + gather
    backward, forward = microbatch * 2 / 3, microbatch / 3
    return sum(max(moved / 8, moved - behind) for moved, behind in ((scatter, backward), (gather, forward)))
