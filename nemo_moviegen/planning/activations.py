"""Bytes of activations: what each layer keeps for the backward pass, and what works on top of it.

What a layer keeps is a table of the tensors autograd saves in `video/layer.py`, by name; tests compare its
sum with what a built model saves, and the peak with the tensors of whole training steps. In hidden states
a token (tensor 1, the 30B model's proportions): 21, and 11 where the feed-forward is made again.

    recomputation   a layer keeps                  its backward pass works on
    none            all of the table               gradients
    selective       all but the feed-forward       that branch again, and gradients
    full            what went in                   all of the table again, and gradients
"""

STATISTIC_BYTES = 4
"""Of a norm's or softmax's statistic."""
FEED_FORWARD = (
    "modulated 3",
    "ffn gate and value",
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
    kept = {
        "hidden 1": own,
        "modulated 1": own,
        "queries, keys, values": 3 * cut,
        "normed queries and keys": size.qk_norm * 2 * cut,
        GATHERED: _gathered(share),
        "attention": cut * _outputs(share) + softmax,
        "attention out": own,
        "hidden 2": own,
        "norm 2": own * size.cross_attention_norm,
        "text queries": cut,
        "text keys and values": 2 * text,
        "text attention": cut + softmax,
        "hidden 3": own,
        "modulated 3": own,
        "ffn gate and value": ffn * (2 if size.gated_ffn else 1),
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
        "full": sum(table.values()) - _hidden_state(share),
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
    return positions + 2 * own + patches


def _outputs(share):
    """Local kernels keep what each group of heads gives beside the whole, where context ranks share keys."""
    return 2 if share.layout.context > 1 and not share.fused else 1


def _again(table):
    return sum(table.get(name, 0) for name in (*FEED_FORWARD, GATHERED))


def _gradients(share):
    """Three hidden states' and the largest matrix's; where positions are an input of every layer, theirs; and
    what a norm's gradient is computed from, which compiled kernels do not store."""
    size, layout, own = share.size, share.layout, _hidden_state(share)
    whole = share.context_tokens * size.width * share.number_bytes if share.sequence > 1 else 0.0
    # Megatron FSDP's gradients of a layer are counted in memory.py
    is_full, ffn = layout.sharding == "full", size.ffn_width * (2 if size.gated_ffn else 1)
    matrix = 0.0 if is_full else size.width * ffn / layout.tensor * share.number_bytes
    stored = 0.0 if share.fused else 2 * share.own_tokens * size.width * max(4, share.number_bytes)
    return own * (4 if layout.recompute == "full" else 3) + stored + whole + matrix


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
