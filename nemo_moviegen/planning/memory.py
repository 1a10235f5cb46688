"""Bytes of one rank, component by component, and their peak."""

from dataclasses import dataclass

from nemo_moviegen.planning import activations
from nemo_moviegen.planning.share import Share
from nemo_moviegen.planning.weights import held_by_tensor_rank, in_layers

GIB = 2**30
PREFETCHED = 500_000_000
"""Parameters that Megatron FSDP gathers ahead of the layer at work (megatron-core 0.15.3's default)."""
UNSENT = 1_000_000_000
"""Gradients that it lets wait for their reduce-scatter."""
FRAGMENTS = 0.03
"""Assumed, of the peak."""
COMMUNICATOR = 0.45 * GIB
"""Assumed: reports of one ring communicator's buffers lie between 0.3 and 0.65 GiB."""
CUDA_CONTEXT = 0.6 * GIB
"""Reported 0.5 to 0.6 GiB with lazy loading; cuBLAS takes 32 MiB more on Hopper."""
CPU_PROCESS = 0.75 * GIB
"""Measured: resident memory of a rank before its first step, all packages imported."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank by component; `peak_bytes` is what `torch.cuda.max_memory_allocated` reports of a run,
    `device_bytes` what the GPU holds then."""

    parameters: float
    gradients: float
    optimizer: float
    ema: float
    batch: float
    """Latents, noise and text of a micro-batch."""
    activations: float
    """What all layers keep for the backward pass."""
    working: float
    """On top of it while one layer is computed backward: what is made again, gradients, gathered weights."""
    attention: float
    """Likewise: keys and values of other context ranks, and their gradients."""
    head: float
    """What comes out of the model and what it is compared with: the logits of this model."""
    fragments: float = 0.0
    """Outside of what torch's allocator hands out, as the next two: what it holds and can not use."""
    nccl: float = 0.0
    """Buffers of the communicators."""
    context: float = 0.0
    """Of CUDA, cuDNN and cuBLAS; on a CPU, of the process before it has a tensor."""

    @property
    def states_bytes(self) -> float:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.optimizer + self.ema

    @property
    def peak_bytes(self) -> float:
        """Most that is allocated at once in a step."""
        return self.states_bytes + self.backward_bytes

    @property
    def backward_bytes(self) -> float:
        """On top of that, at the most of a backward pass."""
        return self.activations + self.working + self.attention + self.head + self.batch

    @property
    def device_bytes(self) -> float:
        """With what torch's allocator does not count."""
        return self.peak_bytes + self.fragments + self.nccl + self.context


def memory_of(share: Share, *, ema=False) -> Memory:
    """What one rank needs to train on its `Share` of a step."""
    held = sum(held_by_tensor_rank(share.size, share.layout.tensor).values())
    is_full = share.layout.sharding == "full"
    pieces = share.state_pieces
    kept = activations.kept(share)
    main = _main_bytes(share)
    sharded, moments = (pieces if is_full else 1), 2 * main
    copied = main if share.number_bytes == 2 else 0  # full-precision weights beside those that compute
    return Memory(
        parameters=held * share.number_bytes / sharded,
        gradients=held * main / sharded,
        optimizer=held * (moments + copied) / pieces,
        ema=held * main / pieces if ema else 0.0,
        batch=_batch(share),
        activations=kept["layers"] + kept["around layers"],
        working=_working(share),
        attention=activations.attention_workspace(share),
        head=activations.head_and_loss(share),
    )


def outside_allocator(share: Share, memory: Memory, accelerator) -> dict[str, float]:
    """Fields of a `Memory` that `memory_of` leaves at 0: what the device holds besides tensors."""
    if accelerator == "cpu":
        return {"context": CPU_PROCESS}
    layout = share.layout
    groups = (share.num_ranks, layout.tensor, layout.context, share.copies * layout.context)
    return {
        "fragments": FRAGMENTS * memory.peak_bytes,
        "nccl": COMMUNICATOR * sum(ranks > 1 for ranks in groups),
        "context": CUDA_CONTEXT,
    }


def _working(share):
    """Most that is needed on top of what is kept, over the layers as the backward pass goes down.

    What is kept falls from layer to layer, so what Megatron FSDP has gathered and not yet sent counts more
    the later it is.
    """
    most = activations.working(share)
    if share.layout.sharding != "full" or share.state_pieces == 1:  # else there is nothing to gather
        return most
    kept = activations.kept(share)["layers"] / share.size.num_layers
    held = sum(held_by_tensor_rank(share.size, share.layout.tensor).values())
    layer = in_layers(share.size, share.layout.tensor)
    last = share.size.num_layers - 1
    # concave in `done`: the most is where one of its two bounds is met, or at an end
    bends = ((held - layer - PREFETCHED) / layer, UNSENT / layer)
    at = {0, last, *(min(last, max(0, int(bend) + more)) for bend in bends for more in (0, 1))}
    return most + max(_gathered(share, held, layer, done) - done * kept for done in at)


def _gathered(share, held, layer, done):
    """Bytes of weights that are gathered and gradients not yet sent, when `done` layers have been computed
    backward; what megatron's settings allow it to hold at most."""
    weights = min(held - done * layer, layer + PREFETCHED)
    gradients = min((done + 1) * layer, layer + UNSENT)
    return (weights + layer) * share.number_bytes + gradients * _main_bytes(share)


def _batch(share):
    """Latents, noisy latents and text features, as the loader gives them."""
    size, data = share.size, max(4, share.number_bytes)
    latents = 2 * share.micro_batch * share.tokens * size.input_patch_width * data
    widths = {c.name: c.width for c in size.contexts}
    text = share.micro_batch * sum(n * widths[name] for name, n in share.text.items())
    return latents + text * data


def _main_bytes(share):
    """Of a number the optimiser keeps: fp32 beside bf16, else as the weights."""
    return 4 if share.number_bytes == 2 else share.number_bytes
