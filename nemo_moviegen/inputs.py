"""What a run reads, as a recipe says it: latents, prompts, clips. Plain numbers, without torch."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Tokens of a prompt the model sees, by text encoder; 0 = all the encoder gives, its `max_tokens`."""

    ul2: int = 0
    metaclip: int = 0
    byt5: int = 0

    def of(self, context_size) -> int:
        """Tokens of this encoder a model may see; ValueError above the encoder's maximum, which is named."""
        limit = getattr(self, context_size.name, 0) or context_size.max_tokens
        if not 0 < limit <= context_size.max_tokens:
            raise ValueError(
                f"data.token_limits.{context_size.name} is {limit}; the recipe's encoder gives at most "
                f"{context_size.max_tokens} tokens: use 1 to {context_size.max_tokens}, or 0 for all of them"
            )
        return limit

    def check(self, context_sizes):
        """ValueError for a limit above its encoder's maximum, or of an encoder the recipe does not have."""
        for context_size in context_sizes:
            self.of(context_size)
        names = [context_size.name for context_size in context_sizes]
        for name, limit in asdict(self).items():
            if limit and name not in names:
                raise ValueError(
                    f"data.token_limits.{name} is {limit}, but the recipe's encoders are {', '.join(names)}: "
                    f"leave data.token_limits.{name} at 0"
                )


@dataclass(frozen=True, kw_only=True)
class LatentData:
    """Latent shards a transformer trains on, written by `moviegen encode`."""

    folder: str
    """Folder with the shards, their index and their statistics."""
    buckets: str = ""
    """Bucket set the stage trains on (buckets.py): the layout must divide its shapes, the folder have no
    others. Empty = whatever shapes the folder has."""
    image_every: int = 11
    """One iteration in this many takes images: 11 is the paper's 1:10, 1 images only, 0 none."""
    prompt_drop: float = 0.1
    """Share of samples that see the empty prompt, for classifier-free guidance (our default)."""
    text: str = "cached"
    """cached: features out of the shards. online: captions encoded as they are read, by `text_encoders`."""
    text_encoders: str = ""
    """Folder of the encoders, for online text: the one `moviegen encode` takes."""
    token_limits: TokenLimits = field(default_factory=TokenLimits)
    batching: str = "bucket"
    """What makes up a step. bucket: latents of one shape. balanced: of several, a micro-batch one of them,
    copies of the model with equal cost. packed: packs of any shapes, no longer than the largest latent."""
    prefetch: int = 2
    """Micro-batches a thread of each rank reads ahead; 0 = each when it is needed."""

    def __post_init__(self):
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch is {self.prefetch}; use 0 or more micro-batches to read ahead")
        if self.batching not in ("bucket", "balanced", "packed"):
            raise ValueError(f"data.batching is {self.batching!r}; use bucket, balanced or packed")
        if self.text not in ("cached", "online"):
            raise ValueError(f"data.text is {self.text!r}; use cached or online")
        if self.text == "online" and not self.text_encoders:
            raise ValueError("data.text is online: set data.text_encoders to the folder of the text encoders")
        if self.image_every < 0:
            raise ValueError(
                f"data.image_every is {self.image_every}; use 0 for no images, 1 for images only"
            )
        if not 0 <= self.prompt_drop <= 1:
            raise ValueError(f"data.prompt_drop is {self.prompt_drop}; it is a share, use 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Shape of the clips a pipeline delivers: every sample of a bucket has it."""

    num_frames: int
    height_px: int
    width_px: int
    fps: float

    def __post_init__(self):
        for name in ("num_frames", "height_px", "width_px", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"bucket.{name} is {getattr(self, name)}; use a number above 0")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of its latents, the paper's 8x8x8; part of a latent frame counts as one."""
        return -(-self.num_frames // 8), self.height_px // 8, self.width_px // 8


@dataclass(frozen=True, kw_only=True)
class ClipData:
    """Raw clips the autoencoder trains on."""

    manifest: str
    """Parquet manifest, one row a clip; or one video file, which is cut into clips of the bucket's length."""
    bucket: Bucket
    image_every: int = 4
    """One iteration in this many takes images: 4 is the paper's 1:3 (s3.1.1)."""
    crop_px: int = 0
    """Height and width of random crops of what the bucket delivers; 0 = whole frames."""
    crops: int = 1
    """Crops of each clip or image: decoding once serves them all."""
    in_memory: bool = False
    """Whether every rank keeps what it has decoded, in float32: for a set of some minutes of video."""

    def __post_init__(self):
        if (
            self.crop_px < 0
            or self.crop_px % 8
            or self.crop_px > min(self.bucket.height_px, self.bucket.width_px)
        ):
            raise ValueError(
                f"data.crop_px is {self.crop_px}; use 0 for whole frames, or a multiple of 8 that fits the "
                f"bucket of {self.bucket.width_px}x{self.bucket.height_px} px"
            )
        if self.crops < 1 or (self.crops > 1 and not self.crop_px):
            raise ValueError(f"data.crops is {self.crops}; use 1, or more where data.crop_px cuts them out")
        if self.image_every < 0:
            raise ValueError(
                f"data.image_every is {self.image_every}; use 0 for no images, 1 for images only"
            )
