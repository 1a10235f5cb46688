"""What one rank computes in one layer for one micro-batch: products, attention, memory traffic. No seconds.

The model's layer gives `layer_work`; `published.py` describes other people's layers with the same classes.
"""

from dataclasses import dataclass

FORWARD_PASSES = 16
"""Hidden states that a layer's element-wise kernels read or write between its linear layers, each operation
of video/fused.py compiled to one kernel: positions 3, two modulated norms 4, two gated sums 6, a sum 3."""
BACKWARD_PASSES = 28
"""Likewise backward: two modulated norms 10 (their vectors of a clip are summed in a kernel of their own),
two gates 6, gradients of residuals and positions added 12."""
OPTIMIZER_BYTES = 34
"""A step of the optimiser moves for a parameter: fp32 weight, gradient and two moments read, three of them
written, a bf16 weight written, the gradient read for its norm."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A linear layer on this rank: [rows, depth] x [depth, columns]."""

    name: str
    rows: float
    columns: float
    depth: float

    @property
    def flops(self) -> float:
        """Of the forward pass; a backward pass takes two such products."""
        return 2 * self.rows * self.columns * self.depth


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Scores and values of all clips of a micro-batch on this rank."""

    name: str
    queries: float
    """Of all clips."""
    keys: float
    """Of one clip."""
    width: float
    """Of all heads of the rank."""
    head_width: int

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 4 * self.queries * self.keys * self.width


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One layer, one micro-batch, one rank."""

    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    forward_bytes: float
    """Of element-wise kernels."""
    backward_bytes: float
    feed_forward_bytes: float
    """Of them, those of a forward pass through the feed-forward: what selective recomputation does again."""
    gathered_bytes: float
    """Of all tokens that tensor ranks share, full width: what one gather or scatter of theirs moves."""
    gathers: int
    """Gathers of tensor ranks in a forward pass, with as many scatters."""
    key_bytes: float
    """Keys and values of all context ranks, of this rank's heads."""
    parameters: float
    """Of the layer, on this tensor rank."""
    gathers_alone: int = 0
    """Gathers of tensor ranks in a forward pass without a scatter, and as many in a backward pass."""
    feed_forward: tuple[str, ...] = ("ffn in", "ffn out")

    @property
    def forward_flops(self) -> float:
        """Of products and attention."""
        return sum(op.flops for op in (*self.products, *self.attentions))

    @property
    def feed_forward_flops(self) -> float:
        """Of them, the feed-forward's."""
        return sum(op.flops for op in self.products if op.name in self.feed_forward)


def ring_passes(ranks) -> tuple[int, int]:
    """(forward, backward) hidden states that Transformer Engine's ring (context_comm p2p) moves on top of its
    attentions: keys and values joined, each turn's output merged, gradients of queries, keys and values
    added up. No ring where there is one rank."""
    return (0, 0) if ranks == 1 else (3 * ranks + 5, 9 * ranks - 3)


def layer_work(share, parameters) -> LayerWork:
    """One layer of `video/layer.py`; `parameters` are the layer's on this tensor rank."""
    size, layout, number = share.size, share.layout, share.number_bytes
    width, tensor, context = size.width, layout.tensor, share.context_tokens
    ffn, gates = size.ffn_width / tensor, 2 if size.gated_ffn else 1
    text = share.text_tokens
    own = share.own_tokens * width * number
    ring = ring_passes(layout.context if layout.context_comm == "p2p" else 1)
    activated = context * ffn * number
    return LayerWork(
        products=(
            Product(name="queries, keys, values", rows=context, columns=3 * width / tensor, depth=width),
            Product(name="attention out", rows=context, columns=width, depth=width / tensor),
            Product(name="text queries", rows=context, columns=width / tensor, depth=width),
            Product(name="text keys, values", rows=text, columns=2 * width / tensor, depth=width),
            Product(name="text out", rows=context, columns=width, depth=width / tensor),
            Product(name="ffn in", rows=context, columns=gates * ffn, depth=width),
            Product(name="ffn out", rows=context, columns=width, depth=ffn),
        ),
        attentions=(
            Attention(
                name="attention",
                queries=context,
                keys=share.tokens,
                width=width / tensor,
                head_width=size.head_width,
            ),
            Attention(
                name="text attention",
                queries=context,
                keys=sum(share.text.values()),
                width=width / tensor,
                head_width=size.head_width,
            ),
        ),
        forward_bytes=(FORWARD_PASSES + ring[0]) * own + (gates + 1) * activated + size.qk_norm * 4 * own,
        backward_bytes=(BACKWARD_PASSES + ring[1]) * own
        + (2 * gates + 1) * activated
        + size.qk_norm * 8 * own,
        feed_forward_bytes=5 * own + (gates + 1) * activated,
        gathered_bytes=context * width * number,
        gathers=3,
        key_bytes=2 * share.micro_batch * share.tokens * width / tensor * number,
        parameters=parameters,
    )
