"""Plans in words and in plain values: what the screen, the page, `--json` and error messages share."""

from dataclasses import asdict

from nemo_moviegen.planning.weights import kept_by_rank

MEMORY = {
    "parameters": "weights of this rank, in the format that computes",
    "gradients": "main gradients of this rank",
    "optimizer": "AdamW's two moments, and fp32 weights where bf16 computes",
    "ema": "moving average of the weights",
    "batch": "latents, noise and text of a micro-batch",
    "activations": "what all layers keep for the backward pass",
    "working": "one layer computed backward: what is made again, gradients, gathered weights",
    "attention": "keys and values of other context ranks, and their gradients",
    "head": "velocities out of the head and their targets",
    "fragments": "held by the allocator between blocks (assumed 3%)",
    "nccl": "buffers of the communicators (assumed)",
    "context": "CUDA, cuDNN, cuBLAS; on a CPU the process without its tensors",
}
TIME = {
    "products": "linear layers, forward and backward",
    "attention": "self- and cross-attention, forward and backward",
    "memory": "norms, modulation, residuals: bound by memory",
    "again": "recomputed in the backward pass",
    "tensor": "collectives of tensor ranks that nothing hides",
    "context": "keys and values over context ranks that attention does not hide",
    "sharding": "FSDP's weights and gradients that no layer hides",
    "contention": "what hidden collectives take from kernels",
    "host": "launching kernels, where they are too short to hide it",
    "ends": "patches in, velocities out",
    "data_parallel": "gradients and weights once a step, where FSDP does not move them",
    "tensor_gradients": "gradients of what every tensor rank has",
    "optimizer": "AdamW",
    "overhead": "Python, gradient norm, loader: once a step (assumed)",
}
"""Parts of a step in the order of the bars; a pipeline's bubble is of published runs only."""


def describe(plan) -> str:
    """A layout in a few words: TP4 CP2 DP512, full sharding, recompute full, micro-batch 1."""
    layout = plan.layout
    copies = layout.data_parallel(plan.num_ranks)
    words = [f"TP{layout.tensor} CP{layout.context} DP{copies}", f"sharding {layout.sharding}"]
    words.append(f"recompute {layout.recompute}")
    if layout.context > 1:
        words.append(layout.context_comm)
    return ", ".join([*words, f"micro-batch {plan.micro_batch}"])


def changes_to(plan, asked) -> list[str]:
    """key=value for each setting of `plan` that differs from the asked one's: what to type."""
    ours, theirs = asdict(plan.layout), asdict(asked.layout)
    changes = [f"layout.{name}={value}" for name, value in ours.items() if value != theirs[name]]
    if plan.micro_batch != asked.micro_batch:
        changes.append(f"micro_batch={plan.micro_batch}")
    return changes


def parameters_of_first(plan) -> dict[str, int]:
    """Parameters of each component of the model that rank 0 keeps between steps."""
    return kept_by_rank(plan.iterations[0].share.size, plan.layout, plan.num_ranks, 0)


def plan_values(plan) -> dict:
    """A `Plan` as plain values, for JSON: bytes, seconds, shares; None where rates are unknown."""
    layout = plan.layout
    return {
        "recipe": plan.recipe,
        "cluster": plan.cluster,
        "accelerator": plan.accelerator,
        "ranks": plan.num_ranks,
        "layout": asdict(layout) | {"data": layout.data_parallel(plan.num_ranks)},
        "precision": plan.precision,
        "micro_batch": plan.micro_batch,
        "micro_batches": plan.num_microbatches,
        "fits": plan.fits,
        "memory": {
            "limit_bytes": plan.memory_limit_bytes,
            "device_bytes": plan.memory.device_bytes,
            "allocated_peak_bytes": plan.memory.peak_bytes,
            "parts_bytes": asdict(plan.memory),
            "parameters_of_rank_0": parameters_of_first(plan),
        },
        "time": _time_values(plan),
        "iterations": [_iteration_values(plan, number) for number in range(len(plan.iterations))],
        "notes": list(plan.notes),
    }


def search_values(found, top) -> dict:
    """A `Search` as plain values: the asked plan, the `top` first of those that fit, counts of the others."""
    nearest = found.nearest()
    return {
        "asked": plan_values(found.asked),
        "place": found.rank(),
        "legal": found.num_legal,
        "fitting": len(found.plans),
        "refused": found.refused,
        "nearest": None if nearest is None else changes_to(nearest, found.asked),
        "plans": [plan_values(plan) for plan in found.plans[:top]],
    }


def _time_values(plan):
    if plan.step_seconds is None:
        return None
    return {
        "step_seconds": plan.step_seconds,
        "parts_seconds": plan.seconds_by_part(),
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_rank": plan.tokens_per_second / plan.num_ranks,
        "tflops_per_rank": plan.tflops,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "steps": plan.num_steps,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
    }


def _iteration_values(plan, number):
    iteration = plan.iterations[number]
    return {
        "kind": iteration.kind,
        "share_of_iterations": plan.shares[number],
        "latent_shape": list(iteration.shape),
        "samples": iteration.samples,
        "tokens_of_a_sample": iteration.share.tokens,
        "text_tokens": iteration.share.text,
        "model_flops": iteration.model_flops,
        "recomputed_flops": iteration.recomputed_flops,
        "seconds": None if iteration.step is None else iteration.step.seconds,
        "device_bytes": iteration.memory.device_bytes,
    }
