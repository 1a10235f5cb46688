"""How fast kernels and links are: one table for all predictions, each number published, measured or assumed.

A rate depends on the shape of what is computed, so it is a curve, read by interpolation. None is fitted to a
single published run: `planning/published.py` compares them all with one set.
"""

import bisect
import math
from dataclasses import dataclass

Curve = tuple[tuple[float, float], ...]
"""(argument, value) with rising arguments."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one GPU sustains. FLOP rates in TFLOP/s, dense; bandwidth in GB/s."""

    name: str
    bf16_peak: float
    fp8_peak: float
    memory_peak: float
    gemm: Curve
    """Share of the peak by the smaller of a product's columns and depth; rows are many in training."""
    attention_forward: Curve
    """TFLOP/s in bf16 by keys, no mask, heads of 128; 4 * queries * keys * width FLOPs."""
    attention_backward: Curve
    """Likewise; 10 * queries * keys * width, as the kernel computes the scores again."""
    sources: tuple[tuple[str, str, str], ...]
    """(what, published / measured / assumed, where from)."""


# Assumptions of ours, the same for every GPU and every run.
SUSTAINED = 0.86
"""Clock under a training load, of that in a benchmark of one kernel: power. The one number that was chosen so
that the published runs lie around their predictions."""
FP8_SHARE = 0.85
"""What FP8 products reach of their peak beside bf16's of theirs: the best shapes reach 70.9% and 80.3% on an
H100, and inputs are cast."""
MEMORY_SHARE = 0.85
"""Of the peak bandwidth, by element-wise kernels."""
LINK_SHARE = 0.80
"""Of NVLink's rate, by rings (361 of 450 GB/s on eight H200)."""
NETWORK_SHARE = 0.93
"""Of a 400 Gbit/s card (46 to 48 GB/s)."""
LATENCY_SECONDS = 30e-6
"""Of one collective."""
LAUNCH_SECONDS = 6e-6
"""The host needs to start one kernel: a floor under short ones."""
KERNELS_PER_LAYER = 50
"""Of a forward pass; a backward pass has twice as many."""
CONTENTION = 0.10
"""What a collective behind kernels takes from them, of its own time: it holds some of the processors."""
STEP_SECONDS = 0.02
"""Of Python, the norm of the gradient and the loader, once a step."""

_ML_ENGINEERING = "github.com/stas00/ml-engineering, compute/accelerator"
_FA3 = "FlashAttention-3 (arXiv 2407.08608), figures for H100, head width 128, no mask; cuDNN's rates"

_GEMM: Curve = ((256, 0.40), (512, 0.50), (1024, 0.60), (2048, 0.67), (4096, 0.71), (8192, 0.73))

H100 = Gpu(
    name="h100",
    bf16_peak=989,
    fp8_peak=1979,
    memory_peak=3350,
    gemm=_GEMM,
    attention_forward=((512, 497), (1024, 574), (2048, 617), (4096, 609), (8192, 600), (16384, 595)),
    attention_backward=((512, 305), (1024, 408), (2048, 465), (4096, 499), (8192, 518), (16384, 516)),
    sources=(
        ("peaks", "published", "NVIDIA H100 SXM data sheet, dense"),
        ("products of matrices", "assumed", f"best shape 80.3% of the peak: {_ML_ENGINEERING}"),
        ("attention", "published", _FA3),
    ),
)
GB300 = Gpu(
    name="gb300",
    bf16_peak=2500,
    fp8_peak=5000,
    memory_peak=8000,
    gemm=tuple((x, y * 0.729 / 0.803) for x, y in _GEMM),
    attention_forward=tuple((x, y * 2500 / 989) for x, y in H100.attention_forward),
    attention_backward=tuple((x, y * 2500 / 989) for x, y in H100.attention_backward),
    sources=(
        ("peaks", "published", _ML_ENGINEERING),
        ("products of matrices", "assumed", f"H100's by the best shape's 72.9% on GB200: {_ML_ENGINEERING}"),
        ("attention", "assumed", "H100's by the ratio of the peaks"),
    ),
)
H200 = Gpu(
    name="h200",
    bf16_peak=989,
    fp8_peak=1979,
    memory_peak=4800,
    gemm=H100.gemm,
    attention_forward=H100.attention_forward,
    attention_backward=H100.attention_backward,
    sources=(("all but memory", "assumed", "the same processors as H100"), *H100.sources),
)
GPUS = {gpu.name: gpu for gpu in (H100, H200, GB300)}

FA2_FORWARD: Curve = ((512, 309), (1024, 350), (2048, 362), (4096, 368), (8192, 370), (16384, 370))
FA2_BACKWARD: Curve = ((512, 214), (1024, 260), (2048, 291), (4096, 310), (8192, 318), (16384, 322))
"""FlashAttention-2 on H100, same figures: what torch's scaled_dot_product_attention takes without cuDNN."""


def at(curve: Curve, x: float) -> float:
    """The curve's value at `x`, linear in log x between its points and constant beyond."""
    points = [point for point, _ in curve]
    place = bisect.bisect_left(points, x)
    if place == 0:
        return curve[0][1]
    if place == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
