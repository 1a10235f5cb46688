"""The selection stage: scores against thresholds, then likeness, balance and captions; nothing is decoded.

Every row of the table of scores is either kept or dropped by exactly one step, the first it does not pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from nemo_moviegen.curation.alike import balanced, clusters, distinct
from nemo_moviegen.curation.captions import Caption
from nemo_moviegen.curation.recipe import CLIP_COLUMNS, HEADER_COLUMNS
from nemo_moviegen.curation.score import passes

KEPT = -1
TWINS = "dedup"
"""Name of the step that drops copies."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the funnel."""

    name: str
    condition: str
    column: str = ""
    """What it looked at, where that is one score."""


@dataclass
class Selection:
    """What became of each of N rows."""

    dropped_by_N: np.ndarray
    """int: number of the step that dropped the row, KEPT where none did."""
    steps: list[Step] = field(default_factory=list)
    captions: dict[int, Caption] = field(default_factory=dict)
    """Of the rows that reached the step `caption`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason by video: those without a usable caption."""

    @property
    def kept(self) -> np.ndarray:
        """Rows that stay, in order."""
        return np.flatnonzero(self.dropped_by_N == KEPT)

    def apply(self, step, stays_N):
        """One more step: drops the rows left that do not stay."""
        self.dropped_by_N[(self.dropped_by_N == KEPT) & ~stays_N] = len(self.steps)
        self.steps.append(step)


def select(table, recipe, read_caption: Callable[[str], Caption]) -> Selection:
    """Which rows of a table of scores (readable videos only) become clips, and why the others do not."""
    selection = Selection(np.full(len(table), KEPT))
    _filter(selection, table, recipe)
    videos = table["video"].to_pylist()
    _caption(selection, videos, recipe, read_caption)
    _drop_twins(selection, table, recipe)
    chance_N = np.full(len(table), np.nan)
    start_N = column_of(table, "start_seconds").tolist()
    for row in selection.kept:
        chance_N[row] = chance(recipe.seed, videos[row], start_N[row])
    _balance(selection, table, recipe, chance_N)
    _mix(selection, table, recipe, chance_N)
    return selection


def chance(seed, *what) -> float:
    """A number in 0..1 that depends on its arguments alone."""
    digest = blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def column_of(table, name) -> np.ndarray:
    """float64 [N] of a number's column, NaN where it is missing."""
    import pyarrow.compute as pc

    return pc.fill_null(table[name], np.nan).to_numpy()


def _filter(selection, table, recipe):
    """The recipe's filters. A row is dropped by what ended its way, not by scores it never got therefore."""
    kind_N = np.array(table["kind"].to_pylist(), dtype=object)
    has_clip_N = ~np.isnan(column_of(table, "start_seconds"))
    for entry in recipe.filters:
        stays_N = np.asarray(passes(entry, column_of(table, entry.column), kind_N))
        if entry.column not in (*HEADER_COLUMNS, *CLIP_COLUMNS):
            stays_N = stays_N | ~has_clip_N
        selection.apply(Step(name=entry.name, condition=entry.text, column=entry.column), stays_N)
    if not has_clip_N[selection.kept].all():  # the recipe has no filter on clip_seconds
        condition = f"a scene of {recipe.sampling.shortest_seconds:g} s"
        selection.apply(Step(name="clip", condition=condition), has_clip_N)


def _caption(selection, videos, recipe, read_caption):
    """Rows whose video has no usable caption go: without one they can stand for no other clip."""
    stays_N = np.ones(len(videos), bool)
    for row in selection.kept:
        name = videos[row]
        try:
            caption = read_caption(name)
            if not caption.caption and not recipe.captioner:
                raise ValueError(
                    "no caption: write it to a .txt or .json of the video's name, or set captioner"
                )
            selection.captions[int(row)] = caption
        except ValueError as error:
            stays_N[row] = False
            selection.refused[name] = str(error)
    selection.apply(Step(name="caption", condition="there is one, in UTF-8"), stays_N)


def _drop_twins(selection, table, recipe):
    rows = selection.kept
    stays_N = np.ones(len(table), bool)
    if len(rows):
        # the best copy stays: the most pixels, then the better picture, then the first by name
        worth = [-column_of(table, "min_side_px")[rows]]
        if "quality" in table.column_names:
            worth.insert(0, -np.nan_to_num(column_of(table, "quality")[rows]))
        order = np.lexsort((np.arange(len(rows)), *worth))
        stays_N[rows] = distinct(embeddings(table, rows), order, recipe.dedup_cosine)
    selection.apply(Step(name=TWINS, condition=f"embedding cosine < {recipe.dedup_cosine:g}"), stays_N)


def _balance(selection, table, recipe, chance_N):
    if recipe.keep_share == 1:
        return
    rows = selection.kept
    stays_N = np.ones(len(table), bool)
    if len(rows):
        label_N = clusters(embeddings(table, rows), recipe.num_clusters, recipe.merge_cosine, recipe.seed)
        stays_N[rows] = balanced(label_N, recipe.keep_share, chance_N[rows])
    condition = f"{100 * recipe.keep_share:g}%, 1 / sqrt(cluster size)"
    selection.apply(Step(name="resampling", condition=condition), stays_N)


def _mix(selection, table, recipe, chance_N):
    share = recipe.landscape_share
    if not share:
        return
    rows = selection.kept
    is_wide = column_of(table, "aspect")[rows] >= 1
    wide, high = rows[is_wide], rows[~is_wide]
    stays_N = np.ones(len(table), bool)
    if share == 1:
        stays_N[high] = False
    elif len(wide) * (1 - share) > len(high) * share:
        _keep_lowest(stays_N, wide, round(len(high) * share / (1 - share)), chance_N)
    else:
        _keep_lowest(stays_N, high, round(len(wide) * (1 - share) / share), chance_N)
    condition = f"{100 * share:g}% landscape"
    selection.apply(Step(name="mix", condition=condition, column="aspect"), stays_N)


def _keep_lowest(stays_N, rows, count, chance_N):
    stays_N[rows[np.argsort(chance_N[rows], kind="stable")[count:]]] = False


def embeddings(table, rows):
    """float32 [N, D]. ValueError where the recipe's embedding has returned vectors of two lengths."""
    import pyarrow.compute as pc

    vectors = table["embedding"].take(rows).combine_chunks()
    lengths = sorted(pc.unique(pc.list_value_length(vectors)).to_pylist())
    if len(lengths) > 1:
        raise ValueError(f"the embedding returns vectors of {lengths} numbers: it must return one length")
    return vectors.flatten().to_numpy().reshape(len(rows), lengths[0])
