"""What must be equal on several ranks, compared every `guard.check_every` steps.

what                                              is equal on
------------------------------------------------- -------------------------------------------------
parameters                                        all ranks
  that tensor ranks share out                     all ranks of a tensor rank's number
  that data ranks share out (sharding = full)     the tensor ranks of a piece, if they hold the same
sample ids, epochs, noise                         the tensor and context ranks of one copy
sample ids with their epochs                      no two copies
loss, gradient norm, steps skipped                all ranks

Two all-reduces of a few KB tell every rank whether all of it holds. Where something does not, another
collective brings what each rank has, so every rank draws up the same report and raises it: none waits.
"""

import math
import struct
from collections import defaultdict
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_moviegen.training.shards import gathers_late

EMPTY = torch.iinfo(torch.int64).min
"""Where a rank has nothing to compare it writes the least number, over which a maximum passes."""
_CHUNK = {"cpu": 2**17, "cuda": 2**24}  # elements widened to int64 at once: what a cache holds; 128 MiB
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_NAMED = 4
_NO_SAMPLE = (-1, -1)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the model, and which ranks hold pieces of it in place of the whole."""

    name: str
    tensor_pieces: bool
    data_pieces: bool
    """Over data and context ranks together."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has at the end of a step."""

    rank: int
    tensor: int
    """Its number among the tensor-parallel ranks; `context` and `data` alike."""
    context: int
    data: int
    checksums: list[int]
    """One a parameter, in the order of the model."""
    samples: tuple[tuple[int, int], ...]
    """(sample id, epoch) of this copy's share of the batch."""
    noise: int
    """Checksum of the targets, data minus noise, of whole latents."""
    has_stand_ins: bool
    """Whether this rank met damaged samples: the next of their shape stand in for them."""
    loss: float
    grad_norm: float
    was_applied: bool
    """Whether the optimiser took the step."""
    skipped: int
    """Steps that this rank has skipped in this run."""

    def __str__(self):
        return f"rank {self.rank} (tensor {self.tensor}, context {self.context}, data {self.data})"


class Monitor(pl.Callback):
    """Compares; RuntimeError on every rank says what differs, at which step, on which ranks, and what to do.

    `guard` is the run's `SkipBadSteps`: it has the loss and the gradient norm this rank decided by.
    """

    def __init__(self, recipe, data, guard):
        self.recipe, self.data, self.guard = recipe, data, guard
        self.due = False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        every = self.recipe.guard.check_every
        self.due = every > 0 and (trainer.global_step + 1) % every == 0
        self.batches, self.noise, self.checksums = [], [], None
        self.module = module

    def on_megatron_reduce_microbatches_end(self, reduced):
        """NeMo's event after a step's passes: where weights travel late, ranks are as one only until the
        optimiser steps."""
        if self.due and gathers_late(self.module.module):
            self.checksums = _checksums(self.module)

    def on_megatron_microbatch_end(self, batch, output):
        """NeMo's event after a forward pass; `output` is what the module's training step returned."""
        if self.due:
            _, target = output
            self.batches.append(torch.stack((batch.sample_ids, batch.epochs), dim=1))
            of_clips = target if isinstance(target, tuple) else (target,)  # of a pack, one a clip
            self.noise += [checksum(part) for part in of_clips]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.due:
            self.due = False
            parameters = parameters_of(module, self.recipe.layout)
            compare(self.report(module), parameters, trainer.global_step)

    def report(self, module) -> RankReport:
        """This rank's, of the step that has just ended."""
        checksums = _checksums(module) if self.checksums is None else self.checksums
        return RankReport(
            rank=dist.get_rank(),
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            context=parallel_state.get_context_parallel_rank(),
            data=parallel_state.get_data_parallel_rank(),
            checksums=checksums.tolist(),
            samples=tuple((i, epoch) for i, epoch in torch.cat(self.batches).tolist()),
            noise=_digest(torch.stack(self.noise).tolist()),
            has_stand_ins=self.data.reader.quarantined > 0,
            loss=self.guard.loss,
            grad_norm=self.guard.grad_norm,
            was_applied=not self.guard.reason,
            skipped=self.guard.detector.skipped,
        )


