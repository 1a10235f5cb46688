"""Exact parameters and FLOPs of a Movie Gen transformer, part by part (s3.1.3, Table 1). No torch.

What is counted is the model of `video/model.py`: linear layers without bias (but those of a dit block), one
modulation shared by all layers plus a learned offset a layer, three position tables shared by all layers, and
a projection with a LayerNorm for each text encoder.

FLOPs are those of matrix products, a multiply-add counted as 2; element-wise work is not counted, as
peak FLOP/s leaves it out too. Attention is full: queries against all keys, no causal half; a pack costs the
sum of its clips, which do not see each other. The backward pass is counted as twice the forward pass, so
training costs three forward passes.
"""

TRAIN_PASSES = 3
"""Forward passes a training step costs: one forward, and a backward of two."""

DEFAULT_TEXT_TOKENS = 256
"""Real text tokens of one prompt: a 100-word caption is about 128 tokens in each of UL2 and MetaCLIP."""

COMPONENTS = (
    "patch_embedding",
    "time_embedding",
    "positions",
    "context_projections",
    "modulation",
    "self_attention_projections",
    "self_attention_scores",
    "cross_attention_queries",
    "cross_attention_keys_values",
    "cross_attention_scores",
    "ffn",
    "norms",
    "head",
)
"""Keys of what `parameters` and `forward_flops` return, in the order a sample meets them."""


def parameters(size) -> dict[str, int]:
    """Learned numbers in each component of a `TransformerSize`; the values sum to the model's."""
    width, layers = size.width, size.num_layers
    has_weights = size.block == "llama"  # its norms; the other block has biases
    norms_per_layer = (2 + size.cross_attention_norm) * width * has_weights
    norms_per_layer += 2 * size.head_width * size.qk_norm
    biases = 0 if has_weights else layers
    counts = {
        "patch_embedding": size.input_patch_width * width,
        "time_embedding": _time_embedding(size),
        "positions": (size.max_frames + size.max_height + size.max_width) * width,
        "context_projections": sum(c.width * width + 2 * width for c in size.contexts),
        "modulation": 6 * width**2 + layers * 6 * width,
        "self_attention_projections": layers * 4 * width**2 + biases * 4 * width,
        "cross_attention_queries": layers * 2 * width**2 + biases * 2 * width,
        "cross_attention_keys_values": layers * 2 * width**2 + biases * 2 * width,
        "ffn": layers * _ffn_matrices(size) * width * size.ffn_width + biases * (size.ffn_width + width),
        "norms": layers * norms_per_layer + width * has_weights,
        "head": width * size.output_patch_width,
    }
    return {name: counts.get(name, 0) for name in COMPONENTS}


def forward_flops(size, latent_shape, text_tokens=DEFAULT_TEXT_TOKENS) -> dict[str, int]:
    """FLOPs of one sample's forward pass in each component.

    `latent_shape` is (frames, height, width) of the latent; `text_tokens` the real tokens of the prompt,
    in all (see `split_text`) or by encoder name. Raises ValueError for a latent the size cannot take.
    """
    tokens = size.num_tokens(latent_shape)
    tokens_of = text_tokens if isinstance(text_tokens, dict) else split_text(size, text_tokens)
    text = sum(tokens_of.values())
    width, layers = size.width, size.num_layers
    counts = {
        "patch_embedding": 2 * tokens * size.input_patch_width * width,
        "time_embedding": 2 * _time_embedding(size),
        "context_projections": sum(2 * tokens_of.get(c.name, 0) * c.width * width for c in size.contexts),
        "modulation": 2 * 6 * width**2,
        "self_attention_projections": layers * 2 * tokens * 4 * width**2,
        "self_attention_scores": layers * 4 * tokens**2 * width,  # Q K^T and its product with V
        "cross_attention_queries": layers * 2 * tokens * 2 * width**2,
        "cross_attention_keys_values": layers * 2 * text * 2 * width**2,
        "cross_attention_scores": layers * 4 * tokens * text * width,
        "ffn": layers * 2 * tokens * _ffn_matrices(size) * width * size.ffn_width,
        "head": 2 * tokens * width * size.output_patch_width,
    }
    return {name: counts.get(name, 0) for name in COMPONENTS}


def train_flops(size, latent_shape, text_tokens=DEFAULT_TEXT_TOKENS) -> int:
    """FLOPs of one sample's forward and backward pass: what MFU divides by."""
    return TRAIN_PASSES * sum(forward_flops(size, latent_shape, text_tokens).values())


def token_cost(size, text_tokens=DEFAULT_TEXT_TOKENS) -> tuple[int, int]:
    """(a, b) such that a sample of S tokens costs a * S + b * S**2 train FLOPs, with a prompt of that length.

    Exact but for what each sample costs whatever its length (the prompt's own projections, time embedding,
    modulation): 1.5% of a 768 px image of video_30b, 0.02% of its longest clip.
    """
    width, layers = size.width, size.num_layers
    patches = size.input_patch_width + size.output_patch_width
    matrices = 4 * width + 2 * width + _ffn_matrices(size) * size.ffn_width
    each = 2 * patches * width + layers * (2 * matrices * width + 4 * text_tokens * width)
    return TRAIN_PASSES * each, TRAIN_PASSES * layers * 4 * width


def split_text(size, text_tokens) -> dict[str, int]:
    """Tokens of each encoder for a prompt of `text_tokens` in all, none of them quoted.

    ByT5 sees quoted text only (s3.1.4), so the other encoders share them evenly.
    """
    if text_tokens < 0:
        raise ValueError(f"{text_tokens} text tokens; use 0 or more")
    readers = [c.name for c in size.contexts if c.name != "byt5"]
    if not readers:
        return {}
    share, odd = divmod(text_tokens, len(readers))
    return {name: share + (index < odd) for index, name in enumerate(readers)}


def _time_embedding(size) -> int:
    return size.time_frequencies * size.width + size.width**2


def _ffn_matrices(size) -> int:
    return 3 if size.gated_ffn else 2
