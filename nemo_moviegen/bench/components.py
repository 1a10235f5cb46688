"""Which part of the model a profiled operation belongs to, forward and backward.

    attention      scores and values, of self- and cross-attention
    linear         matrix products of the layers
    modulation     all else in the layers: norms, adaLN, gates, residuals, SwiGLU, copies
    embeddings     patches, positions, time, text projections, shared modulation, head
    optimiser      gradients added up, their norm, AdamW
    communication  collectives
    other          loss, noise, what no scope covers

Forward operations lie within the scopes that `watch_scopes` opens. The profiler numbers them as autograd does
its nodes, so a backward operation finds the scope of its forward one by that number.
"""

import contextlib

from torch.profiler import record_function

COMPONENTS = ("attention", "linear", "modulation", "embeddings", "optimiser", "communication", "other")
_SCOPE = "moviegen::"
_EMBEDDINGS = ("patch_embedding", "positions", "context_projections", "modulation", "time_embedding", "head")
_COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms", "ncclDevKernel", "echo::")
_ATTENTION = ("scaled_dot_product", "FusedAttn", "fused_attn", "flash_attention", "AttnFunc")
_LINEAR = ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "_Linear")
_GRADIENT_SUM = "AccumulateGrad"
_BACKWARD = "autograd::engine::evaluate_function"


@contextlib.contextmanager
def watch_scopes(model, optimizer):
    """While this lasts, the parts of a `VideoTransformer` and the `step` of megatron's optimizer are
    scopes."""
    parts = [(getattr(model, name), "embeddings") for name in _EMBEDDINGS]
    parts.append((model.decoder, "layer"))
    handles = [handle for module, label in parts for handle in _hooks(module, label)]
    step = optimizer.step

    def in_scope(*args, **kwargs):
        with record_function(_SCOPE + "optimiser"):
            return step(*args, **kwargs)

    optimizer.step = in_scope
    try:
        yield
    finally:
        optimizer.step = step
        for handle in handles:
            handle.remove()


def seconds_by_component(events) -> dict[str, float]:
    """Seconds of a finished profile's `events()`, of all its steps: of kernels on a GPU, else of
    operations."""
    on_gpu = any(event.self_device_time_total for event in events)
    labels = _labels_by_number(events)
    found = dict.fromkeys(COMPONENTS, 0.0)
    for event in events:
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if taken and not event.name.startswith(_SCOPE):
            found[_component(event, labels)] += taken / 1e6
    return found


def _hooks(module, label):
    scopes = []

    def enter(*_):
        scopes.append(record_function(_SCOPE + label))
        scopes[-1].__enter__()

    def leave(*_):
        scopes.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _chain(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def _label(event):
    """Of the innermost scope around it; "" where there is none."""
    scope = next((one.name for one in _chain(event) if one.name.startswith(_SCOPE)), _SCOPE)
    return scope.removeprefix(_SCOPE)


def _labels_by_number(events):
    """The scope of each autograd node, of the last forward operation that has its number."""
    forward = (e for e in events if e.sequence_nr >= 0 and not any(_is_backward(one) for one in _chain(e)))
    return {e.sequence_nr: _label(e) for e in sorted(forward, key=lambda e: e.time_range.start)}


def _is_backward(event):
    return event.name.startswith(_BACKWARD)


def _component(event, labels):
    chain = list(_chain(event))
    names = [one.name for one in chain]
    if any(name.startswith(_COMMUNICATION) for name in names):
        return "communication"
    if any(part in name for name in names for part in _ATTENTION):
        return "attention"
    nodes = [one for one in chain if _is_backward(one)]
    if nodes and _GRADIENT_SUM in nodes[0].name:
        return "optimiser"
    # what is recomputed has nodes of its own, within the one that recomputes
    label = _label(event) or next(filter(None, (labels.get(node.sequence_nr) for node in nodes)), "")
    if label == "layer":
        is_product = any(part in name for name in names for part in _LINEAR)
        return "linear" if is_product else "modulation"
    return label or "other"
