"""Number formats a run computes in: plain names and megatron's settings for them, without torch.

    precision      matrix products      weights and moments the optimiser keeps, gradient reduction
    -------------  -------------------  -----------------------------------------------------------
    bf16           bf16                 fp32
    fp8_delayed    FP8 in the layers    fp32; scales from the largest values of 1,024 steps before
    fp8_current    FP8 in the layers    fp32; one scale a tensor, from the tensor itself
    fp8_block      FP8 in the layers    fp32; one scale a block of 128 (x 128) values
    fp32, fp64     fp32, fp64           the same

FP8 is Transformer Engine's "hybrid": e4m3 forward, e5m2 for gradients, in the linears of the 48 layers (of
self-attention, cross-attention and the feed-forward). All else stays in bf16: patch embedding, time
embedding, modulation, context projections and head, which are plain linears; attention itself, norms and
residuals; the weights as they are kept and gathered; `bf16_layers` whole layers at each end; and the
validation loss. The paper states no precision; all of this is our default.
"""

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


def is_mixed(precision) -> bool:
    """Whether products are in bf16 or less, beside fp32 main weights: what every bf16 setting asks."""
    return precision in MIXED


def is_fp8(precision) -> bool:
    """Whether the layers' linears multiply in FP8."""
    return precision in FP8


def fp8_settings(precision, bf16_layers) -> dict:
    """Megatron's settings, by the names its configuration and NeMo's precision plugin share; {} without FP8.

    `bf16_layers` at each end of the decoder keep bf16.
    """
    if not is_fp8(precision):
        return {}
    ends = {"num_layers_at_start_in_bf16": bf16_layers, "num_layers_at_end_in_bf16": bf16_layers}
    return {"fp8": "hybrid", **FP8[precision], "first_last_layers_bf16": bf16_layers > 0, **ends}


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
    if recipe.bf16_layers and recipe.precision == "fp8_delayed":
        raise ValueError(
            f"{recipe.name}: megatron keeps no layer in bf16 with delayed scaling: set bf16_layers=0, or "
            "precision=fp8_current"
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