def _checksums(module):
    return torch.stack([checksum(p) for p in module.parameters()])


def checksum(tensor) -> torch.Tensor:
    """int64 scalar of raw bits and their places, on the tensor's device; one changed element changes it."""
    own = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, this rank's piece
    bits = own.detach().contiguous().flatten().view(_INTEGERS[own.element_size()])
    chunk = _CHUNK[bits.device.type]
    # an odd factor is a bijection modulo 2**64, so what differs in one place cannot vanish
    factors = 2 * torch.arange(min(chunk, bits.numel()), device=bits.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].to(torch.int64)
        part = part ^ (part >> 31)  # a bijection too; without it two flipped signs of fp64 cancel
        total += 2 * start * part.sum() + part.mul_(factors[: part.numel()]).sum()
    return total


def parameters_of(module, layout) -> list[Parameter]:
    """Of a built module, in the order of `module.parameters()`."""
    return [
        Parameter(
            name=name.replace("module.", ""),
            tensor_pieces=layout.tensor > 1 and getattr(parameter, "tensor_model_parallel", False),
            data_pieces=layout.sharding == "full",
        )
        for name, parameter in module.named_parameters()
    ]


def compare(report, parameters, step):
    """Collective: RuntimeError on all ranks where the `RankReport` of one does not fit the others'."""
    if all_agree(report, parameters):
        return
    reports = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    raise RuntimeError(
        f"step {step}: ranks that must agree do not\n  "
        + "\n  ".join(violations(reports, parameters))
        + "\nStart the run again: it goes on from its last checkpoint, which gives all ranks the same "
        "weights. If the same rank differs again, take its node out of the job (memory, links); if others "
        "do, it is a bug of this layout: run the parity tests (make test), and use another layout meanwhile"
    )


