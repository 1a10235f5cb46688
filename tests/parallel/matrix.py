"""The parity matrix: which steps must equal which, and the largest errors found: a fork a number of ranks."""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from ranks import run_on_ranks

from nemo_moviegen.batch import PackedVideoBatch, VideoBatch
from nemo_moviegen.layout import CHOICES, Layout
from parallel.steps import errors, start_weights, two_steps

TOLERANCE = 1e-10  # fp64 leaves thirteen digits between rounding and a bug
MEASURES = ("loss", "output", "gradients", "norm", "parameters")
"""In the order a step works them out: the first one that is wrong tells where to look."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Two optimiser steps on `ranks` ranks that must equal one rank's on the batches `reference`."""

    ranks: int
    layout: Layout
    batches: str = "clips"
    reference: str = ""
    """Empty: the same batches."""
    micro_batch: int = 0
    """Samples; 0 makes a micro-batch for each copy of the model of every batch."""
    size: object = tiny.SIZE
    plant: Callable | None = None
    """plant(patch, model, wrapped) may break something; `patch` is pytest's MonkeyPatch."""


def _prompts(lengths, padding=0):
    """Four clips whose prompts have `lengths`, a row a sample; `padding` more tokens that no one may see."""
    batch = tiny.batch()
    generator = torch.Generator().manual_seed(1)
    contexts, masks = [], []
    for context, of_samples in zip(batch.contexts, zip(*lengths, strict=True), strict=True):
        B, L, width = context.shape
        noise = torch.randn(B, padding, width, generator=generator, dtype=context.dtype)
        contexts.append(torch.cat((context, noise), dim=1))
        masks.append(torch.arange(L + padding) < torch.tensor(of_samples)[:, None])
    return replace(batch, contexts=tuple(contexts), masks=tuple(masks))


# tokens of UL2, MetaCLIP and ByT5: all, no ByT5, a single token, none of MetaCLIP
LENGTHS = ((7, 5, 3), (4, 2, 0), (1, 0, 0), (2, 0, 3))
IMAGE_SHAPE = (1, 8, 4)
MIXED_SHAPES = (IMAGE_SHAPE, tiny.LATENT_SHAPE, (2, 4, 8), (1, 4, 4), (4, 4, 4))
"""8, 24, 16, 4 and 16 tokens: the cuts of sequence parallelism fall inside clips."""


def mixed() -> list[VideoBatch]:
    """Clips and images of five shapes, each a batch of its own; prompts of different length."""
    return [tiny.batch(5, shape, seed=i).rows(i, i + 1) for i, shape in enumerate(MIXED_SHAPES)]


def pack(batches) -> PackedVideoBatch:
    """The samples of `VideoBatch`es, one after the other."""

    def joined(field):
        of_encoders = zip(*(getattr(batch, field) for batch in batches), strict=True)
        return tuple(torch.cat(of_samples) for of_samples in of_encoders)

    return PackedVideoBatch(
        latents=tuple(latent for batch in batches for latent in batch.latent_BTCHW),
        contexts=joined("contexts"),
        masks=joined("masks"),
        sample_ids=torch.cat([batch.sample_ids for batch in batches]),
        epochs=torch.cat([batch.epochs for batch in batches]),
    )


def _batches(name) -> list[VideoBatch]:
    """The global batch of both steps: parts of one shape each, in the order of the model's copies."""
    clips, images = tiny.batch(), tiny.batch(latent_shape=IMAGE_SHAPE, seed=1)
    return {
        "clips": [clips],
        "images": [images],
        # every copy of two sees a clip and an image
        "images among clips": [clips.rows(0, 1), images.rows(1, 2), clips.rows(2, 3), images.rows(3, 4)],
        # the first half of the copies has three times the tokens of the other
        "uneven": [clips.rows(0, 2), images.rows(2, 4)],
        "two clips": [clips.rows(0, 2)],
        "two images": [images.rows(2, 4)],
        "prompts": [_prompts(LENGTHS)],
        "padded prompts": [_prompts(LENGTHS, padding=4)],
        "mixed": mixed(),
        "a pack": [pack(mixed())],
        # of four clips and of one
        "two packs": [pack(mixed()[:4]), pack(mixed()[4:])],
    }[name]


def _never_an_image(patch, model, wrapped):
    """One-frame latents are taken for clips wherever someone asks."""
    patch.setattr(VideoBatch, "is_image", property(lambda batch: False))


def _name(ranks, layout):
    copies = layout.data_parallel(ranks)
    parts = []
    if layout.tensor > 1:
        parts.append(f"TP{layout.tensor}" + ("+SP" if layout.sequence else ""))
    if layout.context > 1:
        parts.append(f"CP{layout.context}")
    if copies > 1:
        parts.append(f"DP{copies}")
    return " x ".join(parts) or "one rank"


ALONE, TP2, TP2SP, TP4SP = Layout(), Layout(tensor=2, sequence=False), Layout(tensor=2), Layout(tensor=4)
CP2, CP4, TP2SP_CP2 = Layout(context=2), Layout(context=4), Layout(tensor=2, context=2)


