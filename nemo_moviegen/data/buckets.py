"""Which clip goes to which bucket, and why some go to none (s3.2.1, Table 2)."""

import math
from dataclasses import dataclass

import numpy as np

from nemo_moviegen.buckets import BucketSet
from nemo_moviegen.data.clips import Clips
from nemo_moviegen.inputs import Bucket

LEAST_KEPT = 0.7
"""Share of the picture that a crop to the bucket's shape must keep (our default): 2.39:1 film keeps 0.74."""
MOST_ENLARGED = 1.05
"""How far a picture may be enlarged to fill the bucket (our default)."""
MOST_FRAMES = 4 / 3 * 1.002
"""Frames a bucket may ask for each of the source's: Table 2 asks 32 fps of 4 s, film has 24 or 24 / 1.001."""
_OUTSIDE = (3, 4)
"""The problems of a clip that is too short or too long."""
_ROUNDING_SECONDS = 1e-6  # of a clip's span: 3 * 1.1 - 2 * 1.1 is no 1.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Where each of N clips goes."""

    bucket_set: BucketSet
    buckets: tuple[Bucket, ...]
    """`bucket_set.buckets`: the shapes that `bucket_N` counts."""
    bucket_N: np.ndarray
    """Index into `buckets`; -1 where the clip is refused."""
    start_N: np.ndarray
    """Seconds of the file the frames come from, and their exclusive end; equal for an image."""
    end_N: np.ndarray
    fps_N: np.ndarray
    """Rate at which the bucket's frames fill those seconds; of an image `bucket_set.image_fps`."""
    clips: Clips
    problem_N: np.ndarray
    """Number of what is wrong, 0 = nothing: `reason` says it in words."""

    def reason(self, row) -> str:
        """Why the clip of this row is refused: what it has, what it needs, what to do; "" where it is not."""
        clip, name, durations = self.clips[row], self.bucket_set.name, self.bucket_set.durations
        if not durations and self.problem_N[row] in _OUTSIDE:
            return f"it is a clip, and {name} takes images only: use buckets of clips or leave it out"
        shortest, longest = _bounds(self.bucket_set)[0], _bounds(self.bucket_set)[-1]
        seconds, size = clip.end_seconds - clip.start_seconds, f"{clip.width_px}x{clip.height_px} px"
        height, width = self.bucket_set.sizes[_nearest_sizes(self.bucket_set, clip.height_px, clip.width_px)]
        kept, enlarged = _fit(clip.height_px, clip.width_px, height, width)
        bucket = f"{width}x{height}, the nearest size of {name}"
        return (
            "",
            f"its size is {size}: probe the file again",
            f"its frame rate is {clip.source_fps:g}: probe the file again",
            f"{seconds:.3f} s is too short for {name}, whose clips start at {shortest:g} s: "
            "use buckets of shorter clips or leave it out",
            f"{seconds:.3f} s is too long for {name}, whose clips end below {longest:g} s: "
            "cut it into single shots",
            f"a crop of {size} to the shape of {bucket}, keeps {kept:.0%} of the picture, less than "
            f"{LEAST_KEPT:.0%}: crop its borders or leave it out",
            f"{size} has to grow {enlarged:.2f} times to fill {bucket}, more than {MOST_ENLARGED:g} times: "
            "use buckets of a lower resolution or leave it out",
            f"{clip.source_fps:g} frames a second are too few for the {self.fps_N[row]:.2f} of its bucket of "
            f"{name}, which takes up to {MOST_FRAMES:.2f} times the source's: leave it out",
        )[self.problem_N[row]]


