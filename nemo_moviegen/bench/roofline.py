"""The least time each part of a rank's step can take: its FLOPs at the peak, or its bytes at the
bandwidth."""

import time
from dataclasses import dataclass, replace

import torch

from nemo_moviegen.flops import forward_flops
from nemo_moviegen.planning.hardware import GPUS
from nemo_moviegen.planning.weights import held_by_tensor_rank, in_layers
from nemo_moviegen.planning.work import OPTIMIZER_BYTES, layer_work
from nemo_moviegen.precision import is_fp8

_WHOLE = ("time_embedding", "context_projections", "modulation")  # every rank of a copy computes them
_CUT = ("patch_embedding", "head")


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What one rank's device can do at most."""

    name: str
    tflops: float
    """Of matrix products in the recipe's precision; in FP8, of those that are in bf16 there."""
    fp8_tflops: float = 0.0
    """Of the layers' linears where they are in FP8; else 0."""
    gbyte_s: float
    is_published: bool
    """From a data sheet; else measured here, and no MFU can be taken to it."""

    def of(self, component) -> "Ceiling":
        """The ceiling of one component of components.py."""
        return replace(self, tflops=self.fp8_tflops) if self.fp8_tflops and component == "linear" else self

    @property
    def fastest(self) -> float:
        """TFLOP/s of the fastest products, in those of `tflops`."""
        return max(1.0, self.fp8_tflops / self.tflops)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one component, one rank, one step, recomputation included."""

    flops: float
    bytes_: float

    def bound(self, ceiling) -> float:
        """Seconds it takes at least."""
        return max(self._seconds(ceiling).values())

    def bound_by(self, ceiling) -> str:
        """FLOPs or bytes: which of them takes so long."""
        seconds = self._seconds(ceiling)
        return max(seconds, key=seconds.get)

    def _seconds(self, ceiling):
        return {
            "FLOPs": self.flops / (ceiling.tflops * 1e12),
            "bytes": self.bytes_ / (ceiling.gbyte_s * 1e9),
        }


def ceiling_here(precision) -> Ceiling:
    """Of this process's GPU, if `planning/hardware.py` knows it; else the best of some products and copies.

    `precision` is one of precision.py, bf16 where FP8 is emulated.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((gpu for gpu in GPUS.values() if gpu.name in name.lower()), None)
        if known is not None:
            fp8 = known.fp8_peak if is_fp8(precision) else 0.0
            peaks = {"tflops": known.bf16_peak, "fp8_tflops": fp8, "gbyte_s": known.memory_peak}
            return Ceiling(name=name, is_published=True, **peaks)
    else:
        from nemo_moviegen.bench.measure import environment

        name = environment()["processor"]
    tflops, gbyte_s = _measured(precision)
    return Ceiling(name=name, tflops=tflops, gbyte_s=gbyte_s, is_published=False)


def work_of(share, latent_shape, num_microbatches) -> dict[str, Work]:
    """By component of components.py, for a rank's `Share` of micro-batches of latents (T, H, W).

    Communication and other have no bound here.
    """
    size, layout, number = share.size, share.layout, share.number_bytes
    layer, held = layer_work(share, in_layers(size, layout.tensor)), held_by_tensor_rank(size, layout.tensor)
    count, again = size.num_layers * num_microbatches, _again(layer, layout.recompute)
    products = sum((3 + again(p.name)) * p.flops for p in layer.products)
    operands = sum((3 + again(p.name)) * _operands(p) for p in layer.products)
    scores = sum((3.5 + again(a.name)) * a.flops for a in layer.attentions)  # backward makes the scores again
    clips = share.micro_batch
    ends = sum((6 + 2 * again(a.name)) * (a.queries + clips * a.keys) * a.width for a in layer.attentions)
    passed = layer.forward_bytes + layer.backward_bytes
    recomputed = {"none": 0, "selective": layer.feed_forward_bytes, "full": layer.forward_bytes}
    passed += recomputed[layout.recompute]
    return {
        "attention": Work(flops=count * scores, bytes_=count * ends * number),
        "linear": Work(flops=count * products, bytes_=count * operands * number),
        "modulation": Work(flops=0.0, bytes_=count * passed),
        "embeddings": _embeddings(share, latent_shape, num_microbatches),
        "optimiser": Work(flops=0.0, bytes_=sum(held.values()) / share.state_pieces * OPTIMIZER_BYTES),
    }


def _operands(product):
    return product.rows * (product.depth + product.columns) + product.depth * product.columns


def _again(layer, recompute):
    """Forward passes of a product or attention that recomputation adds."""
    names = {"none": (), "selective": layer.feed_forward}.get(recompute)
    return lambda name: int(names is None or name in names)


def _embeddings(share, latent_shape, num_microbatches):
    size, number = share.size, share.number_bytes
    counts = forward_flops(size, latent_shape, share.text)
    flops = sum(counts[name] for name in _WHOLE) * share.micro_batch
    flops += sum(counts[name] for name in _CUT) / share.tokens * share.own_tokens
    patches = size.input_patch_width + size.output_patch_width + 2 * size.width
    return Work(
        flops=3 * num_microbatches * flops,
        bytes_=3 * num_microbatches * share.own_tokens * patches * number,
    )


def _measured(precision, size=2048, rounds=5):
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)

    def seconds(function):
        taken = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken[1:])

    tflops = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    return tflops, 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9