def _rows() -> dict:
    """{(ranks, what, sharding): Row}"""
    lines = [(2, TP2), (2, TP2SP), (2, CP2), (2, ALONE)]
    lines += [(4, TP4SP), (4, CP4), (4, ALONE), (4, TP2SP_CP2), (4, TP2SP), (4, CP2), (8, TP2SP_CP2)]
    cases = [(ranks, layout, "", {}) for ranks, layout in lines]
    for ranks, layout in ((1, ALONE), (2, TP2SP), (2, CP2), (8, TP2SP_CP2)):
        for recompute in ("selective", "full"):
            again = replace(layout, recompute=recompute)
            cases.append((ranks, again, f"recompute {recompute}", {}))
    for ranks, layout, sizes in ((1, ALONE, (2, 1)), (2, ALONE, (1,)), (4, TP2SP, (1,))):
        for samples in sizes:
            count = 4 // layout.data_parallel(ranks) // samples
            cases.append((ranks, layout, f"{count} micro-batches of {samples}", {"micro_batch": samples}))
    cases.append((1, ALONE, "images as clips", {"batches": "images", "plant": _never_an_image}))
    cases.append((1, ALONE, "padded prompts", {"batches": "padded prompts", "reference": "prompts"}))
    for ranks, layout in ((2, ALONE), (2, TP2SP), (4, CP2), (8, TP2SP_CP2)):
        for batches in ("images", "images among clips"):
            cases.append((ranks, layout, batches, {"batches": batches}))
    for ranks, layout in ((2, ALONE), (4, ALONE), (4, TP2SP), (8, TP2SP_CP2)):
        cases.append((ranks, layout, "uneven token counts", {"batches": "uneven"}))
    for ranks, layout in ((2, TP2SP), (2, CP2), (8, TP2SP_CP2)):
        cases.append((ranks, layout, "prompts of 1 to 15 tokens", {"batches": "prompts"}))
    for ranks, layout in ((1, ALONE), (2, TP2), (2, TP2SP), (2, CP2), (4, CP4), (4, TP2SP_CP2)):
        cases.append((ranks, layout, "a pack of five shapes", {"batches": "a pack", "reference": "mixed"}))
    for ranks, layout in ((2, ALONE), (8, TP2SP_CP2)):
        cases.append((ranks, layout, "packs of four and one", {"batches": "two packs", "reference": "mixed"}))
    for ranks, layout in ((2, TP2), (2, TP2SP), (2, CP2), (8, TP2SP_CP2)):
        cases.append((ranks, layout, "a dit block", {"size": tiny.DIT_SIZE}))
    case = {"batches": "a pack", "reference": "mixed", "size": tiny.DIT_SIZE}
    cases.append((4, TP2SP_CP2, "a dit block, a pack of five shapes", case))
    return {
        (ranks, ", ".join(filter(None, (_name(ranks, layout), what))), sharding): Row(
            ranks=ranks, layout=replace(layout, sharding=sharding), **fields
        )
        for ranks, layout, what, fields in cases
        for sharding in CHOICES["sharding"]
    }


ROWS = _rows()


def largest_errors(rows) -> dict:
    """{key: {measure: (largest error over all ranks, where)}} of the rows {key: Row}."""
    found = {}
    for ranks in sorted({row.ranks for row in rows.values()}):
        # rows of one layout follow each other: making process groups takes longer than a step
        own = {key: row for key, row in rows.items() if row.ranks == ranks}
        own = dict(sorted(own.items(), key=lambda item: (item[1].layout.tensor, item[1].layout.context)))
        references = {
            (r.reference or r.batches, r.size): reference(r.reference or r.batches, r.size)
            for r in own.values()
        }
        of_ranks = run_on_ranks(_errors_on_this_rank, own, references, world_size=ranks, timeout_seconds=400)
        for key in own:
            found[key] = {m: max(of_rank[key][m] for of_rank in of_ranks) for m in MEASURES}
    return found


def first_wrong(found) -> str:
    """The first measure that is off by more than the tolerance; "" where none is."""
    return next((m for m in MEASURES if not found[m][0] < TOLERANCE), "")


@functools.cache
def weights(size=tiny.SIZE):
    """{name: parameter} all rows start from."""
    return run_on_ranks(start_weights, size, world_size=1)[0]


@functools.cache
def reference(batches, size=tiny.SIZE):
    return run_on_ranks(_one_rank, batches, size, weights(size), world_size=1)[0]


def _one_rank(batches, size, start):
    return two_steps(Layout(sharding="none"), _batches(batches), 4, start, size)


def _errors_on_this_rank(rows, references):
    gc.freeze()  # Megatron FSDP collects garbage for each model: what was imported before the fork is none
    found = {}
    for key, row in rows.items():
        try:
            found[key] = _row_errors(row, references[row.reference or row.batches, row.size])
        except Exception as error:
            raise AssertionError(f"in row {key}") from error
    return found


def _row_errors(row, reference):
    batches = _batches(row.batches)
    copies = row.layout.data_parallel(row.ranks)
    samples = sum(len(b.sample_ids) for b in batches)
    micro_batch = row.micro_batch or max(1, samples // copies)
    with pytest.MonkeyPatch.context() as patch:
        plant = None if row.plant is None else functools.partial(row.plant, patch)
        steps = two_steps(row.layout, batches, micro_batch, weights(row.size), row.size, plant)
    return errors(steps, reference, row.layout, row.size)
