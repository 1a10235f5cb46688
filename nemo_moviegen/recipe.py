"""The `Recipe` tree: everything one training run is told, frozen, without torch.

One tree serves the planner, the trainer, the NeMo-Run factory and the command line. Recipes are
written in Python (`recipes/`); `override` is the only way to change one from the command line.
"""

import difflib
from dataclasses import dataclass, field

from nemo_moviegen.sizes import TransformerSize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model is spread over ranks (s3.1.6). Data parallel takes what tensor * context leaves."""

    tensor: int = 1
    """Ranks that share the matrices of a layer."""
    context: int = 1
    """Ranks that share the tokens of one clip, also inside attention."""
    sequence: bool = True
    """Split norms and residuals over the tensor ranks too (SP); no effect with tensor = 1."""
    distributed_optimizer: bool = True
    """Shard optimiser states over data parallel."""

    def __post_init__(self):
        for axis in ("tensor", "context"):
            if getattr(self, axis) < 1:
                raise ValueError(f"layout.{axis} is {getattr(self, axis)}; it counts ranks, use 1 or more")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and one clip."""
        return self.tensor * self.context

    def data_parallel(self, num_ranks: int) -> int:
        """Copies of the model on `num_ranks`; ValueError if the layout does not divide them."""
        if num_ranks < 1 or num_ranks % self.model_ranks:
            raise ValueError(
                f"{num_ranks} ranks do not split into tensor {self.tensor} x context {self.context}: "
                f"use a multiple of {self.model_ranks} ranks or a smaller layout"
            )
        return num_ranks // self.model_ranks


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW. The paper states only the learning rates (Table 3); the rest is our default."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Largest norm of the gradient over all parameters."""
    warmup_steps: int = 2000
    """Linear from zero; constant afterwards, or cosine where `decay` says so."""
    decay: str = "constant"
    """constant or cosine (to a tenth of the peak at the last step)."""

    def __post_init__(self):
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"optim.decay is {self.decay!r}; use constant or cosine")


@dataclass(frozen=True, kw_only=True)
class LatentData:
    """Latent shards a transformer trains on, written by `moviegen encode`."""

    folder: str
    """Folder with the shards, their index and their statistics."""
    image_every: int = 11
    """One iteration in this many takes images, the others clips: 11 is the paper's 1:10; 1 = images only, 0 = none."""
    prompt_drop: float = 0.1
    """Share of samples that see the empty prompt, for classifier-free guidance (our default)."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Shape of the clips a pipeline delivers: every sample of a bucket has it."""

    num_frames: int
    height_px: int
    width_px: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class ClipData:
    """Raw clips the autoencoder trains on."""

    manifest: str
    """Parquet manifest: one row a clip."""
    bucket: Bucket
    image_every: int = 4
    """One iteration in this many takes images: 4 is the paper's 1:3 (s3.1.1)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. `num_steps` optimiser steps of `global_batch` samples."""

    name: str
    cluster: str
    """Where it runs: a file of recipes/clusters without its ending."""
    layout: Layout = field(default_factory=Layout)
    optim: Optim
    global_batch: int
    micro_batch: int
    """Samples a model copy takes at once; the rest of its share is accumulated."""
    num_steps: int
    seed: int = 0
    precision: str = "bf16"
    """bf16 (fp32 main weights and gradient reduction), fp32, or fp64 for parity tests."""
    output: str
    """Folder of checkpoints and logs; a run that finds its own checkpoint there goes on from it."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10

    def __post_init__(self):
        if self.precision not in ("bf16", "fp32", "fp64"):
            raise ValueError(f"precision is {self.precision!r}; use bf16, fp32 or fp64")
        for name in ("global_batch", "micro_batch", "num_steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")

    def num_microbatches(self, num_ranks: int) -> int:
        """Micro-batches each model copy accumulates; ValueError if the batch does not divide."""
        copies = self.layout.data_parallel(num_ranks)
        if self.global_batch % (copies * self.micro_batch):
            raise ValueError(
                f"global_batch {self.global_batch} does not split over {copies} model copies x micro_batch "
                f"{self.micro_batch}: use a multiple of {copies * self.micro_batch}"
            )
        return self.global_batch // (copies * self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Recipe):
    """Flow-matching training of a video transformer (s3.2)."""

    size: TransformerSize
    data: LatentData
    latent_frames: int
    """Largest latent (frames, height, width) of the stage: what the layout must divide."""
    latent_height: int
    latent_width: int
    init_from: str = ""
    """Run folder whose last weights start this run; empty = fresh weights."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of samples from this model (s3.4)."""

    def __post_init__(self):
        super().__post_init__()
        heads, tensor = self.size.num_heads, self.layout.tensor
        if heads % tensor:
            raise ValueError(
                f"{self.name}: {heads} heads do not split over tensor {tensor}: use a divisor of {heads} as layout.tensor"
            )
        if self.size.ffn_width % tensor:
            raise ValueError(f"{self.name}: ffn_width {self.size.ffn_width} does not split over tensor {tensor}")
        for frames in {1 if self.data.image_every else self.latent_frames, self.latent_frames}:
            self._check_tokens((frames, self.latent_height, self.latent_width))

    def _check_tokens(self, latent_shape):
        tokens = self.size.num_tokens(latent_shape)
        ranks = self.layout.context * (self.layout.tensor if self.layout.sequence else 1)
        if tokens % ranks:
            raise ValueError(
                f"{self.name}: a latent of {'x'.join(map(str, latent_shape))} has {tokens} tokens, which do not split "
                f"over context {self.layout.context} x sequence-parallel {ranks // self.layout.context}: "
                f"use a bucket whose tokens divide by {ranks}, or a smaller layout"
            )


