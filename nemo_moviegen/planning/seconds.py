"""Seconds of work and of collectives on given hardware."""

import math
from dataclasses import dataclass

from nemo_moviegen.planning import hardware
from nemo_moviegen.planning.hardware import at


@dataclass(frozen=True, kw_only=True)
class Link:
    """A group of ranks that talk: how many, and GB/s that one of them sends at."""

    ranks: int
    gbyte_s: float
    """In collectives, which use the network cards of all ranks of a node."""
    hop_gbyte_s: float
    """From one rank to another at the slowest place: over nodes its own card."""
    far: float = 0.0
    """Share of the group that is in other nodes than this rank."""

    def gather(self, num_bytes) -> float:
        """Seconds to collect `num_bytes` of which each rank holds a part, or to sum and scatter as many."""
        return self._moved(num_bytes * (1 - 1 / self.ranks), self.gbyte_s)

    def all_reduce(self, num_bytes) -> float:
        """Seconds to sum `num_bytes` for all."""
        return 2 * self.gather(num_bytes)

    def ring(self, num_bytes) -> float:
        """Seconds to pass `num_bytes` round, of which each rank holds a part, neighbour to neighbour."""
        return self._moved(num_bytes * (1 - 1 / self.ranks), self.hop_gbyte_s)

    def exchange(self, num_bytes) -> float:
        """Seconds to change `num_bytes` of this rank with all others (all-to-all)."""
        near = num_bytes * (1 - 1 / self.ranks - self.far) / self.gbyte_s
        return self._moved(max(num_bytes * self.far / self.hop_gbyte_s, near), 1.0)

    def _moved(self, num_bytes, gbyte_s):
        if self.ranks == 1 or not num_bytes:
            return 0.0
        return hardware.LATENCY_SECONDS + num_bytes / (gbyte_s * 1e9)