def assign(clips, bucket_set) -> Assignment:
    """Each clip's bucket, seconds and frame rate; a clip that fits none is refused with a `reason`.

    The duration chooses the row of Table 2, the aspect ratio the size: the nearest by its logarithm, so that
    wide and tall count alike. What the file's clock does between frames is no matter.
    """
    clips = Clips.of(clips)
    image_N = clips.column("kind") == "image"
    height_N, width_N = clips.column("height_px"), clips.column("width_px")
    start_N, end_N, source_fps_N = (
        clips.column(name) for name in ("start_seconds", "end_seconds", "source_fps")
    )
    row_N = _duration_rows(bucket_set, end_N - start_N)
    outside_N = [(row_N == place) & ~image_N for place in (-1, len(bucket_set.durations))]
    row_N = np.clip(row_N, 0, max(0, len(bucket_set.durations) - 1))
    frames_N = np.where(image_N, 1, np.array([d.num_frames for d in bucket_set.durations] or [1])[row_N])
    start_N, end_N, fps_N = _spans(bucket_set, row_N, image_N, frames_N, start_N, end_N)

    size_N = _nearest_sizes(bucket_set, height_N, width_N)
    kept_N, enlarged_N = _fit(height_N, width_N, *np.array(bucket_set.sizes)[size_N].T)
    problems = [
        (height_N <= 0) | (width_N <= 0),
        ~image_N & ~(source_fps_N > 0),
        *outside_N,
        kept_N < LEAST_KEPT,
        enlarged_N > MOST_ENLARGED,
        ~image_N & (fps_N > MOST_FRAMES * source_fps_N),
    ]
    problem_N = np.select(problems, range(1, len(problems) + 1), 0).astype(np.int8)
    buckets = bucket_set.buckets
    kinds = sorted({bucket.num_frames for bucket in buckets})
    bucket_N = np.searchsorted(kinds, frames_N) * len(bucket_set.sizes) + size_N
    return Assignment(
        bucket_set=bucket_set,
        buckets=buckets,
        bucket_N=np.where(problem_N == 0, bucket_N, -1),
        start_N=start_N,
        end_N=end_N,
        fps_N=fps_N,
        clips=clips,
        problem_N=problem_N,
    )


def _duration_rows(bucket_set, seconds_N):
    """Number of each clip's duration; -1 for a shorter one, the number of durations for a longer one."""
    return np.searchsorted(_bounds(bucket_set), seconds_N + _ROUNDING_SECONDS, side="right") - 1


def _bounds(bucket_set):
    """Where durations begin and the last ends, rising; of images only where no clip is: at infinity."""
    starts = [duration.shortest_seconds for duration in bucket_set.durations]
    return starts + ([duration.longest_seconds for duration in bucket_set.durations[-1:]] or [math.inf])


def _spans(bucket_set, row_N, image_N, frames_N, start_N, end_N):
    """(start, end, frames a second) of what the bucket takes of each clip: all of it, or its middle."""
    fixed_N = np.array([duration.fps for duration in bucket_set.durations] or [0], float)[row_N]
    seconds_N = end_N - start_N
    with np.errstate(divide="ignore", invalid="ignore"):
        taken_N = np.where((fixed_N > 0) & ~image_N, np.minimum(frames_N / fixed_N, seconds_N), seconds_N)
        fps_N = np.where(fixed_N > 0, fixed_N, frames_N / seconds_N)
    start_N = start_N + (seconds_N - taken_N) / 2
    return start_N, start_N + taken_N, np.where(image_N, bucket_set.image_fps, fps_N)


def _nearest_sizes(bucket_set, height_N, width_N):
    """Index of the size whose aspect ratio is nearest; the first of two that are equally near."""
    ratio_N = np.log(np.maximum(height_N, 1) / np.maximum(width_N, 1))
    ratio_S = np.log([height / width for height, width in bucket_set.sizes])
    return np.abs(ratio_N[..., None] - ratio_S).argmin(-1)


def _fit(height_N, width_N, to_height_N, to_width_N):
    """(share of the picture a crop to the other's shape keeps, how far it is then enlarged)."""
    vertical_N, horizontal_N = to_height_N / np.maximum(height_N, 1), to_width_N / np.maximum(width_N, 1)
    smaller_N = np.minimum(vertical_N, horizontal_N)
    larger_N = np.maximum(vertical_N, horizontal_N)
    return smaller_N / larger_N, larger_N