def all_agree(report, parameters) -> bool:
    """Collective: whether the reports of all ranks fit each other, the same answer everywhere.

    Every fact has its place in a vector of int64 that the ranks fill which must agree on it: they do where
    the maximum over all ranks is also the minimum.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    context = parallel_state.get_context_parallel_world_size()
    copies = parallel_state.get_data_parallel_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # packs of a step may hold more samples on one copy than on another, and the vectors must be of one length
    most = torch.tensor(len(report.samples), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    samples = (*report.samples, *[_NO_SAMPLE] * (int(most) - len(report.samples)))
    samples = [number for sample in samples for number in sample]
    piece = report.data * context + report.context
    own = torch.cat(
        (
            _row(report.data, copies, [report.noise, *samples]),
            _row(report.tensor, tensor, [_digest_of(report, parameters, (True, False))]),
            _row(piece, copies * context, [_digest_of(report, parameters, (False, True))]),
            _row(0, 1, [_digest_of(report, parameters, (False, False)), *_decision(report)]),
        )
    )
    negated = torch.where(own == EMPTY, EMPTY, ~own)  # ~ turns the order round
    both = torch.cat((own, negated, own.new_tensor([report.has_stand_ins]))).to(device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    both, has_stand_ins = both[:-1].cpu(), bool(both[-1])
    highest, lowest = both[: own.numel()], ~both[own.numel() :]
    samples = highest[: copies * (1 + len(samples))].view(copies, -1)[:, 1:].reshape(copies, -1, 2)
    by_copy = {copy: set(map(tuple, row)) - {_NO_SAMPLE} for copy, row in enumerate(samples.tolist())}
    return bool((highest == lowest).all()) and not (
        _in_two_copies(by_copy, has_stand_ins) or _applied_a_bad_norm(report)
    )


def violations(reports, parameters) -> list[str]:
    """What is wrong among the `RankReport`s of all ranks, a sentence each; [] where all is well."""
    found = []
    for index, parameter in enumerate(parameters):
        key = _KEYS[parameter.tensor_pieces, parameter.data_pieces]
        found += _differing(f"parameter {parameter.name}", reports, lambda r, i=index: r.checksums[i], key)
    if len(found) > _MOST_NAMED:
        found[_MOST_NAMED:] = [f"and {len(found) - _MOST_NAMED} parameters more"]
    found += _differing("batch (sample id, epoch)", reports, lambda r: r.samples, _copy, _listed)
    found += _differing("noise of the batch", reports, lambda r: r.noise, _copy)
    first = {report.data: report for report in reversed(reports)}
    shared = _in_two_copies(
        {copy: report.samples for copy, report in first.items()}, any(r.has_stand_ins for r in reports)
    )
    for (sample, epoch), copies in list(shared.items())[:_MOST_NAMED]:
        ranks = " and ".join(str(first[copy]) for copy in copies[:_MOST_NAMED])
        found.append(f"sample {sample} (epoch {epoch}) is in more than one copy's batch: {ranks}")
    found += _differing("loss, gradient norm, steps skipped", reports, _decision, _KEYS[False, False], _told)
    found += [f"gradient norm {r.grad_norm} was applied on {r}" for r in reports if _applied_a_bad_norm(r)]
    return found


def _copy(report):
    return report.data


def _decision(report):
    """What the rank judged the step by, as integers: a NaN must equal a NaN."""
    return _bits(report.loss), _bits(report.grad_norm), report.skipped


def _told(report):
    return f" ({report.loss!r}, {report.grad_norm!r}, {report.skipped})"


def _listed(report):
    return f" {list(report.samples)}"


_KEYS = {  # (tensor_pieces, data_pieces): ranks of one key must hold the same
    (False, False): lambda _: None,
    (True, False): lambda r: r.tensor,
    (False, True): lambda r: (r.data, r.context),
    (True, True): lambda r: r.rank,
}


def _differing(what, reports, value, key, shown=lambda _: ""):
    """Sentences for the sets of ranks that `key` puts together and whose values are not one.

    `shown` is what a sentence says of a rank's value.
    """
    sets = defaultdict(lambda: defaultdict(list))
    for r in reports:
        sets[key(r)][value(r)].append(r)
    for by_value in sets.values():
        most, *others = sorted(by_value.values(), key=lambda ranks: (-len(ranks), ranks[0].rank))
        for other in others[:_MOST_NAMED]:
            sides = (_named(ranks) + shown(ranks[0]) for ranks in (other, most))
            yield f"{what}: {' differs from '.join(sides)}"


def _named(ranks):
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return ", ".join(map(str, ranks[:_MOST_NAMED])) + more


def _in_two_copies(samples_by_copy, has_stand_ins):
    """{(sample id, epoch): copies} of samples that are in the batches of more than one copy.

    A stand-in of a damaged sample may meet the sample it is: then only a whole batch taken twice counts.
    """
    copies_of = defaultdict(set)
    for copy, samples in samples_by_copy.items():
        for sample in samples:
            copies_of[sample].add(copy)
    shared = {sample: sorted(copies) for sample, copies in copies_of.items() if len(copies) > 1}
    if has_stand_ins and not any(shared.keys() >= set(samples) for samples in samples_by_copy.values()):
        return {}
    return shared


def _applied_a_bad_norm(report):
    return report.was_applied and not math.isfinite(report.grad_norm)


def _digest_of(report, parameters, pieces):
    """One number for the checksums of the parameters held in such (tensor_pieces, data_pieces)."""
    pairs = zip(parameters, report.checksums, strict=True)
    return _digest(c for parameter, c in pairs if (parameter.tensor_pieces, parameter.data_pieces) == pieces)


def _digest(numbers):
    total = sum(number * (2 * place + 1) for place, number in enumerate(numbers)) % 2**64
    return total - 2**64 if total >= 2**63 else total


def _bits(number):
    """The bits of a float as an int64, one for all NaNs."""
    return struct.unpack("q", struct.pack("d", math.nan if math.isnan(number) else number))[0]


def _row(row, num_rows, values):
    """int64 [num_rows * len(values)]: `values` in one row of a table that is empty otherwise."""
    table = torch.full((num_rows, len(values)), EMPTY, dtype=torch.int64)
    table[row] = torch.tensor(values, dtype=torch.int64)
    return table.flatten()
