"""The transformer layer of s3.1.3: LLaMa3's block with cross-attention, shared adaLN and full attention.

    x = x + positions                                   every layer, shared tables
    x = x + gate1 * SelfAttention(RMSNorm(x) * (1 + scale1) + shift1)
    x = x + CrossAttention(x, context)
    x = x + gate2 * FFN(RMSNorm(x) * (1 + scale2) + shift2)

The dit block of s3.6.2 has the same wiring with other norms, biases and FFN (`sizes.TransformerSize.block`).
The layer fixes this wiring; `local_spec` and `transformer_engine_spec` pick the kernels and differ in nothing
else.
"""

import copy
import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn
from torch.nn import functional

from nemo_moviegen.video import fused
from nemo_moviegen.video.attention import LocalAttention
from nemo_moviegen.video.fp8_emulated import EmulatedColumn, EmulatedRow
from nemo_moviegen.video.linear import Column, Row
from nemo_moviegen.video.parallel import sum_gradient_over_sequence_ranks

NUM_MODULATIONS = 6


def pack_conditioning(modulation_6BD, context_LBD):
    """What the layers need beside tokens, as one tensor [6 + L, B, D]. B clips also where they are a pack.

    `TransformerBlock.forward` hands its layers `context` and recomputes through it, and has no free argument.
    """
    return torch.cat((modulation_6BD, context_LBD))


def unpack_conditioning(conditioning):
    """Modulation [6, B, D] and context [L, B, D] of `pack_conditioning`."""
    return conditioning.split((NUM_MODULATIONS, len(conditioning) - NUM_MODULATIONS))


def for_each_clip(function, tokens, vectors_BD, pack=None):
    """function(*tokens, *vectors): all tokens [S, B, D] with the vectors [B, D] of their clips.

    In a pack tokens are [S, 1, D] of clips one after the other: cut, computed and joined. To look the vectors
    up for every token would keep as much as the tokens take, and sum gradients in no fixed order on a GPU.
    """
    if pack is None:
        return function(*tokens, *vectors_BD)
    clips = zip(*(x_SBD.split(pack.own_lengths) for x_SBD in tokens), *vectors_BD, strict=True)
    return torch.cat([function(*of_clip) for of_clip in clips])


