"""The Movie Gen video transformer (s3.1.3) on megatron-core: latents, time and text in, velocity out.

    latent -> patches -> own tokens -> linear -+-> 48 x VideoLayer -> RMSNorm -> linear -> velocity tokens
    frame, row, column --------> positions ----+ (added in every layer)
    t -> time embedding -> six modulations ----+
    UL2, MetaCLIP, ByT5 -> projections --------+ (cross-attention)

B clips, T C H W latent axes, S tokens, D model width, L text tokens.

Clips of one shape are a batch [B, T, C, H, W]; clips of any shapes are a pack, a tuple of [T, C, H, W]: one
sequence [S, 1, D] of all their tokens, in which each clip keeps its own positions, time and text.
"""

import contextlib
from dataclasses import dataclass, field

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_moviegen.precision import MIXED, Fp8, fp8_settings, is_fp8, is_mixed, multiplies_fp8
from nemo_moviegen.sizes import TransformerSize
from nemo_moviegen.video.embeddings import (
    ContextProjections,
    FactorizedPositions,
    SharedModulation,
    TimeEmbedding,
    linear,
    patchify,
    patchify_pack,
    unpatchify,
)
from nemo_moviegen.video.fp8_emulated import EmulatedLinear, Scaling, in_bf16
from nemo_moviegen.video.layer import (
    local_spec,
    pack_conditioning,
    transformer_engine_linear,
    transformer_engine_spec,
)
from nemo_moviegen.video.parallel import (
    gather_tokens,
    pack_of,
    split_tokens,
    sum_gradient_over_sequence_ranks,
)
from nemo_moviegen.video.weights import draw_weights, mark_cut_weights, part_of

DTYPES = {**dict.fromkeys(MIXED, torch.bfloat16), "fp32": torch.float32, "fp64": torch.float64}
"""Of the weights, by precision: those of FP8 are kept in bf16."""

RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Megatron's settings for each `layout.recompute`.

