"""Bytes of activations: what each layer keeps for the backward pass, and what works on top of it.

What a layer keeps is a table of the tensors autograd saves in `video/layer.py`, by name; tests compare its
sum with what a built model saves, and the peak with the tensors of whole training steps. In hidden states
a token (tensor 1, the 30B model's proportions): 30 with megatron's local kernels, 23 with Transformer
Engine's.

    recomputation   a layer keeps                  its backward pass works on
    none            all of the table               gradients
    selective       all but the feed-forward       that branch again, and gradients
    full            what went in                   all of the table again, and gradients
"""

STATISTIC_BYTES = 4
"""Of a norm's or softmax's statistic."""
FEED_FORWARD = (
    "normed 3",
    "norm 3",
    "modulated 3",
    "ffn gate and value",
    "ffn activated",
    "ffn value",
    "ffn product",
    "ffn out",
)
"""Entries of `kept_by_layer` that selective recomputation makes again."""
GATHERED = "gathered keys and values"


def kept_by_layer(share) -> dict[str, float]:
    """Bytes of each tensor a layer saves for its backward pass without recomputation, one micro-batch."""
    size, layout, number = share.size, share.layout, share.number_bytes
    own = _hidden_state(share)
    cut = share.context_tokens * size.width / layout.tensor * number
    ffn = share.context_tokens * size.ffn_width / layout.tensor * number
    text = share.text_tokens * size.width / layout.tensor * number
    softmax = share.context_tokens * size.num_heads / layout.tensor * STATISTIC_BYTES
    hidden, normed = _norm_inputs(share)
    kept = {
        "hidden 1": own * hidden,
        "normed 1": own * normed,
        "norm 1": own,
        "modulated 1": own,
        "queries, keys, values": 3 * cut,
        "normed queries and keys": size.qk_norm * 2 * (1 + normed + (hidden - 1)) * cut,
        GATHERED: _gathered(share),
        "attention": cut * _outputs(share) + softmax,
        "attention out": own,
        "hidden 2": own,
        "normed 2": own * normed * size.cross_attention_norm,
        "norm 2": own * size.cross_attention_norm,
        "text queries": cut,
        "text keys and values": 2 * text,
        "text attention": cut + softmax,
        "hidden 3": own * hidden,
        "normed 3": own * normed,
        "norm 3": own,
        "modulated 3": own,
        "ffn gate and value": ffn * (2 if size.gated_ffn else 1),
        # a fused SwiGLU computes both again from the one above
        "ffn activated": ffn * (size.gated_ffn and not share.fused),
        "ffn value": ffn * (size.gated_ffn and not share.fused),
        "ffn product": ffn,
        "ffn out": own,
    }
    return {name: bytes_ for name, bytes_ in kept.items() if bytes_}


def kept(share) -> dict[str, float]:
    """Bytes kept by all layers ("layers") and around them, at the end of a forward pass."""
    table, recompute = kept_by_layer(share), share.layout.recompute
    if recompute == "full":
        layer = _hidden_state(share)
    elif recompute == "selective":
        layer = sum(table.values()) - _again(table)
    else:
        layer = sum(table.values())
    return {"layers": share.size.num_layers * layer, "around layers": _around(share)}


def working(share) -> float:
    """Bytes on top of `kept` while one layer is computed backward: what it makes again, and gradients."""
    table, recompute = kept_by_layer(share), share.layout.recompute
    again = {
        "none": 0.0,
        "selective": _again(table),
        "full": sum(table.values()) - _hidden_state(share) / _norm_inputs(share)[0],
    }[recompute]
    return again + _gradients(share)


def attention_workspace(share) -> float:
    """Bytes on top of that of keys, values and their gradients of all context ranks, while one layer attends.

    Local kernels take a quarter of the heads at a time. What the feed-forward kept is gone by then.
    """
    if share.layout.context == 1:
        return 0.0
    table = kept_by_layer(share)
    freed = sum(table.get(name, 0) for name in FEED_FORWARD)
    return max(0.0, _whole_keys(share) * (2 if share.fused else 0.5) - freed)


def head_and_loss(share) -> float:
    """Bytes of what comes out of the model and of what it is compared with: the logits of this model."""
    patch = share.size.output_patch_width
    whole = share.micro_batch * share.tokens * patch * _data_bytes(share)
    own = share.own_tokens * patch
    return own * share.number_bytes + own * _data_bytes(share) + whole


def _hidden_state(share):
    return share.own_tokens * share.size.width * share.number_bytes


def _around(share):
    """Positions, the last norm and the patches: nothing of it is recomputed."""
    own = _hidden_state(share)
    positions = own if share.layout.recompute == "full" else 0.0
    patches = share.own_tokens * share.size.input_patch_width * share.number_bytes
    return positions + own * (1 + sum(_norm_inputs(share))) + patches


def _norm_inputs(share):
    """How often a norm keeps its input, and its input scaled: torch's without a fused kernel keeps both, in
    fp32."""
    if share.fused:
        return 1, 0
    return (2, 2) if share.number_bytes == 2 else (1, 1)


def _outputs(share):
    """Local kernels keep what each group of heads gives beside the whole, where context ranks share keys."""
    return 2 if share.layout.context > 1 and not share.fused else 1


def _again(table):
    return sum(table.get(name, 0) for name in (*FEED_FORWARD, GATHERED))


def _gradients(share):
    """Three hidden states' and the largest matrix's; where positions are an input of every layer, theirs."""
    size, layout, own = share.size, share.layout, _hidden_state(share)
    whole = share.context_tokens * size.width * share.number_bytes if share.sequence > 1 else 0.0
    # Megatron FSDP's gradients of a layer are counted in memory.py
    is_full, ffn = layout.sharding == "full", size.ffn_width * (2 if size.gated_ffn else 1)
    matrix = 0.0 if is_full else size.width * ffn / layout.tensor * share.number_bytes
    return own * (4 if layout.recompute == "full" else 3) + whole + matrix


def _gathered(share):
    """Local kernels keep what they collected from the context ranks; Transformer Engine collects it again."""
    if share.layout.context == 1 or share.fused:
        return 0.0
    return _whole_keys(share)


def _whole_keys(share):
    size, layout = share.size, share.layout
    return 2 * share.micro_batch * share.tokens * size.width / layout.tensor * share.number_bytes


def _data_bytes(share):
    """Latents and targets are kept in float32 where products are bf16."""
    return max(4, share.number_bytes)
