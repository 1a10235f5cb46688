"""What a recipe needs and how long it takes on a cluster, before anything starts: `moviegen plan`.

A plan is of the recipe's largest clips, and of its image iterations as often as they come. Shorter buckets
take less of both. Nothing of it is fitted to this model: bytes are counted, FLOPs are exact, and seconds come
from the one table of rates in `hardware.py`, which published runs of other models validate (`published.py`).
"""

from dataclasses import dataclass, replace

from nemo_moviegen.cluster import check_on_cluster
from nemo_moviegen.layout import Layout
from nemo_moviegen.planning.hardware import GPUS
from nemo_moviegen.planning.memory import GIB, Memory, memory_of, outside_allocator
from nemo_moviegen.planning.seconds import link
from nemo_moviegen.planning.share import Share, share_of
from nemo_moviegen.planning.step_time import Links, Settings, Step, step_of
from nemo_moviegen.planning.weights import CUT_BY_TENSOR, held_by_tensor_rank, in_layers
from nemo_moviegen.planning.work import layer_work
from nemo_moviegen.precision import is_fp8, multiplies_fp8
from nemo_moviegen.recipe import TaeRecipe
from nemo_moviegen.utilisation import step_flops, utilisation

CLIPS, IMAGES = "clips", "images"


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One kind of optimiser step: of clips or of images."""

    kind: str
    shape: tuple[int, int, int]
    """Latent (T, H, W)."""
    share: Share
    samples: int
    """Of a step, all ranks."""
    memory: Memory
    step: Step | None
    """None where the hardware's rates are unknown."""
    model_flops: int
    """Of a step, all ranks, forward and backward."""
    recomputed_flops: int

    @property
    def tokens(self) -> int:
        """Of a step, all ranks."""
        return self.samples * self.share.tokens


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes are of one rank; `step_seconds` and what follows from it are None where rates are unknown."""

    recipe: str
    cluster: str
    accelerator: str
    layout: Layout
    precision: str
    num_ranks: int
    num_microbatches: int
    micro_batch: int
    num_steps: int
    peak_tflops: float
    iterations: tuple[Iteration, ...]
    """Of each kind the recipe has, clips first."""
    shares: tuple[float, ...]
    """Of each kind, of all iterations."""
    memory_limit_bytes: float
    notes: tuple[str, ...]
    """What the numbers leave out, and which collectives travel behind computation."""

    @property
    def memory(self) -> Memory:
        """Of the kind of iteration that needs most."""
        return max((i.memory for i in self.iterations), key=lambda memory: memory.device_bytes)

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough; `search.memory_problem` says what would be."""
        return self.memory.device_bytes <= self.memory_limit_bytes

    @property
    def over_bytes(self) -> float:
        """By how much it is not; negative is what stays free."""
        return self.memory.device_bytes - self.memory_limit_bytes

    @property
    def step_seconds(self) -> float | None:
        """Mean over the iterations of the recipe."""
        return self._mean(lambda i: i.step.seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks."""
        return self._rate(lambda i: i.tokens)

    @property
    def tflops(self) -> float | None:
        """The model's TFLOP/s of one rank."""
        flops = self._rate(lambda i: i.model_flops)
        return flops and flops / self.num_ranks / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs in the time, of the dense bf16 peak."""
        return self._utilisation("speed/mfu")

    @property
    def hfu(self) -> float | None:
        """The same with what is recomputed."""
        return self._utilisation("speed/hfu")

    @property
    def days(self) -> float | None:
        """Of the whole recipe, without stops."""
        return self.step_seconds and self.step_seconds * self.num_steps / 86400

    @property
    def gpu_hours(self) -> float | None:
        """Likewise."""
        return self.days and self.days * 24 * self.num_ranks

    def seconds_by_part(self) -> dict[str, float]:
        """Mean seconds of a step by what takes them; {} where rates are unknown."""
        if any(i.step is None for i in self.iterations):
            return {}
        parts = [i.step.parts() for i in self.iterations]
        return {
            name: sum(share * part[name] for share, part in zip(self.shares, parts, strict=True))
            for name in parts[0]
        }

    def _mean(self, value):
        if any(i.step is None for i in self.iterations):
            return None
        return sum(share * value(i) for share, i in zip(self.shares, self.iterations, strict=True))

    def _rate(self, value):
        amount = self._mean(value)
        return amount and amount / self.step_seconds

    def _utilisation(self, name):
        model = self._mean(lambda i: i.model_flops)
        if not model or not self.peak_tflops:
            return None
        again = self._mean(lambda i: i.recomputed_flops)
        return utilisation(model, again, self.step_seconds, self.num_ranks, self.peak_tflops)[name]


def make_plan(recipe, cluster, *, text=None) -> Plan:
    """The `Plan` of a `VideoRecipe` on a `Cluster`; whether it fits is in it, no error.

    `text` is the tokens of the longest prompt of a micro-batch by encoder. ValueError for an autoencoder, and
    where layout or batch do not divide.
    """
    if isinstance(recipe, TaeRecipe):
        raise ValueError(f"{recipe.name} trains an autoencoder; plan knows transformers")
    num_microbatches = check_on_cluster(recipe, cluster)
    kinds = kinds_of(recipe)
    return Plan(
        recipe=recipe.name,
        cluster=cluster.name,
        accelerator=cluster.accelerator,
        layout=recipe.layout,
        precision=recipe.precision,
        num_ranks=cluster.num_ranks,
        num_microbatches=num_microbatches,
        micro_batch=recipe.micro_batch,
        num_steps=recipe.num_steps,
        peak_tflops=cluster.peak_dense_tflops,
        iterations=tuple(_iteration(recipe, cluster, num_microbatches, text, kind) for kind in kinds),
        shares=tuple(kinds.values()),
        memory_limit_bytes=cluster.memory_gib * GIB,
        notes=_notes(recipe, cluster),
    )


def kinds_of(recipe) -> dict[str, float]:
    """The share of each kind of iteration that a recipe has, clips first."""
    every = recipe.data.image_every
    if every == 1 or recipe.latent_frames == 1:
        return {IMAGES: 1.0}
    return {CLIPS: 1 - 1 / every, IMAGES: 1 / every} if every else {CLIPS: 1.0}


def fits_on(recipe, cluster, *, text=None) -> bool:
    """`make_plan(...).fits` alone, of a recipe that divides; a search asks it of every layout."""
    limit = cluster.memory_gib * GIB
    shares = (_part(recipe, cluster, kind, text)[2] for kind in kinds_of(recipe))
    return all(_memory(recipe, cluster, share).device_bytes <= limit for share in shares)


def _part(recipe, cluster, kind, text=None):
    """(latent shape, samples of a step, one rank's share of a micro-batch)"""
    frames = 1 if kind == IMAGES else recipe.latent_frames
    shape = (frames, recipe.latent_height, recipe.latent_width)
    samples = recipe.images_per_step if kind == IMAGES else recipe.global_batch
    share = share_of(recipe, cluster.num_ranks, cluster.accelerator, latent_shape=shape, text=text)
    return shape, samples, replace(share, micro_batch=share.micro_batch * samples // recipe.global_batch)


def _memory(recipe, cluster, share):
    memory = memory_of(share, ema=recipe.ema_decay > 0)
    return replace(memory, **outside_allocator(share, memory, cluster.accelerator))


def _iteration(recipe, cluster, num_microbatches, text, kind):
    shape, samples, share = _part(recipe, cluster, kind, text)
    model, again = step_flops(recipe.size, {shape: samples}, recipe.layout.recompute, share.text)
    return Iteration(
        kind=kind,
        shape=shape,
        share=share,
        samples=samples,
        memory=_memory(recipe, cluster, share),
        step=_step(recipe, cluster, share, num_microbatches),
        model_flops=model,
        recomputed_flops=again,
    )


def _step(recipe, cluster, share, num_microbatches):
    gpu = GPUS.get(cluster.accelerator)
    if gpu is None:
        return None
    size, layout = recipe.size, recipe.layout
    held = held_by_tensor_rank(size, layout.tensor)
    return step_of(
        layer_work(share, in_layers(size, layout.tensor)),
        gpu=gpu,
        links=Links(
            tensor=link(cluster, layout.tensor, 1),
            context=link(cluster, layout.context, layout.tensor),
            state=link(cluster, share.copies * layout.context, layout.tensor),
        ),
        settings=settings_of(recipe),
        num_layers=size.num_layers,
        num_microbatches=num_microbatches,
        held=sum(held.values()),
        replicated=sum(count for name, count in held.items() if name not in CUT_BY_TENSOR),
        ends_flops=2 * share.own_tokens * size.width * (size.input_patch_width + size.output_patch_width),
        pieces=share.state_pieces,
    )


def settings_of(recipe) -> Settings:
    """What `training/strategy.py` and `video/model.py` set, in the planner's words."""
    layout = recipe.layout
    is_full = layout.sharding == "full"
    in_fp8 = 0.0
    if multiplies_fp8(recipe.precision, recipe.fp8):
        in_fp8 = 1 - 2 * recipe.fp8.bf16_layers / recipe.size.num_layers
    return Settings(
        recompute=layout.recompute,
        context_comm=layout.context_comm,
        is_full=is_full,
        state_overlap=is_full or layout.overlap,
        fp8_share=in_fp8,
    )


def _notes(recipe, cluster):
    notes = []
    if recipe.data.buckets:
        notes.append(f"of the longest clips; the shorter buckets of {recipe.data.buckets} take less")
    if cluster.accelerator not in GPUS:
        known = ", ".join(sorted(GPUS))
        notes.append(f"no seconds: rates of {cluster.accelerator} are unknown (known: {known})")
    elif cluster.nodes > 1 and not cluster.network_gbit_s:
        notes.append(f"cluster {cluster.name} names no network_gbit_s: what crosses nodes takes no time here")
    if is_fp8(recipe.precision):
        notes.append("FP8: MFU is of the bf16 peak; that linear inputs are kept in FP8 is not counted")
    return (*notes, *_overlaps(recipe.layout, cluster.num_ranks))


def _overlaps(layout, num_ranks):
    """What each kind of collective hides behind, and why where it does not."""
    if layout.tensor > 1:
        yield (
            f"TP{layout.tensor}: what goes into a column-cut linear travels behind a product of its backward "
            "pass, all else is waited for (Userbuffers would hide it, for one number of tokens: no buckets)"
        )
    if layout.context > 1:
        behind = {
            "all_gather": "keys and values of some heads travel while others attend",
            "a2a": "heads change ranks before attention starts, and back: waited for",
            "p2p": "keys and values go round the ring while those that came attend",
        }
        yield f"CP{layout.context}: {behind[layout.context_comm]}"
    if layout.data_parallel(num_ranks) * layout.context == 1:
        return
    if layout.sharding == "full":
        yield "FSDP: weights and gradients of a layer travel while its neighbours compute"
    elif layout.overlap:
        weights = ", weights behind the next forward pass" if layout.sharding == "optimizer" else ""
        yield f"data parallel: gradients travel behind the last backward pass{weights}"
    else:
        yield "data parallel: gradients and weights are waited for; layout.overlap=true hides them"
