"""Number formats a run computes in: plain names and megatron's settings for them, without torch.

    precision      matrix products      weights and moments the optimiser keeps, gradient reduction
    -------------  -------------------  -----------------------------------------------------------
    bf16           bf16                 fp32
    fp8_delayed    FP8 in the layers    fp32; scales from the largest values of 1,024 steps before
    fp8_current    FP8 in the layers    fp32; one scale a tensor, from the tensor itself
    fp8_block      FP8 in the layers    fp32; one scale a block of 128 (x 128) values
    fp32, fp64     fp32, fp64           the same

FP8 is Transformer Engine's "hybrid": e4m3 forward, e5m2 for gradients, in the linears of the 48 layers (of
self-attention, cross-attention and the feed-forward). What else there is stays in bf16 unless `Fp8` says
otherwise; norms, residuals and the validation loss always do. The paper states no precision; all of this is
our default.
"""

from dataclasses import dataclass

FP8 = {
    "fp8_delayed": {
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "fp8_current": {"fp8_recipe": "tensorwise"},
    "fp8_block": {"fp8_recipe": "blockwise"},
}
"""The ways to scale FP8, each with what megatron is told of it."""
MIXED = ("bf16", *FP8)
PRECISIONS = (*MIXED, "fp32", "fp64")
FP8_ROWS, FP8_COLUMNS = 8, 16
"""What the rows and columns of an FP8 matrix divide by (Transformer Engine)."""
LEAST_CAPABILITY = {"fp8_delayed": (8, 9), "fp8_current": (8, 9), "fp8_block": (9, 0)}
"""CUDA compute capability that has the formats: Ada (8.9), Hopper (9.0)."""


PARTS = ("patch_embedding", "time_embedding", "modulation", "context_projections", "head")
"""Matrix products of the model outside its layers."""


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """What an FP8 precision multiplies in FP8, and what in bf16. No effect of any of it without one."""

    bf16_layers: int = 0
    """Layers at each end of the decoder that stay in bf16."""
    bf16_parts: tuple[str, ...] = PARTS
    """Parts outside the layers that do."""
    attention: bool = False
    """Scores and values of self-attention in FP8 too: Transformer Engine, on Hopper with fp8_delayed."""
    gathers: bool = False
    """Weights are kept and gathered in FP8, beside the optimiser's fp32: half the traffic of bf16."""
    emulated: bool = False
    """On any machine: operands are rounded to FP8 with the real scaling, products are fp32's. To try out the
    numbers, not the speed."""
    report_every: int = 0
    """Steps between lines of fp8.jsonl: largest values, what was cut off and what fell to zero; 0 = none."""

    def __post_init__(self):
        object.__setattr__(self, "bf16_parts", tuple(self.bf16_parts))  # YAML has lists
        if unknown := [part for part in self.bf16_parts if part not in PARTS]:
            raise ValueError(f"fp8.bf16_parts has {', '.join(unknown)}; use some of {', '.join(PARTS)}")
        if self.bf16_layers < 0 or self.report_every < 0:
            raise ValueError(
                f"fp8.bf16_layers is {self.bf16_layers}, fp8.report_every {self.report_every}: use 0 or more"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Those outside the layers that are in FP8."""
        return tuple(part for part in PARTS if part not in self.bf16_parts)


def is_mixed(precision) -> bool:
    """Whether products are in bf16 or less, beside fp32 main weights: what every bf16 setting asks."""
    return precision in MIXED


def is_fp8(precision) -> bool:
    """Whether the layers' linears multiply in FP8."""
    return precision in FP8


def multiplies_fp8(precision, fp8) -> bool:
    """Whether that is done by a GPU's FP8 units, and not emulated."""
    return is_fp8(precision) and not fp8.emulated


def fp8_settings(precision, fp8) -> dict:
    """Megatron's settings, by the names its configuration and NeMo's precision plugin share; {} without FP8,
    and where it is emulated: then megatron's layers are bf16's."""
    if not multiplies_fp8(precision, fp8):
        return {}
    ends = {"num_layers_at_start_in_bf16": fp8.bf16_layers, "num_layers_at_end_in_bf16": fp8.bf16_layers}
    return {
        "fp8": "hybrid",
        **FP8[precision],
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        **ends,
        "fp8_dot_product_attention": fp8.attention,
    }


def check_fp8(recipe):
    """ValueError where widths, prompts or packs of a `VideoRecipe` are no FP8 matrices; it checks latents.

    Widths divide by 16 and rows by 8, which is why prompts are padded to their limits (training/data.py).
    """
    tensor, size = recipe.layout.tensor, recipe.size
    widths = (size.width // tensor, size.ffn_width // tensor)
    if any(width % FP8_COLUMNS for width in widths):
        raise ValueError(
            f"{recipe.name}: FP8 takes matrices in {FP8_COLUMNS}s of columns, and tensor {tensor} leaves "
            f"{widths[0]} of size.width and {widths[1]} of size.ffn_width: lower layout.tensor, or set "
            "precision=bf16"
        )
    text_tokens = sum(recipe.data.token_limits.of(context) for context in size.contexts)
    if text_tokens % FP8_ROWS:
        raise ValueError(
            f"{recipe.name}: FP8 takes tokens in {FP8_ROWS}s, and prompts have up to {text_tokens}: set "
            f"data.token_limits to a sum that {FP8_ROWS} divides, or precision=bf16"
        )
    if recipe.data.batching == "packed":
        raise ValueError(
            f"{recipe.name}: FP8 takes tokens in {FP8_ROWS}s, and packs have any number: set "
            "data.batching=bucket, or precision=bf16"
        )
    _check_parts(recipe)
    _check_engine(recipe)


def _check_parts(recipe):
    fp8, size = recipe.fp8, recipe.size
    if 2 * fp8.bf16_layers > size.num_layers:
        raise ValueError(
            f"{recipe.name}: fp8.bf16_layers {fp8.bf16_layers} at each end of {size.num_layers} layers: "
            f"use 0 to {size.num_layers // 2}"
        )
    of_clips = [part for part in ("time_embedding", "modulation") if part in fp8.parts]
    if of_clips and recipe.micro_batch % FP8_ROWS:
        raise ValueError(
            f"{recipe.name}: {of_clips[0]} has a row a clip, {recipe.micro_batch} of micro_batch, and FP8 "
            f"takes {FP8_ROWS}s: add it to fp8.bf16_parts, or set micro_batch to a multiple of {FP8_ROWS}"
        )
    widths = {"patch_embedding": [size.input_patch_width], "head": [size.output_patch_width]}
    widths |= {"context_projections": [context.width for context in size.contexts]}
    widths |= {"time_embedding": [size.time_frequencies]}
    for part in fp8.parts:
        if odd := [width for width in widths.get(part, []) if width % FP8_COLUMNS]:
            raise ValueError(
                f"{recipe.name}: {part} is {odd[0]} wide, and FP8 takes {FP8_COLUMNS}s of columns: add it "
                "to fp8.bf16_parts"
            )


def _check_engine(recipe):
    """What Transformer Engine and megatron do not do, though the matrices fit."""
    fp8, is_delayed = recipe.fp8, recipe.precision == "fp8_delayed"
    if fp8.bf16_layers and is_delayed:
        raise ValueError(
            f"{recipe.name}: megatron keeps no layer in bf16 with delayed scaling: set fp8.bf16_layers=0, or "
            "precision=fp8_current"
        )
    if fp8.parts and is_delayed:
        raise ValueError(
            f"{recipe.name}: with delayed scaling the layers are the one FP8 region of a step, and "
            f"{fp8.parts[0]} is outside: add it to fp8.bf16_parts, or set precision=fp8_current"
        )
    if fp8.attention and not is_delayed:
        raise ValueError(
            f"{recipe.name}: fp8.attention on Hopper takes delayed scaling: set precision=fp8_delayed, or "
            "fp8.attention=false"
        )
    if fp8.attention and recipe.layout.context > 1 and recipe.layout.context_comm == "all_gather":
        raise ValueError(
            f"{recipe.name}: fp8.attention over context {recipe.layout.context} gathers no keys: set "
            "layout.context_comm=a2a or p2p, layout.context=1, or fp8.attention=false"
        )
    if fp8.emulated and (fp8.attention or fp8.gathers):
        raise ValueError(
            f"{recipe.name}: fp8.emulated rounds the operands of linears alone: set fp8.attention=false and "
            "fp8.gathers=false"
        )
    if fp8.gathers and recipe.layout.sharding == "none":
        raise ValueError(
            f"{recipe.name}: fp8.gathers is of weights that are shared out, and layout.sharding is none: set "
            "layout.sharding=optimizer or full, or fp8.gathers=false"
        )


def why_not_fp8(precision, capability, has_transformer_engine) -> str:
    """What this machine lacks for an FP8 `precision`; "" where it lacks nothing.

    `capability` is CUDA's (major, minor) of the GPU, None where there is none.
    """
    least = LEAST_CAPABILITY[precision]
    if capability is None:
        return f"a GPU of compute capability {least[0]}.{least[1]} or more, and here is none"
    if tuple(capability) < least:
        have = ".".join(map(str, capability))
        return f"a GPU of compute capability {least[0]}.{least[1]} or more, and this one has {have}"
    if not has_transformer_engine:
        return "Transformer Engine, which is not installed (pip install -r requirements-gpu.txt)"
    return ""
