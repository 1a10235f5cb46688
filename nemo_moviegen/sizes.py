"""Sizes of the Movie Gen models: enough to count parameters, FLOPs and bytes. No torch.

Numbers are the paper's tables; where it is silent the comment says "our default".
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ContextSize:
    """One frozen text encoder as the backbone sees it (Movie Gen s3.1.4)."""

    name: str
    """ul2, metaclip, byt5 or t5: the key of its features in a latent shard."""
    width: int
    """Feature width before the projection to the model dimension."""
    max_tokens: int
    """Tokens kept of one prompt; longer prompts are cut."""


BLOCKS = ("llama", "dit")


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Sizes of a Movie Gen transformer (Table 1): latents in, velocities out."""

    name: str
    num_layers: int
    width: int
    """Model dimension D."""
    ffn_width: int
    """Hidden width of the FFN, before SwiGLU's gate doubles it."""
    num_heads: int
    input_channels: int = 16
    """Latent channels, plus those of anything concatenated to them."""
    output_channels: int = 16
    patch_frames: int = 1
    patch_height: int = 2
    patch_width: int = 2
    max_frames: int = 32
    """Length of the temporal position table, in patches; likewise the two below."""
    max_height: int = 96
    max_width: int = 96
    contexts: tuple[ContextSize, ...] = ()
    block: str = "llama"
    """llama: RMSNorm with weights, no biases (s3.1.3). dit: what it is compared with (s3.6.2, Table 9):
    LayerNorm without weights, biases, a plain FFN with SiLU."""
    gated_ffn: bool = True
    """SwiGLU (video) or a plain two-matrix FFN: GELU (audio), SiLU in a dit block."""
    qk_norm: bool = False
    """RMSNorm on queries and keys: a stability switch, not in the paper."""
    cross_attention_norm: bool = False
    """Pre-norm on the cross-attention branch; Figure 8 draws none."""
    time_frequencies: int = 256
    """Width of the sinusoidal time embedding (our default, DiT)."""

    def __post_init__(self):
        object.__setattr__(self, "contexts", tuple(self.contexts))
        counts = (
            "num_layers",
            "width",
            "ffn_width",
            "num_heads",
            "patch_frames",
            "patch_height",
            "patch_width",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name} is {getattr(self, name)}; use 1 or more")
        if self.block not in BLOCKS or (self.block == "dit" and self.gated_ffn):
            raise ValueError(
                f"{self.name}: block is {self.block!r}, gated_ffn {self.gated_ffn}; use block llama, or dit "
                "with gated_ffn=false"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"{self.name}: width {self.width} does not split into {self.num_heads} heads; "
                f"set num_heads to a divisor of {self.width}"
            )
        if self.time_frequencies % 2:
            raise ValueError(
                f"{self.name}: time_frequencies {self.time_frequencies} must be even (sines and cosines)"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def input_patch_width(self) -> int:
        """Numbers in one input patch."""
        return self.patch_frames * self.patch_height * self.patch_width * self.input_channels

    @property
    def output_patch_width(self) -> int:
        """Numbers in one output patch: 64 for the video model (Figure 8)."""
        return self.patch_frames * self.patch_height * self.patch_width * self.output_channels

    def num_tokens(self, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of a latent of (frames, height, width); ValueError if patch or tables do not fit it."""
        patch = (self.patch_frames, self.patch_height, self.patch_width)
        tables = (self.max_frames, self.max_height, self.max_width)
        tokens = 1
        for axis, length, step, table in zip(
            ("frames", "height", "width"), latent_shape, patch, tables, strict=True
        ):
            if length <= 0 or length % step:
                raise ValueError(f"latent {axis} {length} is not a positive multiple of the patch's {step}")
            if length // step > table:
                raise ValueError(
                    f"latent {axis} {length} needs {length // step} positions, {self.name} has {table}; "
                    f"raise size.max_{axis} or use a smaller bucket"
                )
            tokens *= length // step
        return tokens


# s3.1.4 and Figure 8: widths. MetaCLIP's 256 tokens are the paper's, the other two lengths our default.
_VIDEO_CONTEXTS = (
    ContextSize(name="ul2", width=4096, max_tokens=256),
    ContextSize(name="metaclip", width=1280, max_tokens=256),
    ContextSize(name="byt5", width=1472, max_tokens=128),
)

VIDEO_30B = TransformerSize(  # Table 1
    name="video_30b", num_layers=48, width=6144, ffn_width=16384, num_heads=48, contexts=_VIDEO_CONTEXTS
)
VIDEO_5B = TransformerSize(  # s3.6.2 ablations: 32 layers, 3072, 24 heads; the FFN width is our default
    name="video_5b", num_layers=32, width=3072, ffn_width=8192, num_heads=24, contexts=_VIDEO_CONTEXTS
)
UPSAMPLER_7B = TransformerSize(  # s3.1.5 states 7B and the channel concatenation; the table is our default
    name="upsampler_7b",
    num_layers=34,
    width=3584,
    ffn_width=9728,
    num_heads=28,
    input_channels=32,
    max_height=160,
    max_width=160,
    contexts=_VIDEO_CONTEXTS,
)
AUDIO_13B = TransformerSize(  # s6.1.2; the number of heads and the plain FFN are our default
    name="audio_13b",
    num_layers=36,
    width=4608,
    ffn_width=18432,
    num_heads=36,
    input_channels=256,  # noisy DAC-VAE latents and the masked audio context, 128 each
    output_channels=128,
    patch_height=1,
    patch_width=1,
    max_frames=750,  # 30 s at 25 Hz
    max_height=1,
    max_width=1,
    contexts=(ContextSize(name="t5", width=768, max_tokens=512),),
    gated_ffn=False,
)

_TINY_CONTEXTS = (
    ContextSize(name="ul2", width=64, max_tokens=24),
    ContextSize(name="metaclip", width=64, max_tokens=24),
    ContextSize(name="byt5", width=32, max_tokens=16),
)
VIDEO_TINY = TransformerSize(  # the demo's model: seconds on two CPU cores
    name="video_tiny",
    num_layers=4,
    width=192,
    ffn_width=512,
    num_heads=6,
    max_frames=8,
    max_height=16,
    max_width=16,
    contexts=_TINY_CONTEXTS,
    qk_norm=True,
    time_frequencies=128,
)

SIZES = {size.name: size for size in (VIDEO_30B, VIDEO_5B, UPSAMPLER_7B, AUDIO_13B, VIDEO_TINY)}


@dataclass(frozen=True, kw_only=True)
class AutoencoderSize:
    """Temporal autoencoder (s3.1.1): 8x8x8, 16 channels. Widths are our default (LDM)."""

    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 16
    """16 is the paper's; 8 that of its ablation (Table 10)."""
    inflation: str = "2.5D"
    """2.5D: a convolution over time after each over space (the paper). 3D: both in one (Table 11). 2D: none,
    an image autoencoder that takes each frame alone; what the other two start from."""
    temporal_compression: int = 8
    """Frames in a latent: 8 is the paper's, 4 that of its ablation, 1 none (2D always)."""
    temporal_kernel: int = 3

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if len(self.multipliers) != 4:
            raise ValueError(
                f"multipliers {self.multipliers} need four levels: three of them halve, 8x in all"
            )
        if self.inflation not in ("2D", "2.5D", "3D"):
            raise ValueError(f"autoencoder.inflation is {self.inflation!r}; use 2D, 2.5D or 3D")
        if self.temporal_compression not in (1, 2, 4, 8):
            raise ValueError(
                f"autoencoder.temporal_compression is {self.temporal_compression}; use 8, 4, 2 or 1"
            )
        if self.inflation == "2D" and self.temporal_compression != 1:
            raise ValueError(
                f"autoencoder.inflation=2D sees each frame alone and can not put {self.temporal_compression} "
                "frames in a latent: set autoencoder.temporal_compression=1"
            )
        if self.temporal_kernel < 1 or self.temporal_kernel % 2 == 0:
            raise ValueError(
                f"autoencoder.temporal_kernel is {self.temporal_kernel}; use an odd number of frames"
            )
        for name in ("base_width", "blocks_per_level", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder.{name} is {getattr(self, name)}; use 1 or more")

    @property
    def temporal_strides(self) -> tuple[int, int, int]:
        """Of the three places that halve height and width, in the encoder's order: the last ones first."""
        halvings = self.temporal_compression.bit_length() - 1
        return tuple(2 if 3 - place <= halvings else 1 for place in range(3))
