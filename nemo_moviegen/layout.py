"""How one model is spread over ranks (s3.1.6): plain numbers, without torch."""

from dataclasses import dataclass, replace

CHOICES = {
    "sharding": ("none", "optimizer", "full"),
    "recompute": ("none", "selective", "full"),
    "context_comm": ("all_gather", "a2a", "p2p"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Data parallel takes the ranks that tensor * context leaves; any legal layout gives the same answer."""

    tensor: int = 1
    """Ranks that share the matrices of a layer."""
    context: int = 1
    """Ranks that share the tokens of one clip, also inside attention."""
    sequence: bool = True
    """Split norms and residuals over the tensor ranks too (SP); no effect with tensor = 1."""
    sharding: str = "optimizer"
    """What data parallel ranks share out: none, optimizer (its states), or full (the paper's: also weights
    and gradients)."""
    recompute: str = "none"
    """What the backward pass does again in place of keeping it: none; selective (the feed-forward, and the
    gather of keys and values over context ranks); or full (every layer)."""
    context_comm: str = "all_gather"
    """How attention crosses context ranks: all_gather (the paper's), a2a or p2p (Transformer Engine only)."""
    overlap: bool = True
    """Data-parallel ranks exchange gradients behind the backward pass, and weights (sharding=optimizer)
    behind the forward pass of the next step. With sharding=full they always do."""

    def __post_init__(self):
        for axis in ("tensor", "context"):
            if getattr(self, axis) < 1:
                raise ValueError(f"layout.{axis} is {getattr(self, axis)}; it counts ranks, use 1 or more")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"layout.{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and one clip."""
        return self.tensor * self.context

    def data_parallel(self, num_ranks: int) -> int:
        """Copies of the model on `num_ranks`; ValueError if the layout does not divide them."""
        if num_ranks < 1 or num_ranks % self.model_ranks:
            raise ValueError(
                f"{num_ranks} ranks do not split into tensor {self.tensor} x context {self.context}: "
                f"use a multiple of {self.model_ranks} ranks or a smaller layout"
            )
        return num_ranks // self.model_ranks

    def among(self, num_ranks: int) -> "Layout":
        """This layout as it is built on `num_ranks`: an optimiser that no second rank shares is not shared
        out, for megatron would send all gradients and weights to where they are, nor is any overlapped."""
        if self.data_parallel(num_ranks) * self.context > 1:
            return self
        return replace(self, overlap=False, sharding=self.sharding.replace("optimizer", "none"))


def nearest_bucket(size, latent_shape, divisor):
    """The latent (frames, height, width) nearest to `latent_shape` whose tokens `divisor` divides, or None.

    Same frames; height and width whole patches that the model's position tables hold. Nearest by tokens, then
    by how far height and width move, then the smaller one. `size` is a `TransformerSize`.
    """
    frames, height, width = latent_shape
    tokens = size.num_tokens(latent_shape)
    of_a_patch = size.num_tokens((frames, size.patch_height, size.patch_width))
    fitting = [
        (frames, rows * size.patch_height, columns * size.patch_width)
        for rows in range(1, size.max_height + 1)
        for columns in range(1, size.max_width + 1)
        if of_a_patch * rows * columns % divisor == 0
    ]
    return min(
        fitting,
        key=lambda shape: (
            abs(size.num_tokens(shape) - tokens),
            abs(shape[1] - height) + abs(shape[2] - width),
            shape,
        ),
        default=None,
    )
