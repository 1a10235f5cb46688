"""The `Recipe` tree: everything one training run is told, frozen, without torch.

One tree serves the planner, the trainer, the NeMo-Run factory and the command line. Recipes are
written in Python (`recipes/`); `override` is the only way to change one from the command line.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_moviegen.buckets import bucket_set
from nemo_moviegen.inputs import Bucket as Bucket  # as its fields, from here too
from nemo_moviegen.inputs import ClipData as ClipData
from nemo_moviegen.inputs import LatentData as LatentData
from nemo_moviegen.layout import Layout as Layout
from nemo_moviegen.layout import nearest_bucket
from nemo_moviegen.objectives import VIDEO_OBJECTIVES
from nemo_moviegen.objectives import AutoencoderLosses as AutoencoderLosses
from nemo_moviegen.objectives import DiscriminatorSettings as DiscriminatorSettings
from nemo_moviegen.optim import Optim as Optim
from nemo_moviegen.optim import Plateau as Plateau
from nemo_moviegen.precision import FP8_ROWS, PRECISIONS, check_fp8, is_fp8, is_mixed
from nemo_moviegen.precision import Fp8 as Fp8
from nemo_moviegen.progress import Progress as Progress
from nemo_moviegen.settings import from_plain
from nemo_moviegen.settings import override as override  # the one way to change a recipe
from nemo_moviegen.sizes import AutoencoderSize as AutoencoderSize
from nemo_moviegen.sizes import TransformerSize
from nemo_moviegen.spikes import Guard as Guard
from nemo_moviegen.validation import Validation as Validation

RECIPE_FILE = "recipe.yaml"
"""In the folder of every run: its recipe."""
METRICS_FILE = "metrics.jsonl"
"""Beside it: what the run measured, a line a step."""
FP8_FILE = "fp8.jsonl"
"""Beside them: what FP8 linears saw (training/fp8_report.py)."""


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
    image_batch: int = 0
    """Images of an image step, all ranks; 0 = global_batch. An image is a fraction of the work of a clip."""
    precision: str = "bf16"
    """bf16 (fp32 main weights and gradient reduction); fp8_delayed, fp8_current or fp8_block (the same, and
    the layers' linears in FP8: precision.py); fp32; or fp64 for parity tests."""
    output: str
    """Folder of checkpoints and logs; a run that finds its own checkpoint there goes on from it."""
    save_every: int = 1000
    """Steps between checkpoints, of which the last step has one too; 0 = none at all, for a benchmark."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0 = none."""
    log_every: int = 10
    hang_minutes: float = 20.0
    """A run whose ranks end no step for so long is ended and its stuck rank named; 0 = never. More than any
    step, validation or checkpoint takes, and less than the half hour after which collectives give up."""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; use {', '.join(PRECISIONS)}")
        for name in ("global_batch", "micro_batch", "num_steps", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("save_every", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 for none, or a number of steps")
        if self.image_batch % self.global_batch or self.image_batch < 0:
            raise ValueError(
                f"{self.name}: image_batch {self.image_batch} does not split like the clips: use 0 or a "
                f"multiple of global_batch {self.global_batch}"
            )
        if not 0 <= self.hang_minutes < math.inf:
            raise ValueError(f"hang_minutes is {self.hang_minutes}; use 0 for never, or minutes")

    @property
    def images_per_step(self) -> int:
        """Images of an image step, all ranks: in as many micro-batches as clips, each so much larger."""
        return self.image_batch or self.global_batch

    def saves_at(self, step) -> bool:
        """Whether the checkpoint of a step is kept."""
        return self.save_every > 0 and (step % self.save_every == 0 or step == self.num_steps)

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
    """Training of a video transformer (s3.2)."""

    size: TransformerSize
    data: LatentData
    objective: str = "flow_matching"
    """flow_matching (s3.1.2); or v_prediction, the diffusion it is compared with (s3.6.2)."""
    latent_frames: int
    """Latent (frames, height, width) of the stage's longest clip at its first aspect ratio."""
    latent_height: int
    latent_width: int
    init_from: str = ""
    """Run folder whose last weights start this run; empty = fresh weights."""
    ema_decay: float = 0.0
    """Of a moving average of the weights, kept beside them for sampling; 0 = none (our default: 0.9999)."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss that stay as well."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of samples from this model (s3.4)."""
    fp8: Fp8 = field(default_factory=Fp8)
    compiles: bool = True
    """On GPUs, norms, modulation and gates go through torch.compile: a kernel or two each. No effect on
    CPUs."""
    guard: Guard = field(default_factory=Guard)
    validation: Validation = field(default_factory=Validation)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in VIDEO_OBJECTIVES:
            raise ValueError(
                f"{self.name}: objective is {self.objective!r}; use {' or '.join(VIDEO_OBJECTIVES)}"
            )
        if self.optim.kind != "adamw":
            raise ValueError(
                f"{self.name}: optim.kind={self.optim.kind} is for autoencoders: set optim.kind=adamw"
            )
        heads, tensor = self.size.num_heads, self.layout.tensor
        if heads % tensor:
            raise ValueError(
                f"{self.name}: {heads} heads do not split over tensor {tensor}: "
                f"use a divisor of {heads} as layout.tensor"
            )
        if self.size.ffn_width % tensor:
            raise ValueError(
                f"{self.name}: ffn_width {self.size.ffn_width} does not split over tensor {tensor}: "
                f"use a divisor of {self.size.ffn_width} as layout.tensor"
            )
        if self.layout.context > 1:
            self._check_context()
        if self.data.batching == "packed":
            self._check_packs()
        # Images first: a bucket that fits one frame fits any number of them
        for frames in sorted({1 if self.data.image_every else self.latent_frames, self.latent_frames}):
            self.check_tokens((frames, self.latent_height, self.latent_width))
        for shape in self.bucket_shapes:
            self.check_tokens(shape)
        self.data.token_limits.check(self.size.contexts)
        if self.optim.decay == "plateau" and not self.validation.every:
            raise ValueError(
                f"{self.name}: optim.decay=plateau follows the validation loss, and validation.every is 0: "
                "set validation.every to steps between measurements, or optim.decay to constant or cosine"
            )
        if is_fp8(self.precision):
            check_fp8(self)

    def _check_context(self):
        layout, heads = self.layout, self.size.num_heads // self.layout.tensor
        if layout.context_comm != "all_gather" and not is_mixed(self.precision):
            raise ValueError(
                f"{self.name}: layout.context_comm={layout.context_comm} is Transformer Engine's, which runs "
                f"in bf16 and not in {self.precision}: set layout.context_comm=all_gather or precision=bf16"
            )
        if layout.context_comm == "a2a" and heads % layout.context:
            fitting = ", ".join(str(ranks) for ranks in range(1, heads + 1) if heads % ranks == 0)
            raise ValueError(
                f"{self.name}: a2a gives each of context {layout.context} ranks whole heads, and tensor "
                f"{layout.tensor} leaves {heads}: use {fitting} as layout.context, or another "
                "layout.context_comm"
            )
        if is_mixed(self.precision) and self.size.head_width % 8:
            raise ValueError(
                f"{self.name}: heads of width {self.size.head_width} can not be split over context ranks by "
                "Transformer Engine (bf16): make size.width / size.num_heads a multiple of 8, or set "
                "layout.context=1"
            )

    def _check_packs(self):
        if self.micro_batch != 1:
            raise ValueError(
                f"{self.name}: micro_batch is {self.micro_batch}, with data.batching=packed a micro-batch "
                "is one pack: set micro_batch=1, or data.batching=bucket"
            )
        comm = self.layout.context_comm
        if is_mixed(self.precision) and self.layout.context > 1 and comm != "p2p":
            raise ValueError(
                f"{self.name}: Transformer Engine (bf16) splits packs over context ranks by p2p, and "
                f"layout.context_comm is {comm}: set layout.context_comm=p2p, layout.context=1, or "
                "data.batching=bucket"
            )

    @property
    def pack_tokens(self) -> int:
        """Tokens a pack may hold (`data.batching=packed`): those of the largest latent."""
        return self.size.num_tokens((self.latent_frames, self.latent_height, self.latent_width))

    @property
    def bucket_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Latents (T, H, W) of `data.buckets` of the kinds this recipe trains on; () where it names none."""
        if not self.data.buckets:
            return ()
        image_every = self.data.image_every
        shapes = [bucket.latent_shape for bucket in bucket_set(self.data.buckets).buckets]
        return tuple(shape for shape in shapes if (image_every > 0 if shape[0] == 1 else image_every != 1))

    def check_shapes(self, latent_shapes):
        """ValueError where a trained latent (T, H, W) does not fit the layout or is of no bucket of ours."""
        for shape in map(tuple, latent_shapes):
            self.check_tokens(shape)
            if self.bucket_shapes and shape not in self.bucket_shapes:
                raise ValueError(
                    f"{self.name} trains on the buckets {self.data.buckets}; {'x'.join(map(str, shape))} in "
                    f"{self.data.folder} is none of them: encode with --buckets {self.data.buckets}, or set "
                    "data.buckets (empty = whatever the folder has)"
                )

    def check_tokens(self, latent_shape):
        """ValueError where the tokens of a latent (T, H, W) do not split over the layout.

        It names the nearest bucket that does. Nothing is padded: padded tokens need a mask in every
        self-attention, and with a mask the fused kernel does not take gathered keys.
        """
        tokens, context = self.size.num_tokens(latent_shape), self.layout.context
        sequence = self.layout.tensor if self.layout.sequence else 1
        samples = self.micro_batch
        if latent_shape[0] == 1:
            samples *= self.images_per_step // self.global_batch
        divisors = {f"do not split over context {context} x sequence-parallel {sequence}": context * sequence}
        if is_mixed(self.precision) and context > 1:
            problem = (
                f"leave an odd number to a rank of context {context}: Transformer Engine (bf16) halves it"
            )
            divisors[problem] = 2 * context
        if is_fp8(self.precision):
            on, pieces = f"context {context}", context
            if {"patch_embedding", "head"} & set(self.fp8.parts):
                on, pieces = f"{on} x sequence-parallel {sequence}", context * sequence
            problem = f"in micro-batches of {samples} on {on} are no {FP8_ROWS}s, which FP8 needs"
            divisors[problem] = pieces * FP8_ROWS // math.gcd(FP8_ROWS, samples)
        problem = next((problem for problem, divisor in divisors.items() if tokens % divisor), None)
        if problem is None:
            return
        divisor = math.lcm(*divisors.values())
        nearest = nearest_bucket(self.size, latent_shape, divisor)
        named = ""
        if nearest is not None:
            _, height, width = nearest
            named = f" (nearest: latent_height={height} latent_width={width}, {8 * width}x{8 * height} px)"
        raise ValueError(
            f"{self.name}: a latent of {'x'.join(map(str, latent_shape))} has {tokens} tokens, which "
            f"{problem}: use a bucket whose tokens divide by {divisor}{named}, or a smaller layout"
            + (f" (data.buckets={self.data.buckets} has it)" if latent_shape in self.bucket_shapes else "")
        )


@dataclass(frozen=True, kw_only=True)
class TaeRecipe(Recipe):
    """Training of the temporal autoencoder (s3.1.1), or of the 2D one it starts from."""

    autoencoder: AutoencoderSize = field(default_factory=AutoencoderSize)
    data: ClipData
    loss: AutoencoderLosses = field(default_factory=AutoencoderLosses)
    discriminator: DiscriminatorSettings = field(default_factory=DiscriminatorSettings)
    init_from: str = ""
    """Run folder of an autoencoder, or a folder of diffusers' AutoencoderKL; one that is 2D is inflated.
    Empty = fresh weights."""
    ema_decay: float = 0.0
    """Of a moving average of the weights, which is what is loaded from the run; 0 = none."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self):
        super().__post_init__()
        if is_fp8(self.precision) or self.optim.decay == "plateau":
            raise ValueError(
                f"{self.name}: precision={self.precision} and optim.decay={self.optim.decay}: an autoencoder "
                "trains in bf16, fp32 or fp64, with optim.decay constant or cosine"
            )
        if self.progress.samples_every:
            raise ValueError(f"{self.name}: an autoencoder takes no prompts: set progress.samples_every=0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"{self.name}: ema_decay is {self.ema_decay}; use 0 or more and less than 1")
        bucket = self.data.bucket
        if bucket.height_px % 8 or bucket.width_px % 8:
            raise ValueError(
                f"{self.name}: a bucket of {bucket.width_px}x{bucket.height_px} px has no whole latents: set "
                "data.bucket.width_px and data.bucket.height_px to multiples of 8"
            )


def recipe_yaml(recipe) -> str:
    """The whole recipe as YAML, with its kind: what `read_recipe` reads and a run folder keeps."""
    import yaml

    return yaml.safe_dump({"kind": type(recipe).__name__, **asdict(recipe)}, sort_keys=False)


def read_recipe(path):
    """The recipe in a file that `recipe_yaml` wrote; ValueError names the file and what is wrong in it."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    kinds = {kind.__name__: kind for kind in (VideoRecipe, TaeRecipe)}
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in kinds:
        raise ValueError(f"{path} is no recipe: its kind is {kind!r}, it needs one of {', '.join(kinds)}")
    return from_plain(kinds[kind], values, str(path))
