"""The backbone of video/model.py in plain PyTorch, without megatron: what `moviegen bench steps` compares
with.

Same arithmetic, one device, batch first; tests/test_bench_steps.py copies weights over and compares
velocities and gradients in fp64, so that what is timed is the same work.
"""

import torch
from torch import nn
from torch.nn import functional

from nemo_moviegen.video.embeddings import (
    ContextProjections,
    FactorizedPositions,
    SharedModulation,
    TimeEmbedding,
    patchify,
)


class PlainTransformer(nn.Module):
    """u(x_t, prompt, t) of a `TransformerSize` with a gated FFN: latents [B, T, C, H, W], t [B], features and
    masks by text encoder -> velocity tokens [S, B, X], as `VideoTransformer` gives them on one rank."""

    def __init__(self, size):
        super().__init__()
        if not size.gated_ffn:
            raise ValueError(f"{size.name}: the plain block has SwiGLU alone; use a size with gated_ffn")
        self.size = size
        self.patch_embedding = nn.Linear(size.input_patch_width, size.width, bias=False)
        self.positions = FactorizedPositions(size)
        self.time_embedding = TimeEmbedding(size)
        self.context_projections = ContextProjections(size)
        self.modulation = SharedModulation(size)
        self.layers = nn.ModuleList(PlainLayer(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.head = nn.Linear(size.width, size.output_patch_width, bias=False)

    def forward(self, x_BTCHW, t_B, contexts, masks):
        tokens_BSX = patchify(x_BTCHW, self.size).transpose(0, 1)
        hidden = self.patch_embedding(tokens_BSX)
        shape = (x_BTCHW.shape[1], *x_BTCHW.shape[3:])
        positions = self.positions(self.positions.token_indices(shape)).transpose(0, 1)
        context_LBD, mask_BL = self.context_projections(contexts, masks)
        context_BLD, mask_B11L = context_LBD.transpose(0, 1).contiguous(), mask_BL[:, None, None, :]
        modulation_6BD = self.modulation(self.time_embedding(t_B))
        for layer in self.layers:
            hidden = layer(hidden, positions, modulation_6BD, context_BLD, mask_B11L)
        return self.head(self.norm(hidden)).transpose(0, 1)


class PlainLayer(nn.Module):
    """video/layer.py's wiring, as one would write it down."""

    def __init__(self, size):
        super().__init__()
        width, qk_norm = size.width, size.qk_norm

        def norm(there=True, columns=width):
            return nn.RMSNorm(columns, eps=1e-5) if there else nn.Identity()

        self.num_heads = size.num_heads
        self.modulation_bias = nn.Parameter(torch.zeros(6, width))
        self.norm1, self.norm2, self.norm3 = norm(), norm(size.cross_attention_norm), norm()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = norm(qk_norm, size.head_width), norm(qk_norm, size.head_width)
        self.out = nn.Linear(width, width, bias=False)
        self.text_query = nn.Linear(width, width, bias=False)
        self.text_key_value = nn.Linear(width, 2 * width, bias=False)
        self.text_out = nn.Linear(width, width, bias=False)
        self.gate_value = nn.Linear(width, 2 * size.ffn_width, bias=False)
        self.ffn_out = nn.Linear(size.ffn_width, width, bias=False)

    def forward(self, hidden, positions, modulation_6BD, context_BLD, mask_B11L):
        modulation = (modulation_6BD + self.modulation_bias.unsqueeze(1)).unsqueeze(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # each [B, 1, D]
        hidden = hidden + positions
        hidden = hidden + gate1 * self.self_attention(self.norm1(hidden) * (1 + scale1) + shift1)
        hidden = hidden + self.cross_attention(self.norm2(hidden), context_BLD, mask_B11L)
        return hidden + gate2 * self.feed_forward(self.norm3(hidden) * (1 + scale2) + shift2)

    def self_attention(self, x_BSD):
        query, key, value = self.qkv(x_BSD).view(*x_BSD.shape[:2], self.num_heads, 3, -1).unbind(3)
        query, key = self.query_norm(query), self.key_norm(key)
        return self.out(self.attend(query, key, value))

    def cross_attention(self, x_BSD, context_BLD, mask_B11L):
        query = self.text_query(x_BSD).view(*x_BSD.shape[:2], self.num_heads, -1)
        pair = self.text_key_value(context_BLD).view(*context_BLD.shape[:2], self.num_heads, 2, -1)
        key, value = pair.unbind(3)
        return self.text_out(self.attend(query, key, value, mask_B11L))

    def attend(self, query, key, value, mask=None):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    def feed_forward(self, x_BSD):
        gate, value = self.gate_value(x_BSD).chunk(2, dim=-1)
        return self.ffn_out(functional.silu(gate) * value)
