"""The training loss of held-out samples while a run trains: one number, the same in every layout.

The loss is told as a whole, by quarter of time, and for each latent shape, which is duration (latent frames)
x resolution (latent height x width), by quarter of time. Which of them stands still says where training does.

Samples, noise and times are functions of the recipe and of the sample, never of the step or the rank, so two
numbers of a run differ by its weights alone. Times lie in equal parts of [0, 1] where training draws them
logit-normal (s3.1.2): the loss near noise and near data says as much as that in the middle. No prompt is
dropped.
"""

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state

from nemo_moviegen import flow
from nemo_moviegen.data.collate import collate
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.online_text import OnlineText
from nemo_moviegen.training.step import token_errors
from nemo_moviegen.training_objective import OBJECTIVES
from nemo_moviegen.video.model import without_fp8
from nemo_moviegen.video.parallel import sum_over_token_ranks

NUM_BINS = 8
"""Equal parts of [0, 1] over which the times are spread."""
NUM_REPORTED = 4
"""Equal parts of [0, 1] whose loss is told apart."""


@dataclass(frozen=True)
class Evaluation:
    """One forward pass of one sample."""

    row: int
    """Of the reader."""
    shape: tuple[int, int, int]
    number: int
    """How many of the same sample come before it: what its noise and time are keyed by, as by an epoch."""
    time_bin: int
    """0 (noise) to NUM_BINS - 1 (data)."""


class ValidationLoss(pl.Callback):
    """Measures every `validation.every` steps and with each checkpoint. Goes before who tells or keeps it.

    ValueError where the held-out latents do not serve.
    """

    def __init__(self, recipe, data):
        self.recipe, self.data = recipe, data
        self.last_loss = None
        """Of the step that has just ended; None where it was not measured, or is no number."""
        self.values = {}
        """What metrics.jsonl says of it, {} where it was not measured."""
        if recipe.validation.every:
            self.held_out = HeldOut(recipe)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.last_loss, self.values = None, {}
        if self.is_due(trainer.global_step):
            float(outputs["loss"])  # the step is over on the GPU too: its seconds are not ours
            started = time.perf_counter()
            self.values = self.measure(module)
            loss = self.values["validation/loss"]
            self.last_loss = loss if math.isfinite(loss) else None
            self.values["validation/seconds"] = time.perf_counter() - started

    def is_due(self, step) -> bool:
        """Whether the loss after `step` steps is measured; the last step has a checkpoint as well."""
        every, last = self.recipe.validation.every, self.recipe.num_steps
        return every > 0 and (step % every == 0 or step == last or self.recipe.saves_at(step))

    def measure(self, module) -> dict:
        """`HeldOut.measure` of a `FlowMatchingModule` in a trainer; collective."""
        found = self.held_out.measure(module.module, module.config, module.data_dtype, self._text)
        if module.module.ddp_config.use_megatron_fsdp:
            module.module.module.synchronize_param_gather()  # frees what was gathered, shards in its place
        return found

    def _text(self):
        """As `text_of`, from the first time it is needed: encoders in slices make it a collective."""
        if not hasattr(self, "_text_source"):
            self._text_source = text_of(self.held_out.reader, self.recipe, self.data)
        return self._text_source


class HeldOut:
    """The held-out samples of a `VideoRecipe` at their noise and times.

    ValueError where the held-out latents do not serve.
    """

    def __init__(self, recipe):
        self.recipe, self.objective = recipe, OBJECTIVES[recipe.objective]
        self.reader = heldout_reader(recipe)
        self.evaluations = evaluations(self.reader, recipe)
        self.shapes = sorted({e.shape for e in self.evaluations})

    @torch.no_grad()
    def measure(self, model, config, dtype, text=None) -> dict:
        """{"validation/loss": of all tokens, "validation/loss_t0.00-0.25": of a quarter of time, ...,
        "validation/loss_32x96x96_t0.00-0.25": of it, that of latents of 32 frames of 96 x 96, ...}.

        Collective; leaves weights, gradients and randomness alone. `text()` has the samples' features; those
        in the latents' shards where it is None.
        """
        read = (text() if text else self.reader).read
        device = torch.cuda.current_device()
        sums = torch.zeros(len(self.shapes) * NUM_REPORTED, 2, dtype=torch.float64, device=device)
        for own, weights in shares(
            self.evaluations,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            self.recipe.micro_batch,
        ):
            part_B = torch.tensor([self._part(e) for e in own], device=sums.device)
            of_rank = self._sums(model, config, dtype, read, own)
            sums.index_add_(0, part_B, of_rank * sums.new_tensor(weights)[:, None])
        return told(sum_over_token_ranks(sums, config).cpu(), self.shapes)

    def _part(self, evaluation):
        """Row of its sums: quarters of time within a shape."""
        quarter = evaluation.time_bin * NUM_REPORTED // NUM_BINS
        return self.shapes.index(evaluation.shape) * NUM_REPORTED + quarter

    def _sums(self, model, config, dtype, read, own):
        """fp64 [B, 2]: loss and tokens of this rank, by evaluation."""
        batch = collate(
            read([e.row for e in own]),
            [e.number for e in own],
            self.recipe.size.contexts,
            latent_channels=self.recipe.size.input_channels,
            token_limits=self.recipe.data.token_limits,
            statistics=self.reader.statistics,
        ).to(torch.cuda.current_device(), dtype)
        time_bins = [e.time_bin for e in own]
        x_BTCHW, target_BTCHW, t_B = fixed_pair(batch, time_bins, self.recipe.seed, self.objective)
        with without_fp8(config):
            velocity_SBX = model(x_BTCHW, t_B, batch.contexts, batch.masks)
        error_SB = token_errors(velocity_SBX, target_BTCHW, config).double()
        return torch.stack((error_SB.sum(dim=0), torch.ones_like(error_SB).sum(dim=0)), dim=1)


