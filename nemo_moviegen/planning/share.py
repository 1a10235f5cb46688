"""What one rank holds and does of a step: numbers that memory and time are counted from."""

from dataclasses import dataclass

from nemo_moviegen.flops import split_text
from nemo_moviegen.layout import Layout
from nemo_moviegen.sizes import TransformerSize

TEXT_TOKENS = 256
"""Real text tokens of a prompt: a 100-word caption is about 128 in each of UL2 and MetaCLIP."""
NUMBER_BYTES = {"fp32": 4, "fp64": 8}
"""Of a weight or activation by precision; 2 in all others: their products are bf16 or FP8, kept in bf16."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of one micro-batch of equal clips. Lengths are whole: a legal layout divides."""

    size: TransformerSize
    layout: Layout
    num_ranks: int
    precision: str
    micro_batch: int
    tokens: int
    """Of one clip, all ranks."""
    text: dict[str, int]
    """Tokens of one prompt by encoder, padding included: every prompt of a micro-batch is as long as the
    longest."""
    fused: bool
    """Transformer Engine's kernels (bf16 on a GPU); else megatron's local ones."""

    @property
    def number_bytes(self) -> int:
        """Of a weight or an activation."""
        return NUMBER_BYTES.get(self.precision, 2)

    @property
    def copies(self) -> int:
        """Of the model: data-parallel ranks."""
        return self.layout.data_parallel(self.num_ranks)

    @property
    def state_pieces(self) -> int:
        """Pieces the optimiser's states are cut into: data- and context-parallel ranks share them."""
        return 1 if self.layout.sharding == "none" else self.copies * self.layout.context

    @property
    def sequence(self) -> int:
        """Ranks that sequence parallelism cuts a context piece into."""
        return self.layout.tensor if self.layout.sequence else 1

    @property
    def own_tokens(self) -> float:
        """Tokens of all clips between the linear layers of this rank."""
        return self.micro_batch * self.tokens / (self.layout.context * self.sequence)

    @property
    def context_tokens(self) -> float:
        """Tokens of all clips inside attention and feed-forward, where tensor ranks share the width."""
        return self.micro_batch * self.tokens / self.layout.context

    @property
    def text_tokens(self) -> int:
        """Of all prompts; every rank has them."""
        return self.micro_batch * sum(self.text.values())


def share_of(recipe, num_ranks, accelerator, *, latent_shape=None, text=None) -> Share:
    """One rank's part of a `VideoRecipe`'s micro-batch of its largest clips, or of those of `latent_shape`.

    `text` is the tokens of one prompt by encoder; default: `TEXT_TOKENS` in all. ValueError where the layout
    does not divide the ranks.
    """
    recipe.layout.data_parallel(num_ranks)
    shape = latent_shape or (recipe.latent_frames, recipe.latent_height, recipe.latent_width)
    limits = {c.name: recipe.data.token_limits.of(c) for c in recipe.size.contexts}
    text = text or split_text(recipe.size, TEXT_TOKENS)
    return Share(
        size=recipe.size,
        layout=recipe.layout,
        num_ranks=num_ranks,
        precision=recipe.precision,
        micro_batch=recipe.micro_batch,
        tokens=recipe.size.num_tokens(shape),
        text={name: min(tokens, limits[name]) for name, tokens in text.items()},
        fused=accelerator != "cpu" and recipe.precision not in NUMBER_BYTES,
    )
