"""Packs: clips of mixed shapes that together fill a budget of tokens, an epoch of them planned at once.

Clips of a shape differ in nothing that matters here, so a plan counts: this many packs of one 24-frame and
two 16-frame clips, that many of another mix. It has a few mixes, whatever the number of clips, is found
within a millisecond, and any pack of it can be looked up alone.
"""

import numpy as np


class PackPlan:
    """An epoch's packs for `counts_S` clips of S shapes with `tokens_S` tokens each; every clip is in one.

    Best fit decreasing over whole groups: the longest shape first, each clip to the fullest packs that still
    take it, else to new ones.
    """

    def __init__(self, counts_S, tokens_S, max_tokens):
        mixes, packs = _best_fit(np.asarray(counts_S), np.asarray(tokens_S), max_tokens)
        self.max_tokens = max_tokens
        self.mixes_KS = mixes
        """How many clips of each shape the packs of a mix hold."""
        self.packs_K = packs
        """How many packs have that mix."""
        self.tokens_K = mixes @ np.asarray(tokens_S)
        ends_K = np.cumsum(packs)
        self._ends_K, self.num_packs = ends_K, int(ends_K[-1])
        clips_KS = mixes * packs[:, None]
        self._clips_before_KS = np.cumsum(clips_KS, axis=0) - clips_KS

    @property
    def padding(self) -> float:
        """Share of the budget of all packs that no clip fills."""
        return 1 - float(self.tokens_K @ self.packs_K) / (self.num_packs * self.max_tokens)

    def contents(self, packs_P):
        """What packs of these numbers (0 .. num_packs - 1) hold: (sizes_P, shape_N, rank_N).

        `sizes_P` counts the clips of each pack; they follow one another in the other two: the shape of each
        clip, and how many of that shape come before it in the epoch.
        """
        mix_P = np.searchsorted(self._ends_K, packs_P, side="right")
        number_P = packs_P - (self._ends_K - self.packs_K)[mix_P]
        counts_PS = self.mixes_KS[mix_P]
        first_PS = self._clips_before_KS[mix_P] + number_P[:, None] * counts_PS
        counts = counts_PS.ravel()
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        shapes = np.tile(np.arange(counts_PS.shape[1]), len(mix_P))
        return counts_PS.sum(1), np.repeat(shapes, counts), np.repeat(first_PS.ravel(), counts) + within


def _best_fit(counts_S, tokens_S, max_tokens):
    """(mixes [K, S], packs [K])."""
    groups = []  # (free tokens, packs, mix): packs of one mix
    for shape in np.argsort(-tokens_S, kind="stable"):
        left, tokens, one = (
            int(counts_S[shape]),
            int(tokens_S[shape]),
            np.eye(len(counts_S), dtype=int)[shape],
        )
        new = (max_tokens, -(-left // (max_tokens // tokens)), 0 * one)
        after = []
        for free, packs, mix in [*sorted(groups, key=lambda group: group[0]), new]:
            each = free // tokens
            filled = min(packs, left // each) if each else 0
            last = min(left - filled * each, each) if filled < packs else 0  # what one more pack takes
            after += [
                (free - each * tokens, filled, mix + each * one),
                (free - last * tokens, int(last > 0), mix + last * one),
                (free, packs - filled - (last > 0), mix),
            ]
            left -= filled * each + last
        groups = [group for group in after if group[1] and group[2].any()]
    return np.array([mix for *_, mix in groups]), np.array([packs for _, packs, _ in groups])
