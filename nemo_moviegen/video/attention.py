"""Core attention of the local spec: torch's scaled dot product, bidirectional, keys and values gathered."""

import torch
from megatron.core.transformer.module import MegatronModule

from nemo_moviegen.video.parallel import gather_keys_values


class LocalAttention(MegatronModule):
    """Drop-in for megatron's core attention; takes and returns [S/cp, B, ...] with N/tp heads of width H."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, **_):
        super().__init__(config)
        # Text keys and values are whole on every context rank already.
        self.gathers = attention_type == "self" and config.context_parallel_size > 1

    def forward(self, query, key, value, attention_mask, **_):
        """`attention_mask` is bool [B, L], True at real keys, or None where all are."""
        if self.gathers:
            key, value = gather_keys_values(key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, N/tp, S, H]
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(2)  # [S/cp, B, N/tp * H]
