"""All layouts a recipe can take on a cluster: which fit, which is fastest, and why one was refused.

What varies is tensor, context, sharding, recompute, context_comm and micro_batch; the global batch, and so
what is learned, stays. Tensor and context ranks stay within `MOST_RANKS`, and sequence parallelism stays as
the recipe has it.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace

from nemo_moviegen.layout import CHOICES
from nemo_moviegen.planning.memory import GIB
from nemo_moviegen.planning.plan import IMAGES, Plan, fits_on, kinds_of, make_plan
from nemo_moviegen.planning.told import changes_to, describe
from nemo_moviegen.settings import override

MOST_RANKS = 64
"""Of one axis, tensor or context."""
MOST_SAMPLES = 64
"""Of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What there is for a recipe on a cluster."""

    asked: Plan
    """The recipe as it is."""
    plans: tuple[Plan, ...]
    """Legal ones that fit, fastest first; where no seconds are known, least memory first."""
    refused: dict[str, int]
    """How many were refused, by reason."""

    @property
    def num_legal(self) -> int:
        """Layouts that divide everything, whether they fit or not."""
        return len(self.plans) + self.refused.get("memory", 0)

    def rank(self) -> int:
        """Place of the asked one among those that fit, from 1; 0 where it is not among them."""
        asked = (self.asked.layout, self.asked.micro_batch)
        return next((n for n, p in enumerate(self.plans, 1) if (p.layout, p.micro_batch) == asked), 0)

    def nearest(self) -> Plan | None:
        """What fits with the least changes to the asked one, the fastest of equals; None if nothing does."""
        return min(self.plans, key=lambda plan: _distance(plan, self.asked), default=None)


def search(recipe, cluster, *, text=None) -> Search:
    """Plans of all legal layouts and micro-batches of a `VideoRecipe`; ValueError if its own is illegal."""
    asked, refused, plans = make_plan(recipe, cluster, text=text), Counter(), []
    for candidate in _candidates(recipe, cluster.num_ranks, refused):
        if fits_on(candidate, cluster, text=text):
            plans.append(make_plan(candidate, cluster, text=text))
        else:
            refused["memory"] += 1
    plans.sort(key=_order)
    return Search(asked=asked, plans=tuple(plans), refused=dict(refused))


def why(recipe, cluster, changes, *, text=None) -> str:
    """One line on the layout that `changes` (tensor=8, context=2, micro_batch=1) make of the recipe's.

    Why it is refused; by how much it does not fit and what is nearest; or its place among those that fit.
    """
    keys = [
        change if change.startswith(("micro_batch=", "layout.")) else f"layout.{change}" for change in changes
    ]
    try:
        wanted = override(recipe, keys)
        found = search(wanted, cluster, text=text)
    except ValueError as error:
        return f"refused: {error}"
    if not found.asked.fits:
        return why_not(found)
    place, best, step = found.rank(), found.plans[0], found.asked.step_seconds
    said = f"{describe(found.asked)} is legal and fits: place {place} of {len(found.plans)}"
    if step is None or place == 1:
        return said
    slower = f"{step / best.step_seconds - 1:.1%} slower than {describe(best)}"
    return f"{said}, {slower}: {_what_differs(found.asked, best)}"


def memory_problem(recipe, cluster) -> str:
    """Why a `VideoRecipe` does not fit a cluster, and the nearest layout that does; "" where it fits."""
    return "" if fits_on(recipe, cluster) else why_not(search(recipe, cluster))


def why_not(found) -> str:
    """By how much the asked layout does not fit, what takes it, and the nearest that does; "" if it fits."""
    asked, memory = found.asked, found.asked.memory
    if asked.fits:
        return ""
    largest = sorted(asdict(memory).items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in largest)
    said = (
        f"{asked.recipe} with {describe(asked)} needs {memory.device_bytes / GIB:.1f} GiB a rank, "
        f"{asked.cluster} has {asked.memory_limit_bytes / GIB:.1f}: {asked.over_bytes / GIB:.1f} too few "
        f"({parts}); "
    )
    nearest = found.nearest()
    if nearest is None:
        return f"{said}no layout fits on {asked.num_ranks} ranks; take more of them or ones with more memory"
    return (
        f"{said}nearest that fits: {' '.join(changes_to(nearest, asked))} "
        f"({nearest.memory.device_bytes / GIB:.1f} GiB{_seconds(nearest)})"
    )


def _candidates(recipe, num_ranks, refused):
    """Recipes of all legal layouts and micro-batches; counts the others by what does not divide."""
    size, shapes = recipe.size, _token_counts(recipe)
    for tensor in _divisors(num_ranks, MOST_RANKS):
        for context in _divisors(num_ranks // tensor, MOST_RANKS):
            sequence = tensor if recipe.layout.sequence else 1
            if size.num_heads % tensor or size.ffn_width % tensor:
                refused["heads or FFN do not divide"] += 1
            elif any(tokens % (context * sequence) for tokens in shapes):
                refused["tokens do not divide"] += 1
            elif recipe.global_batch % (num_ranks // tensor // context):
                refused["the global batch does not divide"] += 1
            else:
                yield from _variants(recipe, num_ranks, tensor, context, refused)


def _variants(recipe, num_ranks, tensor, context, refused):
    a_copy = recipe.global_batch // (num_ranks // tensor // context)
    comms = CHOICES["context_comm"] if context > 1 else (recipe.layout.context_comm,)
    for comm in comms:
        layout = replace(recipe.layout, tensor=tensor, context=context, context_comm=comm)
        for micro_batch in _divisors(a_copy, MOST_SAMPLES):
            try:
                legal = replace(recipe, layout=layout, micro_batch=micro_batch)
            except ValueError:
                refused["kernels refuse it"] += 1
                continue
            for sharding in CHOICES["sharding"]:
                for recompute in CHOICES["recompute"]:
                    other = replace(layout, sharding=sharding, recompute=recompute)
                    yield _with_layout(legal, other)


def _with_layout(recipe, layout):
    """`recipe` with a layout that differs in what no check of a recipe looks at; checks take longest."""
    changed = object.__new__(type(recipe))
    changed.__dict__.update(recipe.__dict__, layout=layout)
    return changed


def _token_counts(recipe):
    frames = [1 if kind == IMAGES else recipe.latent_frames for kind in kinds_of(recipe)]
    shapes = {(f, recipe.latent_height, recipe.latent_width) for f in frames} | set(recipe.bucket_shapes)
    return {recipe.size.num_tokens(shape) for shape in shapes}


def _divisors(number, most):
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _order(plan):
    seconds = plan.step_seconds
    return (math.inf if seconds is None else seconds, plan.memory.device_bytes)


def _distance(plan, asked):
    """Doublings of ranks and of the micro-batch, and settings that differ: what costs least to change counts
    least."""
    ours, theirs = plan.layout, asked.layout
    moved = sum(
        abs(math.log2(a / b))
        for a, b in (
            (ours.tensor, theirs.tensor),
            (ours.context, theirs.context),
            (plan.micro_batch, asked.micro_batch),
        )
    )
    recompute = CHOICES["recompute"].index(ours.recompute) - CHOICES["recompute"].index(theirs.recompute)
    named = (ours.sharding != theirs.sharding) + (
        ours.context > 1 and ours.context_comm != theirs.context_comm
    )
    return (moved + named + abs(recompute), *_order(plan))


def _what_differs(plan, best):
    ours, theirs = plan.seconds_by_part(), best.seconds_by_part()
    name = max(ours, key=lambda part: ours[part] - theirs[part])
    return f"most of it in {name}, {ours[name]:.2f} s against {theirs[name]:.2f}"


def _seconds(plan):
    return "" if plan.step_seconds is None else f", {plan.step_seconds:.2f} s a step"