@dataclass(frozen=True, kw_only=True)
class AutoencoderSize:
    """Temporal autoencoder (s3.1.1): 8x8x8, 16 channels. Widths are our default (LDM)."""

    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 16
    temporal_kernel: int = 3

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if len(self.multipliers) != 4:
            raise ValueError(f"multipliers {self.multipliers} need four levels: three of them halve, 8x in all")


@dataclass(frozen=True, kw_only=True)
class TaeRecipe(Recipe):
    """Training of the temporal autoencoder (s3.1.1). The loss weights but the outlier penalty's are our default."""

    autoencoder: AutoencoderSize = field(default_factory=AutoencoderSize)
    data: ClipData
    l1_weight: float = 1.0
    kl_weight: float = 1e-6
    outlier_weight: float = 1e5
    """Weight of the outlier penalty (eq. 1)."""
    outlier_scale: float = 3.0
    """r of eq. 1: standard deviations a latent may leave the mean."""


def override(recipe, assignments):
    """`recipe` with `key.path=value` assignments applied and checked again.

    Raises ValueError naming the nearest key for an unknown one, and the wanted type for a bad value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not assignments:
        return recipe
    tree = OmegaConf.structured(recipe)
    _unfreeze(tree)
    known = sorted(_leaf_keys(OmegaConf.to_container(tree)))
    for assignment in assignments:
        key, separator, _ = assignment.partition("=")
        if not separator:
            raise ValueError(f"{assignment!r} is not an assignment: write key=value, for example num_steps=100")
        if key not in known:
            raise ValueError(f"{recipe.name} has no setting {key!r}{nearest(key, known)}")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([assignment]))
        except OmegaConfBaseException as error:
            raise ValueError(f"{assignment!r} does not fit {recipe.name}: {str(error).splitlines()[0]}") from None
    return OmegaConf.to_object(tree)


def nearest(word, known) -> str:
    """`; did you mean X?`, or the list of what is known where nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:  # a bare leaf name: `tensor` for `layout.tensor`
        close = [k for k in known if k.rsplit(".", 1)[-1] == word][:1]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _unfreeze(node):
    from omegaconf import Container, OmegaConf

    OmegaConf.set_readonly(node, False)  # frozen dataclasses become read-only nodes, each with its own flag
    for child in node.values() if hasattr(node, "values") else node:
        if isinstance(child, Container):
            _unfreeze(child)


def _leaf_keys(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
