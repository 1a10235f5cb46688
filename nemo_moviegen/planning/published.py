"""Published training speeds, predicted with the one set of assumptions of `hardware.py`.

What is compared is tokens a second and GPU, which is what a clock says. A published MFU also depends on which
FLOPs its authors count: NeMo's count the 9 D^2 adaLN weights of each layer for every token, and multiply with
them once a sample. So the predicted MFU is the predicted speed times the FLOPs a token they count.

Layouts, kernels and overlap are facts of each run; where no source gives the number of micro-batches, the row
says what is assumed. `moviegen plan --validate` prints the table.
"""

from dataclasses import dataclass, field

from nemo_moviegen.planning import hardware
from nemo_moviegen.planning.seconds import link
from nemo_moviegen.planning.step_time import Links, Settings, step_of
from nemo_moviegen.planning.work import Attention, LayerWork, Product, ring_passes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Of a published run."""

    gpu: str
    ranks_per_node: int
    node_gbyte_s: float
    network_gbit_s: float


DGX_H100 = Machine(gpu="h100", ranks_per_node=8, node_gbyte_s=450, network_gbit_s=400)
GB300_NVL72 = Machine(gpu="gb300", ranks_per_node=32, node_gbyte_s=900, network_gbit_s=800)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run; `tokens_per_second` and `mfu` are a GPU's."""

    name: str
    source: str
    machine: Machine = DGX_H100
    gpus: int
    tokens: int
    layers: int
    width: int
    heads: int
    ffn: int
    text_tokens: int
    text_width: int
    modulation: float
    """adaLN weights of each layer, in squares of the width; every tensor rank has them."""
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    num_microbatches: int
    passes: float
    """Hidden states that element-wise kernels of a layer move, forward; backward twice and a bit."""
    settings: Settings = field(default_factory=Settings)
    text_ring: bool = False
    """Whether text keys and values too go round the context ranks."""
    norms_over_heads: bool = False
    """Whether queries and keys are normed over all heads: tensor ranks gather them, and cut them again."""
    tokens_per_second: float
    mfu: float
    assumed: str = ""
    """What no source says and is assumed of this run."""

    @property
    def copies(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tensor * self.context * self.pipeline)


EAGER_DIT = 56.0
"""NeMo's DiT: fused modulation, but an fp32 RMSNorm of queries and keys in plain torch."""
FUSED_WAN = 40.0
"""DFM's Wan: fused modulation, rotary positions, norms of queries and keys over the whole width."""
NORMED_OVER_HEADS = 3
"""DFM's queries and keys of the clip, and queries of the text (dit_attention.py); the text's keys are few."""
DIFFUSERS_WAN = 90.0
"""diffusers' Wan, nothing fused: modulation and norms in fp32, rotary positions in fp64."""

_NEMO = "NVIDIA/NeMo, nemo/collections/diffusion/readme.rst, 2024-11"
_DFM = "NVIDIA-NeMo/DFM, docs/performance-summary.md, 2025-12"
_ADALN = 9.0


def _dit(name, **changes):
    values = {
        "layers": 32,
        "text_tokens": 512,
        "text_width": 1024,
        "modulation": _ADALN,
        "passes": EAGER_DIT,
        "source": _NEMO,
        "gpus": 256,
    } | changes
    return Run(name=name, ffn=4 * values["width"], **values)


def _wan(name, **changes):
    values = {"passes": FUSED_WAN, "source": _DFM, "text_ring": True, "norms_over_heads": True} | changes
    return Run(
        name=name,
        layers=40,
        width=5120,
        heads=40,
        ffn=13824,
        text_tokens=512,
        text_width=5120,
        modulation=0.0,
        tokens=37440,
        **values,
    )


RUNS = (
    _dit(
        "NeMo DiT 7B, 8k",
        width=3072,
        heads=24,
        tokens=8192,
        tensor=2,
        num_microbatches=2,
        tokens_per_second=10052,
        mfu=0.525,
        assumed="2 micro-batches (global batch 256 of the nearest recipe)",
    ),
    _dit(
        "NeMo DiT 7B, 74k",
        width=3072,
        heads=24,
        tokens=73728,
        tensor=2,
        context=4,
        num_microbatches=8,
        settings=Settings(context_comm="p2p"),
        tokens_per_second=3409,
        mfu=0.444,
        assumed="8 micro-batches (global batch 256)",
    ),
    _dit(
        "NeMo DiT 28B, 8k",
        width=6144,
        heads=48,
        tokens=8192,
        tensor=4,
        pipeline=4,
        num_microbatches=16,
        tokens_per_second=2510,
        mfu=0.473,
        assumed="16 micro-batches (global batch 256), 48 heads",
    ),
    _dit(
        "NeMo DiT 28B, 64k",
        width=6144,
        heads=48,
        tokens=65536,
        num_microbatches=1,
        settings=Settings(recompute="full", is_full=True),
        tokens_per_second=1386,
        mfu=0.450,
        assumed="1 micro-batch, 48 heads",
    ),
    _wan(
        "Wan 14B, 128 H100",
        gpus=128,
        tensor=2,
        context=4,
        num_microbatches=8,
        settings=Settings(
            recompute="full",
            recomputed_share=0.2,
            context_comm="p2p",
            state_overlap=False,
            backward_overlap=False,
        ),
        tokens_per_second=1972,
        mfu=0.329,
    ),
    _wan(
        "Wan 14B, 32 GB300",
        machine=GB300_NVL72,
        gpus=32,
        context=2,
        num_microbatches=4,
        settings=Settings(context_comm="p2p", state_overlap=False),
        tokens_per_second=6240,
        mfu=0.412,
    ),
    _wan(
        "Wan 14B, 64 H100, Automodel",
        gpus=64,
        num_microbatches=1,
        passes=DIFFUSERS_WAN,
        text_ring=False,
        settings=Settings(
            recompute="full", is_full=True, attention=(hardware.FA2_FORWARD, hardware.FA2_BACKWARD)
        ),
        tokens_per_second=1386,
        mfu=0.231,
        assumed="full recomputation (the stack's default), FlashAttention-2",
    ),
)


