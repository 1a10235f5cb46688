"""What of a plan of shards is there, and the index over it once all of it is."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

from nemo_moviegen.data.latent_writer import finish_folder, read_table
from nemo_moviegen.data.latents import INDEX
from nemo_moviegen.data.shard_plan import SPLITS, shape_name
from nemo_moviegen.data.shards import write_whole
from nemo_moviegen.validation import heldout_folder

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
"""In an output folder: one line for each clip that was left out, with the reason."""
_OURS = re.compile(r"(shard|\d+x\d+x\d+)-\d{6}\.(tar|parquet)")


class Encoded:
    """The shards of a plan in their folders: the training set in `output`, held-out samples beside it.

    `made_with` is what beside the clips decides a shard's bytes, as JSON: a shard made with anything else, or
    from other clips, is not there.
    """

    def __init__(self, plan, output, made_with):
        self.plan = plan
        self.folders = {"train": Path(output), "heldout": heldout_folder(output)}
        self.wanted = {shard: plan.fingerprint(shard, made_with) for shard in plan.shards}

    def folder(self, shard) -> Path:
        """Where the shard lies."""
        return self.folders[shard.split]

    def table(self, shard):
        """The `ShardTable` of a shard that is there; None of another."""
        table = read_table(self.folder(shard), shard.name)
        return table if table and table.wanted == self.wanted[shard] else None

    def unfinish(self):
        """Both folders are of one autoencoder: with one shard made anew, neither is whole."""
        for folder in self.folders.values():
            (folder / INDEX).unlink(missing_ok=True)

    def finish(self) -> dict:
        """Write index, statistics and quarantine file of both folders, if all shards are there.

        Returns what is there: the keys that `encode.encode` says are of all shards.
        """
        tables = {shard: table for shard in self.plan.shards if (table := self.table(shard))}
        summary = _summary(self.plan, tables)
        if summary["missing"]:
            return summary
        for split, folder in self.folders.items():
            own = [shard for shard in self.plan.shards if shard.split == split]
            left_out = [entry for shard in own for entry in tables[shard].quarantined]
            refused = self.plan.refused if split == "train" else ()
            _write_quarantine(folder / QUARANTINE, [*refused, *left_out])
            if split == "train" or summary[split]:
                statistics_of = self.folders["train"] if split == "heldout" else None
                finish_folder(folder, [shard.name for shard in own], statistics_of)
            else:
                (folder / INDEX).unlink(missing_ok=True)
            _remove_others(folder, {shard.name for shard in own})
        return summary


def told(output, done) -> str:
    """What `encode.encode` returned, in a few lines."""
    rate = f", {done['encoded'] / done['seconds']:.1f} a second" if done["encoded"] else ""
    lines = [
        f"{output}: {done['train']} samples, {done['heldout']} held out, {done['nbytes'] / 1e9:.2f} GB; "
        f"{done['encoded']} encoded now{rate}"
    ]
    lines += [f"  {shape}: {count} samples" for shape, count in done["shapes"].items()]
    lines += [f"  {count} refused: {reason}" for reason, count in done["refused"].items()]
    if done["quarantined"]:
        lines.append(f"  {len(done['quarantined'])} left out for their files' fault, see {QUARANTINE}")
    if done["missing"]:
        lines.append(f"  not finished: {done['missing']} shards of other tasks are missing")
    return "\n".join(lines)


def _summary(plan, tables):
    samples, shapes = Counter(), Counter()
    for shard, table in tables.items():
        samples[shard.split] += len(table.rows)
        shapes[shape_name(shard.bucket)] += len(table.rows)
    return {split: samples[split] for split in SPLITS} | {
        "shapes": dict(shapes),
        "refused": plan.refusals,
        "quarantined": [clip_id for table in tables.values() for clip_id, *_ in table.quarantined],
        "nbytes": sum(table.nbytes for table in tables.values()),
        "missing": len(plan.shards) - len(tables),
    }


def _write_quarantine(path, left_out):
    if not left_out:
        path.unlink(missing_ok=True)  # that of an earlier run
        return
    lines = [
        json.dumps({"clip_id": clip_id, "path": str(file), "reason": reason})
        for clip_id, file, reason in left_out
    ]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    ids = [clip_id for clip_id, *_ in left_out]
    more = ", ..." if len(ids) > 10 else ""
    logger.warning("%d clips were left out, see %s: %s", len(ids), path, ", ".join(ids[:10]) + more)


def _remove_others(folder, names):
    """Shards of an earlier plan, which no index names any more, and what killed tasks left."""
    for path in folder.glob("*"):
        if path.name.endswith(".part") or (_OURS.fullmatch(path.name) and path.stem not in names):
            path.unlink(missing_ok=True)