What a layer keeps of each token of its rank, in hidden states (measured: tests/parallel/test_context.py, with
the 30B model's proportions and tensor 1): 21.0 without recomputation, 11.0 selective, 1.0 full; over two
context ranks 26.0, 12.0 and 1.0. What that costs: nothing, the feed-forward (a fifth of the forward FLOPs at
73K tokens) and the gathers again, the whole forward pass. A pack keeps one or two more without recomputation
and with selective: what attention gives, clip by clip and joined (test_packed.py).
"""


@dataclass
class VideoConfig(TransformerConfig):
    """Megatron's configuration plus the size it was made from: build it with `video_config`."""

    size: TransformerSize = field(kw_only=True)
    uses_transformer_engine: bool = field(default=False, kw_only=True)
    compiles: bool = field(default=False, kw_only=True)
    """Whether element-wise work goes through torch.compile (fused.py)."""
    fp8_parts: tuple[str, ...] = field(default=(), kw_only=True)
    """What is in FP8 beside the layers, of precision.PARTS."""
    emulated_fp8: str = field(default="", kw_only=True)
    """The FP8 precision that is emulated (fp8_emulated.py); then megatron knows of no FP8."""
    emulated_layers: tuple[int, ...] = field(default=(), kw_only=True)
    """The layers (from 0) that it is emulated in."""


def video_config(
    size, layout, precision, *, fp8=None, uses_transformer_engine=False, compiles=False
) -> VideoConfig:
    """Megatron's configuration of a `TransformerSize` under a `Layout` in a precision of precision.py.

    `fp8` says what an FP8 precision leaves in bf16 (default: all but the layers). `compiles` sends
    element-wise work through torch.compile (fused.py).

    ValueError where `layout.context_comm` or FP8 needs Transformer Engine and the model is built without it.
    """
    fp8 = fp8 or Fp8()
    if multiplies_fp8(precision, fp8) and not uses_transformer_engine:
        raise ValueError(
            f"precision={precision} is Transformer Engine's alone (on a GPU): set precision=bf16, or "
            "fp8.emulated=true to try out its numbers"
        )
    if layout.context > 1 and layout.context_comm != "all_gather" and not uses_transformer_engine:
        raise ValueError(
            f"layout.context_comm={layout.context_comm} is Transformer Engine's alone (bf16 on a GPU): set "
            "layout.context_comm=all_gather, or layout.context=1"
        )
    emulates = is_fp8(precision) and fp8.emulated
    in_fp8 = range(fp8.bf16_layers, size.num_layers - fp8.bf16_layers)
    dtype = DTYPES[precision]
    is_dit = size.block == "dit"
    if is_dit and emulates:
        raise ValueError(
            f"{size.name}: emulated FP8 has no biases, which block=dit needs: set precision=bf16"
        )
    std = (2 / (5 * size.width)) ** 0.5  # "small init", our default: the paper states none
    return VideoConfig(
        size=size,
        uses_transformer_engine=uses_transformer_engine,
        compiles=compiles,
        fp8_parts=fp8.parts if is_fp8(precision) else (),
        emulated_fp8=precision if emulates else "",
        emulated_layers=tuple(in_fp8) if emulates else (),
        num_layers=size.num_layers,
        hidden_size=size.width,
        ffn_hidden_size=size.ffn_width,
        num_attention_heads=size.num_heads,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6 if is_dit else 1e-5,
        gated_linear_unit=size.gated_ffn,
        activation_func=nn.functional.silu if size.gated_ffn or is_dit else nn.functional.gelu,
        qk_layernorm=size.qk_norm,
        add_bias_linear=is_dit,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=std,
        perform_initialization=False,  # weights.py
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=is_mixed(precision),
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        # Read by Transformer Engine only. It expects each rank to hold two pieces of a clip, first and last,
        # which balances a causal mask. Without a mask no order of tokens changes anything, so ours is plain.
        cp_comm_type=layout.context_comm,
        calculate_per_token_loss=True,  # one division, by the tokens of all ranks
        use_cpu_initialization=not uses_transformer_engine,
        gradient_accumulation_fusion=False,  # needs NVIDIA Apex outside Transformer Engine's linears
        bias_activation_fusion=uses_transformer_engine
        and size.gated_ffn,  # megatron's fused GELU wants a bias
        use_te_activation_func=not uses_transformer_engine and size.gated_ffn,  # SwiGlu of layer.py
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **RECOMPUTE[layout.recompute],
        **fp8_settings(precision, fp8),
        fp8_param=is_fp8(precision) and fp8.gathers,
    )


@contextlib.contextmanager
def without_fp8(config):
    """While this lasts the model of this `VideoConfig` computes in bf16 whatever it is trained in: what it
    measures compares with other runs, and it takes any number of tokens."""
    fp8, config.fp8 = config.fp8, None
    try:
        with in_bf16():
            yield
    finally:
        config.fp8 = fp8


def _layers(config):
    if config.uses_transformer_engine:
        return transformer_engine_spec(config.size)
    return local_spec(config.size, config.emulated_layers)


def _linear_of(part, config):
    """What makes the linears of a part outside the layers, in its precision."""
    if part not in config.fp8_parts:
        return linear
    if config.emulated_fp8:
        return lambda *widths: EmulatedLinear(*widths, Scaling(config.emulated_fp8))
    return lambda *widths: transformer_engine_linear(*widths, config)


def own_tokens(latents, config):
    """Tokens [S/cp/sp, B, patch width] of this rank, and their `Pack`: None for a batch [B, T, C, H, W]."""
    if isinstance(latents, torch.Tensor):
        return split_tokens(patchify(latents, config.size), config), None
    tokens_S1X = patchify_pack(latents, config.size)
    lengths = [config.size.num_tokens(shape) for shape in latent_shapes(latents)]
    pack = pack_of(lengths, config, tokens_S1X.device)
    return split_tokens(tokens_S1X, config, pack), pack


def latent_shapes(latents) -> list[tuple[int, int, int]]:
    """(T, H, W) of each clip of a pack, or that of a batch: one, whatever it holds."""
    if isinstance(latents, torch.Tensor):
        return [(latents.shape[1], *latents.shape[3:])]
    return [(latent_TCHW.shape[0], *latent_TCHW.shape[2:]) for latent_TCHW in latents]


class VideoTransformer(MegatronModule):
    """u(x_t, prompt, t) of eq. 2. Build it after megatron's process groups exist.

    Its weights are a function of `seed`; with None they are whatever the memory held, to be loaded.
    """

    def __init__(self, config: VideoConfig, seed: int | None = 0):
        super().__init__(config)
        size = config.size
        self.size = size
        self.model_type = ModelType.encoder_or_decoder
        self.patch_embedding = _linear_of("patch_embedding", config)(size.input_patch_width, size.width)
        self.positions = FactorizedPositions(size)
        self.time_embedding = TimeEmbedding(size, _linear_of("time_embedding", config))
        self.context_projections = ContextProjections(size, _linear_of("context_projections", config))
        self.modulation = SharedModulation(size, _linear_of("modulation", config))
        self.decoder = TransformerBlock(config, _layers(config))
        self.head = _linear_of("head", config)(size.width, size.output_patch_width)
        token_wise = (self.patch_embedding, self.positions, self.time_embedding, self.modulation, self.head)
        sum_gradient_over_sequence_ranks([p for m in token_wise for p in m.parameters()], config)
        self.to(config.params_dtype)
        mark_cut_weights(self)
        self.whole_shapes = {n: part_of(n, p, config).whole_shape for n, p in self.named_parameters()}
        """Of each parameter over all tensor ranks, by name."""
        if seed is not None:
            draw_weights(self, seed)

    def set_input_tensor(self, input_tensor):
        """Megatron's schedules hand the previous pipeline stage's output here; there is one stage."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, x, t_B, contexts, masks):
        """Velocity tokens of this rank, [S/cp/sp, B, output patch width], in `patchify`'s order.

        `x` is a batch [B, T, C, H, W] or a pack, a tuple of B latents [T, C, H, W], whose velocity is
        [S/cp/sp, 1, output patch width]. `t_B` in [0, 1] (0 is noise) should be fp64: Megatron rounds fp32
        arguments to bf16. `contexts` and `masks` hold one [B, L_i, width_i] and one bool [B, L_i] per text
        encoder. ValueError for shapes the model can not take.
        """
        self._check(x, t_B)
        dtype = self.patch_embedding.weight.dtype
        own_patches, pack = own_tokens(x, self.config)  # [S/cp/sp, B, patch]
        indices_S3 = torch.cat([self.positions.token_indices(shape) for shape in latent_shapes(x)])
        own_indices = split_tokens(indices_S3, self.config, pack)
        context_LBD, mask_BL = self.context_projections(tuple(c.to(dtype) for c in contexts), masks)
        modulation_6BD = self.modulation(self.time_embedding(t_B))
        hidden_SBD = self.decoder(
            self.patch_embedding(own_patches.to(dtype)),
            attention_mask=None,
            context=pack_conditioning(modulation_6BD, context_LBD),
            context_mask=mask_BL,
            rotary_pos_emb=self.positions(own_indices),
            packed_seq_params=pack,
        )
        return self.head(hidden_SBD)

    def _check(self, x, t_B):
        channels = self.size.input_channels
        if isinstance(x, torch.Tensor):
            if x.dim() != 5 or x.shape[2] != channels:
                raise ValueError(
                    f"latents are {tuple(x.shape)}; {self.size.name} takes [B, T, {channels}, H, W]"
                )
            return
        for latent in x:
            if latent.dim() != 4 or latent.shape[1] != channels:
                raise ValueError(
                    f"a latent of a pack is {tuple(latent.shape)}; {self.size.name} takes "
                    f"[T, {channels}, H, W]"
                )
        if t_B.shape != (len(x),):
            raise ValueError(
                f"{tuple(t_B.shape)} times for a pack of {len(x)} clips: pass a time for each, t_B"
            )

    @torch.no_grad()
    def velocity(self, x_BTCHW, t_B, contexts, masks):
        """The whole velocity [B, T, C, H, W] on every rank, for sampling."""
        tokens_SBX = gather_tokens(self(x_BTCHW, t_B, contexts, masks), self.config)
        return unpatchify(tokens_SBX, (x_BTCHW.shape[1], *x_BTCHW.shape[3:]), self.size)