def predict(run: Run):
    """The `Step` of a published run, and its tokens a second and GPU."""
    machine = run.machine
    links = Links(
        tensor=link(machine, run.tensor, 1),
        context=link(machine, run.context, run.tensor),
        state=link(machine, run.copies * run.context, run.tensor),
    )
    layer = _layer_parameters(run)
    stage = run.layers // run.pipeline
    replicated = stage * run.modulation * run.width**2
    held = stage * (layer - run.modulation * run.width**2) / run.tensor + replicated
    step = step_of(
        _work(run, held / stage),
        gpu=hardware.GPUS[machine.gpu],
        links=links,
        settings=run.settings,
        num_layers=stage,
        num_microbatches=run.num_microbatches,
        held=held,
        replicated=replicated,
        ends_flops=2 * 2 * run.tokens * 64 * run.width,
        pieces=run.copies * run.context,
        pipeline=run.pipeline,
    )
    return step, run.num_microbatches * run.tokens * run.copies / step.seconds / run.gpus


def validation() -> list[dict]:
    """A row for each run: published and predicted MFU and speed of a GPU, and predicted / published."""
    rows = []
    for run in RUNS:
        step, tokens_per_second = predict(run)
        ratio = tokens_per_second / run.tokens_per_second
        rows.append(
            {
                "run": run.name,
                "published_mfu": run.mfu,
                "predicted_mfu": run.mfu * ratio,
                "ratio": ratio,
                "published_tokens_per_second": run.tokens_per_second,
                "predicted_tokens_per_second": tokens_per_second,
                "predicted_seconds": step.parts(),
                "source": run.source,
                "assumed": run.assumed,
            }
        )
    return rows


def _layer_parameters(run):
    square = run.width**2
    return (4 + 2 + run.modulation) * square + 2 * run.text_width * run.width + 2 * run.ffn * run.width


def _work(run, parameters):
    width, tensor = run.width, run.tensor
    tokens = run.tokens / run.context
    own = tokens / tensor * width * 2
    # read once forward and once backward, and their gradients added to fp32 ones
    modulation = run.modulation * width**2
    forward, backward = _more_passes(run)
    return LayerWork(
        products=(
            Product(name="queries, keys, values", rows=tokens, columns=3 * width / tensor, depth=width),
            Product(name="attention out", rows=tokens, columns=width, depth=width / tensor),
            Product(name="text queries", rows=tokens, columns=width / tensor, depth=width),
            Product(
                name="text keys, values",
                rows=run.text_tokens,
                columns=2 * width / tensor,
                depth=run.text_width,
            ),
            Product(name="text out", rows=tokens, columns=width, depth=width / tensor),
            Product(name="ffn in", rows=tokens, columns=run.ffn / tensor, depth=width),
            Product(name="ffn out", rows=tokens, columns=width, depth=run.ffn / tensor),
        ),
        attentions=(
            Attention(
                name="attention", queries=tokens, keys=run.tokens, width=width / tensor, head_width=128
            ),
            Attention(
                name="text attention",
                queries=tokens,
                keys=run.text_tokens,
                width=width / tensor,
                head_width=128,
            ),
        ),
        forward_bytes=(run.passes + forward) * own + 2 * modulation,
        backward_bytes=(2.2 * run.passes + backward) * own + 12 * modulation,
        feed_forward_bytes=10 * own,
        gathered_bytes=tokens * width * 2,
        gathers=3,
        gathers_alone=NORMED_OVER_HEADS if run.norms_over_heads else 0,
        key_bytes=2 * run.tokens * width / tensor * 2,
        parameters=parameters,
    )


def _more_passes(run):
    """(forward, backward) hidden states that the layout adds to `passes`."""
    ring = run.context if run.settings.context_comm == "p2p" else 1
    passes = [ring_passes(ring)]
    if run.text_ring and ring > 1:
        # outputs and gradients of queries are merged, and each turn's attention only moves memory
        passes.append((3 * ring + 1 + 2 * ring, 3 * ring - 1 + 4 * ring))
    if run.norms_over_heads and run.tensor > 1:
        # of each tensor: copies of the rank's heads, and of all heads: joined, transposed, normed
        copies = NORMED_OVER_HEADS * (6 + 6 * run.tensor)
        passes.append((copies, copies + NORMED_OVER_HEADS * 2 * run.tensor))
    return [sum(column) for column in zip(*passes, strict=True)]
