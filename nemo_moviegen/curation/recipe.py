"""What curation is told: thresholds, how clips are cut, who scores them. Plain numbers, no numpy.

What is measured and what is done with it are apart: `filters` and all below `dedup_cosine` choose among rows
that are scored; the rest says what is scored, and changing it scores again what it touches, nothing else.
"""

import math
from dataclasses import dataclass, field

from nemo_moviegen import settings

HEADER_COLUMNS = (
    "duration_seconds",
    "width_px",
    "height_px",
    "min_side_px",
    "aspect",
    "fps",
    "bit_depth",
    "is_hdr",
)
"""Known without decoding a clip. Filters on them decide whether a video is decoded at all."""
CLIP_COLUMNS = ("clip_seconds", "num_scenes", "shots_per_second", "camera_confidence")
"""Measured of every video that is decoded, whatever the scorers."""
_TAKEN = (
    "start_seconds",
    "end_seconds",
    "video",
    "file",
    "reason",
    "codec",
    "kind",
    "clips",
    "camera",
    "embedding",
    "strip",
)


def _check_function(function, where):
    module, separator, name = function.partition(":")
    if not (separator and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{where}: {function!r} names no function; write package.module:function")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One step of the funnel: rows whose score lies in low..high stay. A score that is missing does not."""

    name: str
    column: str
    low: float = -math.inf
    high: float = math.inf
    is_strict: bool = False
    """Whether a score equal to a limit is dropped too."""
    videos_only: bool = False
    """Whether an image (a video of one frame) passes whatever its score."""

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"filter {self.name}: nothing lies in {self.low}..{self.high}; swap the limits")

    @property
    def text(self) -> str:
        """The condition as a reader writes it: `4 <= duration_seconds <= 120`."""
        sign = "<" if self.is_strict else "<="
        left = f"{self.low:g} {sign} " if self.low > -math.inf else ""
        right = f" {sign} {self.high:g}" if self.high < math.inf else ""
        return f"{left}{self.column}{right}"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Who fills a column: a function of `curation.look.Look` that returns a float.

    It runs again where its name changes, or its attribute `version`, or what it is shown (`Looking`).
    """

    column: str
    function: str
    """package.module:function"""

    def __post_init__(self):
        if self.column in (*HEADER_COLUMNS, *CLIP_COLUMNS, *_TAKEN):
            raise ValueError(f"scorer of {self.column!r}: there is such a column already; use another name")
        _check_function(self.function, f"scorer of {self.column}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which seconds of a video become clips (App. B): one random span of each of its longest scenes."""

    clips_per_video: int = 2
    shortest_seconds: float = 4.0
    long_seconds: float = 15.0
    """A clip of this length or more is a long one."""
    longest_seconds: float = 16.0
    long_share: float = 0.6
    """Of clips from scenes that allow one; the paper has more than half."""
    skip_seconds: float = 1.0
    """Of a video's start that go into no clip: titles, fades, a hand on the camera."""

    def __post_init__(self):
        lengths = (self.shortest_seconds, self.long_seconds, self.longest_seconds)
        if self.clips_per_video < 1 or not 0 < lengths[0] <= lengths[1] <= lengths[2]:
            raise ValueError(
                f"sampling {self.clips_per_video} clips of {lengths} seconds: give one clip or more, and "
                "shortest_seconds <= long_seconds <= longest_seconds"
            )
        if not 0 <= self.long_share <= 1 or self.skip_seconds < 0:
            raise ValueError(
                f"sampling.long_share is {self.long_share}, skip_seconds {self.skip_seconds}: use a share "
                "of 0..1 and seconds of 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """PySceneDetect's AdaptiveDetector: a cut differs from the frames around it by a ratio."""

    ratio: float = 3.0
    least_change: float = 15.0
    """Mean change of hue, saturation and luma, 0..255, below which nothing is a cut."""
    shortest_seconds: float = 0.2
    width_px: int = 256
    """Frames are compared at this width."""


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What scorers are shown of a clip."""

    num_frames: int = 5
    """Evenly spaced, odd: the middle one is the clip's middle frame."""
    frame_side_px: int = 480
    """Shorter side of these frames at most."""
    num_pairs: int = 8
    """Pairs of consecutive frames, for motion."""
    pair_width_px: int = 768

    def __post_init__(self):
        if self.num_frames < 1 or self.num_frames % 2 == 0 or self.num_pairs < 1:
            raise ValueError(
                f"looking at {self.num_frames} frames and {self.num_pairs} pairs: use an odd number of "
                "frames and one pair or more"
            )


_OURS = "nemo_moviegen.curation"
SCORERS = (
    Scorer(column="text_score", function=f"{_OURS}.text:text_score"),
    Scorer(column="border_share", function=f"{_OURS}.picture:border_share"),
    Scorer(column="aesthetics", function=f"{_OURS}.picture:aesthetics"),
    Scorer(column="quality", function=f"{_OURS}.picture:quality"),
    Scorer(column="motion_score", function=f"{_OURS}.motion:motion_score"),
    Scorer(column="motion_vectors", function=f"{_OURS}.motion:motion_vectors"),
)


@dataclass(frozen=True, kw_only=True)
class CurationRecipe:
    """Everything `moviegen curate` is told but the folders."""

    name: str
    filters: tuple[Filter, ...]
    """In the order of the report. Changing them decodes nothing again."""
    scorers: tuple[Scorer, ...] = SCORERS
    sampling: Sampling = field(default_factory=Sampling)
    scenes: Scenes = field(default_factory=Scenes)
    looking: Looking = field(default_factory=Looking)
    embedding: str = f"{_OURS}.embedding:embedding"
    """package.module:function of a `Look` that returns a vector; near-duplicates have a cosine near 1."""
    num_chunks: int = 256
    """Units of work; tasks share them out. Take about a thousandth of the number of videos, once: another
    number scores everything again."""
    seed: int = 0

    dedup_cosine: float = 0.99
    """Of two clips at least this alike, one is dropped."""
    num_clusters: int = 0
    """Of clips that stay, before duplicate clusters are merged; 0 = square root of their number."""
    merge_cosine: float = 0.95
    """Clusters whose centres are at least this alike are one."""
    keep_share: float = 1.0
    """What resampling by 1/sqrt(cluster size) leaves of the clips it is given; 1 = all of them."""
    landscape_share: float = 0.0
    """Of clips, those at least as wide as high; reached by dropping from the side with too many. 0 = any."""
    heldout_share: float = 0.0
    """Of videos whose sidecar names no split."""
    images: bool = False
    """Whether the middle frame of every clip becomes an image row too."""
    camera_prefix: bool = True
    """Whether a camera motion that is told with confidence leads the caption (App. B)."""
    captioner: str = ""
    """package.module:function of a `Clip` that returns its caption where there is no sidecar's."""

    def __post_init__(self):
        for kind in ("filters", "scorers"):  # OmegaConf returns lists
            object.__setattr__(self, kind, tuple(getattr(self, kind)))
        for function in filter(None, (self.embedding, self.captioner)):
            _check_function(function, self.name)
        known = [*HEADER_COLUMNS, *CLIP_COLUMNS, *(scorer.column for scorer in self.scorers)]
        for entry in self.filters:
            if entry.column not in known:
                near = settings.nearest(entry.column, known)
                raise ValueError(f"filter {entry.name}: no scorer fills {entry.column!r}{near}")
        for kind in ("filters", "scorers"):
            names = [_name(entry) for entry in getattr(self, kind)]
            if len(set(names)) < len(names):
                raise ValueError(f"{self.name}: two {kind} share a name in {', '.join(names)}")
        if self.num_chunks < 1:
            raise ValueError(f"num_chunks is {self.num_chunks}; use 1 or more")
        shares = {n: getattr(self, n) for n in ("keep_share", "landscape_share", "heldout_share")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; a share lies in 0..1")
        if not self.keep_share:
            raise ValueError("keep_share is 0: nothing would be left; use 1 to keep every clip")


def override(recipe, assignments) -> CurationRecipe:
    """The recipe with `key=value` assignments; filters and scorers by name: `filters.text.high=0.7`."""
    return settings.override(recipe, [_numbered(recipe, text) for text in assignments])


def _numbered(recipe, assignment):
    """Entries of a tuple have numbers in `settings.override`, names for people."""
    key, separator, value = assignment.partition("=")
    parts = key.split(".")
    if parts[0] in ("filters", "scorers") and len(parts) == 3 and not parts[1].isdigit():
        names = [_name(entry) for entry in getattr(recipe, parts[0])]
        if parts[1] not in names:
            near = settings.nearest(parts[1], names)
            raise ValueError(f"{recipe.name} has no entry {parts[1]!r} in {parts[0]}{near}")
        parts[1] = str(names.index(parts[1]))
    return ".".join(parts) + separator + value


def _name(entry):
    return entry.name if isinstance(entry, Filter) else entry.column
