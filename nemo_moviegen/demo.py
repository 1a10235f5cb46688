"""The whole chain at toy size (`make demo`): the commands a user would type, one after the other.

Every stage runs as its own processes, is timed and its memory watched. Finished stages are stamped in
stages.json, so a demo that was interrupted goes on where it was.
"""

import hashlib
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_moviegen.report_charts import AUTOENCODER_REPORT
from nemo_moviegen.report_scores import SHAPES_SCORES
from nemo_moviegen.watch import run_watched
from nemo_moviegen.writable import write_whole

STAGES_FILE = "stages.json"
PROMPTS_FILE = "prompts.txt"
NUM_CLIPS, NUM_HELDOUT = 600, 24
NUM_MEASURED = 12
"""Held-out clips, and images, that the autoencoder and the image autoencoder rebuild for the comparison."""
NUM_SEEN_PROMPTS, NUM_HELDOUT_PROMPTS = 4, 2
"""Shown on the page; further ones are made to be counted."""
NUM_SEEN_SCORED, NUM_HELDOUT_SCORED = 48, 24


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands (arguments of `moviegen`) that make `outputs` from what earlier stages made."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[Path, ...]
    resumes: bool = False
    """Whether an interrupted run goes on from what it left; otherwise that is deleted first."""


def run_demo(out="out/demo", scale=1.0, *, fresh=False, num_clips=NUM_CLIPS) -> Path:
    """Run every stage that is not done yet; returns the path of the report.

    `scale` shrinks clips and training steps for a quick look; `fresh` forgets what an earlier demo did.
    Raises ValueError where a setting does not serve, or a command failed: its own message stands above.
    """
    if not 0 < scale <= 10:
        raise ValueError(f"scale is {scale}; 1 is the demo, 0.05 a quick look")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = demo_stages(out, scale, num_clips)
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
        if stage.name == "clips":
            add_film(out)
        if stage.name == "generate":
            write_prompts(out)
        run_stage(stage, record, lambda: write_records(out, scale, stages, records))
    report = stages[-1].outputs[0]
    print(f"\n{_summary(records)}\n{report}", flush=True)
    return report


def demo_stages(out, scale, num_clips=NUM_CLIPS) -> list[Stage]:
    """The stages in order, for a demo below the folder `out`."""
    import recipes
    from nemo_moviegen.validation import heldout_folder

    tae_image, tae, t2i, t2iv = map(recipes.get, ("tae.tiny_image", "tae.tiny", "tiny.t2i", "tiny.t2iv"))
    videos, clips, latents, encoders = out / "videos", out / "clips", out / "latents", out / "encoders"
    manifest = clips / "manifest.parquet"
    bucket = tae.data.bucket
    frames, size, fps = bucket.num_frames, f"{bucket.height_px}x{bucket.width_px}", f"{bucket.fps:g}"
    where = {"output": out / "t2i", "data.folder": latents}
    shapes = ("shapes", videos / "shapes", "--clips", max(24, round(num_clips * scale)))
    shapes += ("--heldout", max(4, round(NUM_HELDOUT * scale)))
    curate = ("curate", videos, clips, "--recipe", "curation.tiny")
    where_image = {"output": out / "tae_image", "data.manifest": manifest}
    tae_image_train = train_command(tae_image, scale, where_image)
    where_tae = {"output": out / "tae", "data.manifest": manifest, "init_from": out / "tae_image"}
    tae_train = train_command(tae, scale, where_tae)
    t2i_train = train_command(t2i, scale, where)
    t2iv_train = train_command(t2iv, scale, {**where, "output": out / "t2iv", "init_from": out / "t2i"})
    encode = ("encode", "--manifest", manifest, "--autoencoder", out / "tae", "--encoders", encoders)
    encode += ("--output", latents, "--toy-encoders")
    generate = ("generate", out / "t2iv", "--prompts-file", out / PROMPTS_FILE, "--output", out / "generated")
    generate += ("--autoencoder", out / "tae", "--encoders", encoders, "--latents", latents)
    generate += ("--frames", frames, "--size", size, "--fps", fps)
    score = ("evaluate", "shapes", out / "t2iv", "--autoencoder", out / "tae", "--encoders", encoders)
    score += ("--latents", latents, "--seen", max(2, round(NUM_SEEN_SCORED * min(scale, 1))))
    score += ("--heldout", max(1, round(NUM_HELDOUT_SCORED * min(scale, 1))))
    score += ("--output", out / SHAPES_SCORES.parent)
    evaluate = ("evaluate", "tae", out / "tae", manifest, "--against", out / "tae_image", "--seconds", 1)
    evaluate += ("--limit", NUM_MEASURED, "--output", out / AUTOENCODER_REPORT.parent)
    report = out / "report.html"
    return [
        _stage("clips", (shapes, curate), videos, clips),
        _stage("image autoencoder", (tae_image_train,), out / "tae_image", resumes=True),
        _stage("autoencoder", (tae_train,), out / "tae", resumes=True),
        _stage("autoencoder measured", (evaluate,), out / AUTOENCODER_REPORT.parent),
        _stage("latents", (encode,), encoders, latents, heldout_folder(latents)),
        _stage("images", (t2i_train,), out / "t2i", resumes=True),
        _stage("images and video", (t2iv_train,), out / "t2iv", resumes=True),
        _stage("generate", (generate,), out / "generated"),
        _stage("scores", (score,), out / SHAPES_SCORES.parent),
        _stage("report", (("report", out, "--output", report),), report),
    ]


def train_command(recipe, scale, settings) -> tuple[str, ...]:
    """`train NAME` with the settings that differ from the recipe's, steps scaled."""
    changed = {key: value for key, value in settings.items() if str(value) != str(_setting(recipe, key))}
    if scale != 1:
        changed["num_steps"] = steps = max(4, round(recipe.num_steps * scale))
        changed["save_every"] = max(2, min(recipe.save_every or steps, steps // 2))
        changed["log_every"] = max(1, min(recipe.log_every, steps // 20))
        changed["optim.warmup_steps"] = max(1, round(recipe.optim.warmup_steps * min(scale, 1)))
    return ("train", recipe.name, *(f"{key}={value}" for key, value in changed.items()))


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
    """Each stage with a key that changes with its commands and with those of all stages before it."""
    digest, pairs = hashlib.blake2b(digest_size=8), []
    for stage in stages:
        digest.update(repr(stage.commands).encode())
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
            code, seconds, peak_bytes = run_watched([sys.executable, "-m", "nemo_moviegen", *command])
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


def _stage(name, commands, *outputs, resumes=False):
    commands = tuple(tuple(str(word) for word in command) for command in commands)
    return Stage(name=name, commands=commands, outputs=outputs, resumes=resumes)


def _setting(recipe, key):
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe


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