def link(cluster, ranks, inner) -> Link:
    """The link of a group of `ranks` whose neighbours are `inner` ranks apart: NVLink within a node. A
    bandwidth the cluster does not name takes no time."""
    in_node = max(1, cluster.ranks_per_node // inner)
    nvlink = cluster.node_gbyte_s * hardware.LINK_SHARE or math.inf
    if ranks <= in_node:
        return Link(ranks=ranks, gbyte_s=nvlink, hop_gbyte_s=nvlink)
    card = cluster.network_gbit_s / 8 * hardware.NETWORK_SHARE or math.inf
    return Link(
        ranks=ranks,
        gbyte_s=min(nvlink, in_node * card),
        hop_gbyte_s=min(nvlink, card),
        far=1 - in_node / ranks,
    )


def product_seconds(product, gpu, fp8_share=0.0) -> float:
    """Of one product of a forward pass, the mean of layers of which that share is in FP8."""
    share = at(gpu.gemm, min(product.columns, product.depth)) * hardware.SUSTAINED
    in_bf16 = product.flops / (gpu.bf16_peak * share * 1e12)
    in_fp8 = product.flops / (gpu.fp8_peak * hardware.FP8_SHARE * share * 1e12)
    return fp8_share * in_fp8 + (1 - fp8_share) * in_bf16


def attention_seconds(attention, gpu, backward=False, curves=None) -> float:
    """Of one attention, forward or backward; heads narrower than 128 run in proportion."""
    curve = (curves or (gpu.attention_forward, gpu.attention_backward))[backward]
    rate = at(curve, max(1, attention.keys)) * hardware.SUSTAINED * min(1.0, attention.head_width / 128)
    return attention.flops * (2.5 if backward else 1.0) / (rate * 1e12)


def memory_seconds(num_bytes, gpu) -> float:
    """Of element-wise kernels that move so many bytes."""
    return num_bytes / (gpu.memory_peak * hardware.MEMORY_SHARE * 1e9)


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """One layer, one micro-batch; `*_again` is recomputation."""

    products: float
    attention: float
    memory: float
    again: float
    tensor: float
    """Collectives of tensor ranks that nothing hides, likewise the next two."""
    context: float
    sharding: float
    contention: float
    host: float
    """What the host needs beyond what the GPU does."""

    @property
    def total(self) -> float:
        """Of all of them."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def layer_seconds(work, gpu, links, settings) -> LayerSeconds:
    """Forward and backward pass of a `LayerWork`; `links` has those of tensor, context and state ranks."""
    products = [product_seconds(p, gpu, settings.fp8_share) for p in work.products]
    forward = [attention_seconds(a, gpu, False, settings.attention) for a in work.attentions]
    backward = [attention_seconds(a, gpu, True, settings.attention) for a in work.attentions]
    feed_forward = sum(s for s, p in zip(products, work.products, strict=True) if p.name in work.feed_forward)
    memory_forward = memory_seconds(work.forward_bytes, gpu)
    compute_forward = sum(products) + sum(forward) + memory_forward
    again = {
        "none": 0.0,
        "selective": feed_forward + memory_seconds(work.feed_forward_bytes, gpu),
        "full": compute_forward,
    }[settings.recompute] * settings.recomputed_share
    compute = 3 * sum(products) + sum(forward) + sum(backward)
    memory = memory_forward + memory_seconds(work.backward_bytes, gpu)
    tensor, tensor_hidden = _tensor(work, links.tensor, settings)
    context, context_hidden = _context(work, links.context, sum(forward), sum(backward), settings)
    under = compute + memory + again
    sharding, sharding_hidden = _sharding(work, links.state, under, settings)
    kernels = hardware.KERNELS_PER_LAYER * (4 if settings.recompute == "full" else 3)
    return LayerSeconds(
        products=3 * sum(products),
        attention=sum(forward) + sum(backward),
        memory=memory,
        again=again,
        tensor=tensor,
        context=context,
        sharding=sharding,
        contention=hardware.CONTENTION * (tensor_hidden + context_hidden + sharding_hidden),
        host=max(0.0, kernels * hardware.LAUNCH_SECONDS - under),
    )


def _tensor(work, link, settings):
    """(exposed, hidden) seconds. Megatron hides behind the products of the backward pass what a column-cut
    linear collects and scatters; the rest waits."""
    each = link.gather(work.gathered_bytes)
    again = work.gathers * 2 * each * settings.recomputed_share * (settings.recompute == "full")
    again += 2 * each * (settings.recompute == "selective")
    alone = work.gathers_alone * (2 + settings.recomputed_share * (settings.recompute == "full")) * each
    forward, waits, hides = 2 * work.gathers * each, work.gathers * each + alone, 2 * work.gathers * each
    if settings.tensor_overlap:
        return 0.25 * (forward + again + waits), 0.75 * (forward + again + waits) + hides
    if not settings.backward_overlap:
        return forward + again + waits + hides, 0.0
    return forward + again + waits, hides


def _context(work, link, forward, backward, settings):
    """(exposed, hidden) seconds of keys and values and of their gradients."""
    if link.ranks == 1:
        return 0.0, 0.0
    again = settings.gathers_again  # forward, and again for the backward pass; then their gradients
    if settings.context_comm == "a2a":  # queries, keys, values and outputs change ranks, and their gradients
        return 2 * link.exchange(2 * work.key_bytes / link.ranks), 0.0
    if settings.context_comm == "all_gather":
        return (2 + again) * link.gather(work.key_bytes), 0.0
    each = link.ring(work.key_bytes)
    behind = (2 + again) * each  # a turn's attention hides the next turn's keys
    return max(0.0, behind - forward - backward), behind


def _sharding(work, link, under, settings):
    """(exposed, hidden) seconds of Megatron FSDP: weights gathered twice, gradients scattered."""
    if not settings.is_full or link.ranks == 1:
        return 0.0, 0.0
    gathers = 2 * link.gather(work.parameters * settings.weight_bytes)
    scatter = link.gather(work.parameters * settings.gradient_bytes)
    if not settings.state_overlap:
        return gathers + scatter, 0.0
    return max(0.0, gathers + scatter - under), gathers + scatter