class VideoLayer(TransformerLayer):
    """One layer. Positions travel as `rotary_pos_emb`: an argument for positions; none are rotary here."""

    def __init__(self, config, submodules, layer_number=1, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        dtype = config.params_dtype
        self.modulation_bias = nn.Parameter(torch.zeros(NUM_MODULATIONS, config.hidden_size, dtype=dtype))
        sum_gradient_over_sequence_ranks([self.modulation_bias], config)

    def forward(
        self,
        hidden_states,
        attention_mask,
        context,
        context_mask,
        rotary_pos_emb,
        packed_seq_params=None,
        **_,
    ):
        """Tokens [S/cp/sp, B, D], `context` from `pack_conditioning`, `context_mask` bool [B, L],
        `rotary_pos_emb` the positions [S/cp/sp, 1, D] -> tokens and the unchanged conditioning.

        With a `Pack` as `packed_seq_params`, tokens are [S/cp/sp, 1, D] of B clips.
        """
        modulation_6BD, text_LBD = unpack_conditioning(context)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_6BD + self.modulation_bias.unsqueeze(1)
        pack = packed_seq_params

        hidden = hidden_states + rotary_pos_emb
        attended = _with_bias(
            *self.self_attention(
                for_each_clip(self.input_layernorm, (hidden,), (scale1, shift1), pack),
                attention_mask=None,
                packed_seq_params=pack,
            )
        )
        hidden = for_each_clip(self._gated_sum, (hidden, attended), (gate1,), pack)
        from_text = _with_bias(
            *self.cross_attention(
                self.pre_cross_attn_layernorm(hidden),
                attention_mask=context_mask,
                key_value_states=text_LBD,
                packed_seq_params=pack,
            )
        )
        hidden = hidden + from_text
        if self.recompute_mlp:
            with_pack = functools.partial(self._feed_forward, pack)
            hidden = tensor_parallel.checkpoint(with_pack, False, hidden, shift2, scale2, gate2)
        else:
            hidden = self._feed_forward(pack, hidden, shift2, scale2, gate2)
        return hidden, context

    def _feed_forward(self, pack, hidden, shift, scale, gate):
        """The branch that `recompute = selective` computes again: its ffn-wide activations are the largest of
        a layer, and beside attention over 73K tokens its FLOPs are few."""
        normed = for_each_clip(self.pre_mlp_layernorm, (hidden,), (scale, shift), pack)
        mixed = _with_bias(*self.mlp(normed))
        return for_each_clip(self._gated_sum, (hidden, mixed), (gate,), pack)

    def _gated_sum(self, hidden, branch, gate_BD):
        return fused.gated_sum(hidden, branch, gate_BD, self.config.compiles)


def _with_bias(output, bias):
    """What a branch gives: megatron's leave the bias of their last linear, if it has one, to the layer."""
    return output if bias is None else output + bias


class RMSNorm(nn.Module):
    """RMSNorm with weight (Table 9). Megatron's refuses sequence parallelism; this one marks its weight."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__()
        self.eps, self.compiles = eps, config.compiles
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        sum_gradient_over_sequence_ranks([self.weight], config)

    def forward(self, x):
        return fused.rms_norm(x, self.weight, self.eps, self.compiles)


class ModulatedNorm(RMSNorm):
    """RMSNorm, then adaLN: what it gives, scaled and shifted by the time of its clip."""

    def forward(self, x_SBD, scale_BD, shift_BD):
        return fused.norm_modulate(x_SBD, self.weight, scale_BD, shift_BD, self.eps, self.compiles)


class LayerNorm(nn.Module):
    """LayerNorm without weights (Table 9, of the DiT block)."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)


class ModulatedLayerNorm(LayerNorm):
    """LayerNorm, then adaLN: what it gives, scaled and shifted by the time of its clip."""

    def forward(self, x_SBD, scale_BD, shift_BD):
        return super().forward(x_SBD) * (1 + scale_BD) + shift_BD


class SwiGlu(nn.Module):
    """The local spec's; with Transformer Engine megatron compiles its own."""

    def __init__(self, config):
        super().__init__()

    def forward(self, gate_value):
        return fused.swiglu(gate_value)


def with_whole_input(column_linear):
    """A column-parallel linear class whose input is whole on every tp rank also under sequence parallelism.

    Text is replicated, so its keys and values must not be gathered from sequence-parallel pieces.
    """

    class WholeInput(column_linear):
        def __init__(self, *args, config, **kwargs):
            config = copy.copy(config)
            config.sequence_parallel = False
            super().__init__(*args, config=config, **kwargs)

    WholeInput.__name__ = f"WholeInput{column_linear.__name__}"
    return WholeInput


def local_spec(size, fp8_layers=()):
    """Plain torch and megatron's own parallel linears: CPU, tests, reference. `fp8_layers` are those (from 0)
    whose linears emulate FP8."""
    activation = SwiGlu if size.gated_ffn else None
    spec = _spec(size, RMSNorm, Column, Row, LocalAttention, activation)
    if fp8_layers:
        emulated = _spec(size, RMSNorm, EmulatedColumn, EmulatedRow, LocalAttention, activation)
        for index in fp8_layers:
            spec.layer_specs[index] = emulated.layer_specs[index]
    return spec


def transformer_engine_spec(size):
    """Transformer Engine's norms, linears (FP8) and cuDNN self-attention. Text attention stays with torch:
    0.5% of the FLOPs, and Transformer Engine's context parallelism would split its keys. So do the norms that
    are modulated: its own would keep what it gives for the modulation's gradient."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return _spec(size, TENorm, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def transformer_engine_linear(in_width, out_width, config):
    """Transformer Engine's linear outside the layers, in FP8 where `config` has it while it computes."""
    import transformer_engine.pytorch as engine
    from megatron.core.fp8_utils import get_fp8_context

    class Linear(engine.Linear):
        def forward(self, x):
            with get_fp8_context(config):
                return super().forward(x)

    return Linear(in_width, out_width, bias=False, params_dtype=config.params_dtype)


def _spec(size, norm, column, row, self_core, activation=None):
    qk_norm = norm if size.qk_norm else None
    modulated = ModulatedNorm
    if size.block == "dit":
        norm, modulated = LayerNorm, ModulatedLayerNorm
    no_mask = {"attn_mask_type": AttnMaskType.no_mask}
    layer = TransformerLayerSubmodules(
        input_layernorm=modulated,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params=no_mask,
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=self_core,
                linear_proj=row,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        pre_cross_attn_layernorm=norm if size.cross_attention_norm else IdentityOp,
        cross_attention=ModuleSpec(
            module=CrossAttention,
            params=no_mask,
            submodules=CrossAttentionSubmodules(
                linear_q=column,
                linear_kv=with_whole_input(column),
                core_attention=LocalAttention,
                linear_proj=row,
            ),
        ),
        pre_mlp_layernorm=modulated,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=activation),
        ),
    )
    layer_spec = ModuleSpec(module=VideoLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * size.num_layers, layer_norm=norm)