def heldout_reader(recipe) -> LatentReader:
    """The held-out latents of a `VideoRecipe`; ValueError where there are none or a shape does not fit."""
    folder = recipe.validation.latents(recipe.data.folder)
    try:
        reader = LatentReader(folder, skip_damaged=True, quarantine=Path(recipe.output) / "quarantine.jsonl")
    except ValueError as error:
        raise ValueError(f"{error}; or set validation.folder, or validation.every=0") from None
    recipe.check_shapes(np.unique(reader.latent_shapes[_trained_kinds(reader, recipe)], axis=0).tolist())
    return reader


def text_of(reader, recipe, data):
    """What held-out samples are read from; online text takes the encoders that training has loaded."""
    return reader if recipe.data.text == "cached" else OnlineText(reader, data.source.encoders)


def first_rows(reader, recipe, num_samples):
    """Rows of the first samples by id, of the kinds (images, clips) the run trains on."""
    rows = _trained_kinds(reader, recipe)
    return rows[np.argsort(reader.sample_ids[rows])][:num_samples]


def evaluations(reader, recipe) -> list[Evaluation]:
    """What is evaluated, sorted by shape: within one the parts of time take turns, so all get as many."""
    validation = recipe.validation
    rows = first_rows(reader, recipe, validation.num_samples)
    first = [(tuple(reader.latent_shapes[row].tolist()), int(row)) for row in rows]
    first.sort(key=lambda pair: pair[0])  # stable: by sample id within a shape
    return [
        Evaluation(
            row=row,
            shape=shape,
            number=number,
            time_bin=(place + number * NUM_BINS // validation.times_per_sample) % NUM_BINS,
        )
        for place, (shape, row) in enumerate(first)
        for number in range(validation.times_per_sample)
    ]


def shares(evaluations, copy, num_copies, micro_batch):
    """The forward passes of one model copy: pairs of (evaluations of one shape, a weight for each).

    All copies get as many, with as many evaluations in each: a pass is a collective where weights are
    sharded. A copy without a sample of its own repeats one of the same pass with weight 0.
    """
    for _, same in itertools.groupby(evaluations, key=lambda e: e.shape):
        same = list(same)
        for start in range(0, len(same), num_copies * micro_batch):
            together = same[start : start + num_copies * micro_batch]
            size = -(-len(together) // num_copies)
            own = together[copy * size : (copy + 1) * size]
            repeats = size - len(own)
            yield own + repeats * [together[0]], len(own) * [1.0] + repeats * [0.0]


def fixed_pair(batch, time_bins, seed, objective):
    """(x_t, target, t) as `step.noisy_pair`, of noise and times that only validation draws.

    `batch.epochs` numbers the evaluations of a sample. t_B is fp64, uniform in its bin.
    """
    latent_BTCHW = batch.latent_BTCHW
    device, dtype = latent_BTCHW.device, latent_BTCHW.dtype
    keys = list(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True))
    noise_BTCHW = flow.draw_noise(
        latent_BTCHW.shape[1:], seed, *zip(*keys, strict=True), dtype, purpose="validation noise"
    ).to(device)
    places = [flow.sample_generator(seed, *key, "validation time").random() for key in keys]
    times = [(first + place) / NUM_BINS for first, place in zip(time_bins, places, strict=True)]
    t_B = torch.tensor(times, dtype=torch.float64, device=device)
    return *objective.noisy_pair(noise_BTCHW, latent_BTCHW, t_B), t_B


def _trained_kinds(reader, recipe):
    """Rows of images and clips, as far as the run trains on them; ValueError where there are none."""
    image_every = recipe.data.image_every
    frames_N = reader.latent_shapes[:, 0]
    rows = np.flatnonzero(np.where(frames_N == 1, image_every > 0, image_every != 1))
    if not len(rows):
        kind = "images" if image_every > 0 else "clips"
        raise ValueError(
            f"{reader.folder} holds no {kind}, which {recipe.name} trains on (data.image_every="
            f"{image_every}): run `moviegen encode` on a manifest with {kind} of the split heldout, set "
            "validation.folder, or set validation.every=0"
        )
    return rows


def told(sums, shapes) -> dict[str, float]:
    """Metrics from fp64 [len(shapes) * NUM_REPORTED, 2]: loss and tokens of each shape's quarters of time.

    A part without a sample is left out.
    """
    sums = sums.view(len(shapes), NUM_REPORTED, 2)
    quarters = [f"t{q / NUM_REPORTED:.2f}-{(q + 1) / NUM_REPORTED:.2f}" for q in range(NUM_REPORTED)]
    rows = {"validation/loss": sums.sum(dim=(0, 1))}
    rows |= {f"validation/loss_{q}": row for q, row in zip(quarters, sums.sum(dim=0), strict=True)}
    for shape, of_shape in zip(shapes, sums, strict=True):
        name = "x".join(map(str, shape))
        rows |= {f"validation/loss_{name}_{q}": row for q, row in zip(quarters, of_shape, strict=True)}
    pairs = {name: row.tolist() for name, row in rows.items()}
    return {name: loss / tokens for name, (loss, tokens) in pairs.items() if tokens}
