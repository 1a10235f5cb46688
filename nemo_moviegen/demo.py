"""The whole chain at toy size (`make demo`): the commands a user would type, one after the other.

Every stage runs as its own processes, is timed and its memory watched. Finished stages are stamped in
stages.json, so a demo that was interrupted goes on where it was.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from nemo_moviegen.demo_stages import NUM_CLIPS, NUM_CORES, PROMPTS_FILE, RECIPE, Stage, demo_stages
from nemo_moviegen.watch import run_watched
from nemo_moviegen.writable import write_whole

STAGES_FILE = "stages.json"
NUM_SEEN_PROMPTS, NUM_HELDOUT_PROMPTS = 4, 2
"""Shown on the page; further ones are made to be counted."""


def run_demo(out=None, scale=1.0, *, recipe=RECIPE, fresh=False, num_clips=NUM_CLIPS) -> Path:
    """Run every stage that is not done yet; returns the path of the report.

    `recipe` is what the video model is trained by, `out` where everything goes: by default the folder that
    the recipe's own is in. `scale` shrinks clips and training steps for a quick look; `fresh` forgets what an
    earlier demo did. Raises ValueError where a setting does not serve, or a command failed: its own message
    stands above.
    """
    if not 0 < scale <= 10:
        raise ValueError(f"scale is {scale}; 1 is the demo, 0.05 a quick look")
    usual = Path(_video_recipe(recipe).output).parent
    out = Path(out) if out else usual
    out.mkdir(parents=True, exist_ok=True)
    stages = demo_stages(out, scale, num_clips, recipe)
    if fresh:
        forget(out, stages)
    records = read_records(out)
    done = [stage.name for stage, key in keyed(stages) if is_done(stage, key, records)]
    key_of = {stage.name: key for stage, key in keyed(stages)}
    rerun = False
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if stage.name in done and not rerun:
            print(f"{title}: done before ({records[stage.name]['seconds']:.0f} s)", flush=True)
            continue
        print(f"\n{title}", flush=True)
        record = start_record(stage, key_of[stage.name], records, goes_on=stage.resumes and not rerun)
        rerun = True
        if stage.name == "clips" and recipe == RECIPE:  # no film has its frame rate changed for another
            add_film(out)
        if stage.name == "generate":
            write_prompts(out)
        run_stage(stage, record, lambda: write_records(out, scale, stages, records))
    report = stages[-1].outputs[0]
    print(f"\n{_summary(records)}\n{report}", flush=True)
    return report


def add_film(out) -> Path:
    """Lay real film and its caption among the videos of the demo; returns the file."""
    from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, BIG_BUCK_BUNNY_CAPTION

    folder = out / "videos" / "film"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BIG_BUCK_BUNNY.name).with_suffix(".txt").write_text(BIG_BUCK_BUNNY_CAPTION + "\n")
    return Path(shutil.copyfile(BIG_BUCK_BUNNY, folder / BIG_BUCK_BUNNY.name))


def choose_prompts(clips) -> list[str]:
    """Captions of Moving Shapes to generate from: unlike ones seen in training, then held-out ones."""
    chosen = []
    for split, count in (("train", NUM_SEEN_PROMPTS), ("heldout", NUM_HELDOUT_PROMPTS)):
        left = [c for c in clips if c.kind == "video" and c.split == split and c.attributes]
        used = set()
        for _ in range(count):
            # The caption with the fewest words used before: another colour, shape and direction each time.
            left.sort(key=lambda clip: len(used & set(clip.caption.split())))
            if left and left[0].caption not in chosen:
                chosen.append(left[0].caption)
                used |= set(left[0].caption.split())
    return chosen


def write_prompts(out) -> Path:
    """Write the prompts of the demo, one a line; returns the file."""
    from nemo_moviegen.data.clips import read_manifest

    path = out / PROMPTS_FILE
    path.write_text("\n".join(choose_prompts(read_manifest(out / "clips" / "manifest.parquet"))) + "\n")
    return path


def keyed(stages) -> list[tuple[Stage, str]]:
    """Each stage with a key that changes with its commands and recipe, and those of all stages before it."""
    digest, pairs = hashlib.blake2b(digest_size=8), []
    for stage in stages:
        digest.update(repr((stage.commands, stage.recipe)).encode())
        pairs.append((stage, digest.hexdigest()))
    return pairs


def is_done(stage, key, records) -> bool:
    """Whether this very stage finished before and its outputs are still there."""
    record = records.get(stage.name, {})
    same = record.get("finished") and record.get("key") == key
    return bool(same) and all(path.exists() for path in stage.outputs)


def start_record(stage, key, records, *, goes_on) -> dict:
    """A fresh record of the stage, its old outputs deleted; or the old one where the stage goes on."""
    old = records.get(stage.name, {})
    if not (goes_on and old.get("key") == key and not old.get("finished")):
        _delete(stage.outputs)
        old = {"seconds": 0.0, "peak_bytes": 0}
    command = "\n".join(_typed(command) for command in stage.commands)
    records[stage.name] = {**old, "name": stage.name, "command": command, "key": key, "finished": False}
    return records[stage.name]


def run_stage(stage, record, save):
    """Run the commands of the stage, adding to its record, which `save` writes before and after each."""
    for command in stage.commands:
        print(f"$ {_typed(command)}", flush=True)
        save()
        started = time.perf_counter()
        try:
            code, seconds, peak_bytes = run_watched(
                [sys.executable, "-m", "nemo_moviegen", *command], threads_of(command)
            )
        except KeyboardInterrupt:
            record["seconds"] = round(record["seconds"] + time.perf_counter() - started, 2)
            save()
            raise
        record["seconds"] = round(record["seconds"] + seconds, 2)
        record["peak_bytes"] = max(record["peak_bytes"], peak_bytes)
        save()
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ValueError(
                f"stage {stage.name!r} of the demo {how}; what it said stands above. "
                "Start the demo again to go on from this stage"
            )
    record["finished"] = True
    save()


def threads_of(command) -> int:
    """Threads of each process: cores that its processes leave to one another, on a machine of two."""
    has_processes = command[0] in ("train", "curate")
    return 1 if has_processes else min(NUM_CORES, len(os.sched_getaffinity(0)))


def read_records(out) -> dict[str, dict]:
    """Records of an earlier demo by stage; none where stages.json is missing or damaged."""
    try:
        return {record["name"]: record for record in json.loads((out / STAGES_FILE).read_text())["stages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_records(out, scale, stages, records):
    """Replace stages.json, in the order of the stages."""
    kept = [records[stage.name] for stage in stages if stage.name in records]
    write_whole(out / STAGES_FILE, json.dumps({"scale": scale, "stages": kept}, indent=2) + "\n")


def forget(out, stages):
    """Delete what an earlier demo left in `out`, and nothing else that lies there."""
    _delete([path for stage in stages for path in stage.outputs] + [out / STAGES_FILE, out / PROMPTS_FILE])


def _video_recipe(name):
    """A recipe that a demo can train: one of clips after images, in a folder beside those."""
    import recipes

    able = {
        other: recipe
        for other in recipes.RECIPES
        if (recipe := recipes.get(other)).init_from == str(Path(recipe.output).parent / "t2i")
        and Path(recipe.output).name == "t2iv"
    }
    if name not in able:
        raise ValueError(f"a demo can not train {name}: use {' or '.join(able)}")
    return able[name]


def _typed(command):
    return shlex.join(("moviegen", *command))


def _delete(paths):
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _summary(records):
    seconds = sum(record["seconds"] for record in records.values())
    peak = max(record["peak_bytes"] for record in records.values())
    return f"demo done: {seconds / 60:.1f} minutes of stages, peak memory {peak / 2**30:.2f} GiB"
