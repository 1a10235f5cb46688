"""Buckets: the few shapes all clips of a training set are brought to (s3.2.1, Table 2). No torch.

A bucket is one row of Table 2 in one of five aspect ratios. Rows name ranges of duration; where the paper's
rows meet or overlap, ours follow one another:

    seconds        frames        frame rate         what of the clip
    4 .. 8           128         128 / duration     all of it
    8 .. 10.67       192         192 / duration     all of it
    10.67 .. 12      256         24                 the middle 10.67 s
    12 .. 16         256         256 / duration     all of it
    16 .. 120        256         16                 the middle 16 s

The paper has two rows for 10.67 to 12 s: such a clip fills 256 frames at 24 a second, so it takes that row.
Its clips end at 16 s; a longer one gives its middle, up to the 120 s above which its pool takes no video
(Table 38). `data/buckets.py` says which clip goes where.
"""

from dataclasses import dataclass

from nemo_moviegen.inputs import Bucket


@dataclass(frozen=True, kw_only=True)
class DurationBucket:
    """A row of Table 2: clips of `shortest_seconds` up to, not including, `longest_seconds`."""

    shortest_seconds: float
    longest_seconds: float
    num_frames: int
    fps: float
    """Of the middle num_frames / fps seconds; 0 = all of the clip, at num_frames / duration."""

    def __post_init__(self):
        shortest, longest = self.shortest_seconds, self.longest_seconds
        if not 0 < shortest < longest or self.num_frames < 2 or self.fps < 0:
            raise ValueError(
                f"a bucket of {self.num_frames} frames at {self.fps} a second for {shortest}..{longest} s: "
                "use 2 frames or more, a rate of 0 or more, and seconds that rise from above 0"
            )
        if self.fps and self.num_frames / self.fps > shortest:
            raise ValueError(
                f"{self.num_frames} frames at {self.fps:g} a second take {self.num_frames / self.fps:g} s, "
                f"but clips start at {shortest:g} s: raise shortest_seconds or fps"
            )

    @property
    def lowest_fps(self) -> float:
        """Of its longest clips where the rate follows the duration."""
        return float(self.fps or self.num_frames / self.longest_seconds)


@dataclass(frozen=True, kw_only=True)
class BucketSet:
    """Every shape of a stage: each duration in each size. Images are one frame in the same sizes."""

    name: str
    durations: tuple[DurationBucket, ...]
    """From short to long, each starting where the one before ends; none = images only."""
    sizes: tuple[tuple[int, int], ...]
    """(height_px, width_px), one for each aspect ratio."""
    image_fps: float = 16.0
    """Rate the prompt of an image names; the paper says nothing of it, 16 is its commonest (our default)."""

    def __post_init__(self):
        for before, after in zip(self.durations, self.durations[1:], strict=False):
            if before.longest_seconds != after.shortest_seconds:
                raise ValueError(
                    f"buckets {self.name}: one duration ends at {before.longest_seconds:g} s and the next "
                    f"starts at {after.shortest_seconds:g} s: let each start where the one before ends"
                )
        ratios = {height / width for height, width in self.sizes}
        if not self.sizes or len(ratios) < len(self.sizes):
            raise ValueError(
                f"buckets {self.name}: sizes {self.sizes}: give one size for each aspect ratio, at least one"
            )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The distinct shapes, images first, then by frames: each in the order of `sizes`.

        Durations with as many frames share a bucket; its `fps` is the lowest of them.
        """
        rates = {1: self.image_fps}
        for duration in self.durations:
            rate = duration.lowest_fps
            rates[duration.num_frames] = min(rate, rates.get(duration.num_frames, rate))
        return tuple(
            Bucket(num_frames=num_frames, height_px=height, width_px=width, fps=fps)
            for num_frames, fps in sorted(rates.items())
            for height, width in self.sizes
        )


def bucket_set(name) -> BucketSet:
    """A set of `BUCKET_SETS` by its name; ValueError with the known ones."""
    if name not in BUCKET_SETS:
        raise ValueError(f"there are no buckets called {name!r}; use {', '.join(BUCKET_SETS)}")
    return BUCKET_SETS[name]


_AT_24 = 256 / 24  # 10.67 s
TABLE_2 = (
    DurationBucket(shortest_seconds=4, longest_seconds=8, num_frames=128, fps=0),
    DurationBucket(shortest_seconds=8, longest_seconds=_AT_24, num_frames=192, fps=0),
    DurationBucket(shortest_seconds=_AT_24, longest_seconds=12, num_frames=256, fps=24),
    DurationBucket(shortest_seconds=12, longest_seconds=16, num_frames=256, fps=0),
    DurationBucket(shortest_seconds=16, longest_seconds=120, num_frames=256, fps=16),
)

# The paper states 1024x576 and 576x1024 of five. Ours are 1:1, 4:3, 3:4, 16:9 and 9:16 in whole patches of
# 16 px and of about one area: an image has 2304 or 2352 tokens, which tensor 4 x context 2 (Table 3) divides.
_SIZES_768 = ((768, 768), (672, 896), (896, 672), (576, 1024), (1024, 576))
# A third of those, to the patch: 256 or 252 tokens. 224x304 is nearer to 4:3, but tensor 4 leaves 2 of 266.
_SIZES_256 = ((256, 256), (224, 288), (288, 224), (192, 336), (336, 192))
# s3.3: finetuning has clips of 10.6 to 16 s at 24 frames a second, and of 16 s at 16.
_SFT = (
    DurationBucket(shortest_seconds=_AT_24, longest_seconds=16, num_frames=256, fps=24),
    DurationBucket(shortest_seconds=16, longest_seconds=120, num_frames=256, fps=16),
)
# s3.7 states 1024 px; the sizes are our default, as those of 768: 4,096 or 4,032 tokens.
_SIZES_1024 = ((1024, 1024), (896, 1152), (1152, 896), (768, 1344), (1344, 768))

BUCKET_SETS = {
    buckets.name: buckets
    for buckets in (
        BucketSet(name="video_256", durations=TABLE_2, sizes=_SIZES_256),
        BucketSet(name="video_768", durations=TABLE_2, sizes=_SIZES_768),
        BucketSet(
            name="tiny",
            durations=(
                DurationBucket(shortest_seconds=0.5, longest_seconds=1, num_frames=8, fps=0),
                DurationBucket(shortest_seconds=1, longest_seconds=120, num_frames=16, fps=16),
            ),
            sizes=((64, 64), (48, 96)),
        ),
        BucketSet(  # the two rates of finetuning (s3.3), by what a clip of 16 frames lasts
            name="shapes",
            durations=(
                DurationBucket(shortest_seconds=16 / 24, longest_seconds=1, num_frames=16, fps=24),
                DurationBucket(shortest_seconds=1, longest_seconds=120, num_frames=16, fps=16),
            ),
            sizes=((64, 64),),
        ),
        BucketSet(name="tiny_image", durations=(), sizes=((64, 64),)),
        BucketSet(name="sft_768", durations=_SFT, sizes=_SIZES_768),
        BucketSet(
            name="image_256", durations=(), sizes=_SIZES_256[:1]
        ),  # s3.1.3: aspect ratios come with clips
        BucketSet(name="image_1024", durations=(), sizes=_SIZES_1024),
        BucketSet(name="ablation_192", durations=TABLE_2[:1], sizes=((192, 352),)),  # s3.6.2: 352x192, 4-8 s
    )
}
