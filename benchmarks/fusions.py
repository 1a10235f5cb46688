"""Do the fused operations pay? Each beside what autograd makes of the same formula.

    python benchmarks/fusions.py > benchmarks/fusions_cpu_2.json

Forward and backward pass at the shapes of a demo's step and of a model 512 wide: milliseconds, MiB kept for
the backward pass, MiB that operations read and write (operands and results of every operation but views). On
a GPU in bf16 and compiled as well, at the shapes of a rank of the 30B model (TP4, CP2); there traffic is that
of the bodies as they are written. Ways take turns, in another order each round: ratios share the load.
"""

import json
import statistics
import sys
import time

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_moviegen.bench.measure import environment
from nemo_moviegen.video import fused

EPS, ROUNDS = 1e-5, 40
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SHAPES = {"rank of the 30B": (9216, 1, 6144, 4096)} if ON_GPU else {}
SHAPES |= {"demo": (32, 16, 192, 512), "mid": (2048, 1, 512, 1365)}
"""Tokens of the rank, clips, width, feed-forward width."""


def norm(x, weight):
    return functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def operations(S, B, D, F):
    """{name: (fused, by autograd, shapes of the operands)}"""
    hidden, vector = (S, B, D), (B, D)
    return {
        "rms_norm": (lambda *x, **how: fused.rms_norm(*x, EPS, **how), norm, (hidden, (D,))),
        "norm_modulate": (
            lambda *x, **how: fused.norm_modulate(*x, EPS, **how),
            lambda x, weight, scale, shift: norm(x, weight) * (1 + scale) + shift,
            (hidden, (D,), vector, vector),
        ),
        "gated_sum": (fused.gated_sum, lambda x, branch, gate: x + gate * branch, (hidden, hidden, vector)),
        "swiglu": (fused.swiglu, _swiglu, ((S, B, 2 * F),)),
    }


def _swiglu(gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    return functional.silu(gate) * value


class Traffic(TorchDispatchMode):
    """Counts the bytes of operands and results while it lasts."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.__name__:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.num_bytes += sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
        return result


def passes(operation, inputs, grad):
    """Forward and backward; returns bytes that were kept between them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = operation(*inputs)
    torch.autograd.grad(out, inputs, grad)
    return sum(kept.values())


def seconds(operation, inputs, grad):
    started = time.perf_counter()
    torch.autograd.grad(operation(*inputs), inputs, grad)
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(ours, by_autograd, shapes):
    inputs = [torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_() for shape in shapes]
    grad = torch.randn_like(ours(*inputs))
    ways = {"by autograd": by_autograd, "fused": ours}
    if ON_GPU and ours is not fused.swiglu:
        ways["fused, compiled"] = lambda *x: ours(*x, compiled=True)
    taken, names = {name: [] for name in ways}, list(ways)
    for index in range(ROUNDS + 3):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            taken[name].append(seconds(ways[name], inputs, grad))
    rows = {}
    for name, operation in ways.items():
        with Traffic() as traffic:
            kept = passes(operation, inputs, grad)
        ratios = [own / other for own, other in zip(taken[name][3:], taken["by autograd"][3:], strict=True)]
        rows[name] = {
            "ms": statistics.median(taken[name][3:]) * 1e3,
            "ratio": statistics.median(ratios),
            "kept_mib": kept / 2**20,
            "traffic_mib": traffic.num_bytes / 2**20,
        }
    return rows


def main():
    torch.set_num_threads(1)
    found = {"environment": environment("torch"), "rounds": ROUNDS, "dtype": str(DTYPE)}
    for title, shape in SHAPES.items():
        found[title] = {"shape": shape} | {
            name: measured(*operation) for name, operation in operations(*shape).items()
        }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
