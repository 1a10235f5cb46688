"""Which clips go to which shard: the units of work of `moviegen encode`, the same for any number of tasks.

    manifests -> clips, each id once -> buckets -> split and shape, in the order of the manifests -> shards

A shard is named by its shape and its place among those of it, so a manifest that is added behind the others
changes the last shard of each shape and adds new ones; the rest stand.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nemo_moviegen.data.clips import Clips, read_manifest
from nemo_moviegen.inputs import Bucket

SPLITS = ("train", "heldout")
_COLUMNS = ("clip_id", "kind", "caption", "source", "path")
_SHARD_BYTES = 1 << 30
_MOST_SAMPLES = 1000
_LATENT_BYTES = 16 * 2  # of one place: the paper's channels, float16


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedShard:
    """Clips of one split and one shape, to be encoded together."""

    name: str
    split: str
    bucket: Bucket
    rows: np.ndarray
    """Of the plan's clips."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What an encode run has to do. Clips that are refused are in no shard."""

    clips: Clips
    start_N: np.ndarray
    """Seconds of the file that a clip's bucket takes, and their exclusive end."""
    end_N: np.ndarray
    fps_N: np.ndarray
    shards: tuple[PlannedShard, ...]
    refused: tuple[tuple[str, str, str], ...]
    """(clip_id, path, reason) of each clip that fits no bucket, or whose id another has."""
    refusals: dict[str, int]
    """How many clips for each sort of reason, in the words of its first."""

    def clips_of(self, shard) -> tuple[list, list]:
        """The clips of a shard with the seconds its bucket takes, and the frame rate of each."""
        chosen = self.clips.select(shard.rows)
        spans = zip(self.start_N[shard.rows].tolist(), self.end_N[shard.rows].tolist(), strict=True)
        clips = [
            replace(clip, start_seconds=start, end_seconds=end)
            for clip, (start, end) in zip(chosen, spans, strict=True)
        ]
        return clips, self.fps_N[shard.rows].tolist()

    def fingerprint(self, shard, made_with) -> str:
        """Of the clips of a shard, in what seconds and at what rate, and of `made_with`: any JSON.

        Folders do not count, so that a data set may move; a file's name does.
        """
        table = self.clips.table.select(_COLUMNS).take(shard.rows).to_pydict()
        table["path"] = [Path(path).name for path in table["path"]]
        numbers = [column[shard.rows].tolist() for column in (self.start_N, self.end_N, self.fps_N)]
        wanted = json.dumps([made_with, vars(shard.bucket), table, numbers], sort_keys=True)
        return hashlib.blake2b(wanted.encode(), digest_size=16).hexdigest()


def plan_shards(manifests, *, bucket=None, bucket_set=None, samples_per_shard=None) -> Plan:
    """The shards of all clips: of one `bucket`, whatever their length, or each of its bucket in `bucket_set`.

    Of two clips with one id the first counts. A shard has `samples_per_shard` clips, by default as many as
    make a GiB of latents, 1000 at most. ValueError for a manifest that cannot be read.
    """
    clips = read_manifest(manifests[0], with_twins=True)
    for manifest in manifests[1:]:
        clips += read_manifest(manifest, with_twins=True)
    first_N = _is_first(clips)
    if bucket_set is None:
        buckets, bucket_N = (bucket,), np.zeros(len(clips), np.int64)
        start_N, end_N = clips.column("start_seconds"), clips.column("end_seconds")
        fps_N, problem_N, reason = np.full(len(clips), float(bucket.fps)), bucket_N, None
    else:
        from nemo_moviegen.data.buckets import assign

        assigned = assign(clips, bucket_set)
        buckets, bucket_N = assigned.buckets, assigned.bucket_N
        start_N, end_N, fps_N = assigned.start_N, assigned.end_N, assigned.fps_N
        problem_N, reason = assigned.problem_N, assigned.reason
    refused, refusals = _refused(clips, first_N, problem_N, reason)
    split_N = clips.column("split")
    shards = []
    for split in SPLITS:
        for number, own in enumerate(buckets):
            rows = np.flatnonzero(first_N & (bucket_N == number) & (split_N == split))
            shards += _cut(split, own, rows, samples_per_shard or _samples_per_shard(own))
    return Plan(
        clips=clips,
        start_N=start_N,
        end_N=end_N,
        fps_N=fps_N,
        shards=tuple(shards),
        refused=refused,
        refusals=refusals,
    )


def shape_name(bucket) -> str:
    """Frames x height x width."""
    return f"{bucket.num_frames}x{bucket.height_px}x{bucket.width_px}"


def _is_first(clips):
    """Whether no clip before has the same id, for each."""
    ids = clips.table.column("clip_id").combine_chunks().dictionary_encode().indices.to_numpy()
    first_N = np.zeros(len(ids), bool)
    first_N[np.unique(ids, return_index=True)[1]] = True
    return first_N


def _refused(clips, first_N, problem_N, reason):
    """What `Plan.refused` and `Plan.refusals` say."""
    refused, words, counts = [], {}, Counter()
    for row in np.flatnonzero(~first_N | (problem_N > 0)).tolist():
        clip = clips[row]
        why = reason(row) if first_N[row] else "another clip before it has the same id: give each its own"
        problem = int(problem_N[row]) if first_N[row] else -1
        refused.append((clip.clip_id, clip.path, f"clip {clip.clip_id}: {why}"))
        counts[words.setdefault(problem, why)] += 1
    return tuple(refused), dict(counts)


def _cut(split, bucket, rows, samples_per_shard):
    return [
        PlannedShard(
            name=f"{shape_name(bucket)}-{number:06d}",
            split=split,
            bucket=bucket,
            rows=rows[number * samples_per_shard : (number + 1) * samples_per_shard],
        )
        for number in range(-(-len(rows) // samples_per_shard))
    ]


def _samples_per_shard(bucket):
    places = -(-bucket.num_frames // 8) * (bucket.height_px // 8) * (bucket.width_px // 8)
    return min(_MOST_SAMPLES, max(1, _SHARD_BYTES // (_LATENT_BYTES * places)))
