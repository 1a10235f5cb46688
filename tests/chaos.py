"""Kill the demo's training at random instants, resume it, and compare with a run nobody killed: `make chaos`.

    python tests/chaos.py                        20 kills of forked ranks
    python tests/chaos.py --launcher --kills 3   of `moviegen train` as a user starts it

The recipe is tiny.t2iv, shortened, on two ranks, with a checkpoint every few steps written while training
goes on. An attempt trains until it is killed or done; the next goes on in the same run folder. A third of the
kills wait for a checkpoint to be begun and strike up to 50 ms later, the others at any instant between the
start of the attempt and its expected end, so also while it starts or reads a checkpoint. Victims: one rank,
both, or both with their launcher. After every attempt each line of metrics.jsonl must be that of the
uninterrupted run to the last bit (all but the speeds), and at the end each tensor and state of the last
checkpoint as well.

Ranks are forked from this process, which has imported everything once; a small launcher does what torchrun
does with them. With --launcher it is torchrun itself, in the recipe's own layout alone: each start imports
all that again.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from chaos_compare import checkpoint_difference, difference, read_metrics
from chaos_runs import (
    ForkedRun,
    Saves,
    TorchrunRun,
    end_run,
    settings,
    steps_of,
    strike,
    tail_of,
    warm_up,
    write_latents,
)

SHARDINGS = ("none", "optimizer", "full")
VICTIMS = ("one rank", "all ranks", "ranks and launcher")
DEMO_LATENTS = Path("out/demo/latents")
SAVE_SECONDS = 0.05
"""A kill aimed at a checkpoint strikes this long at most after it was begun."""
PATIENCE_SECONDS = 300
"""More than any attempt takes."""


@dataclass(frozen=True)
class Kill:
    """One kill: `after_seconds` of an attempt, or of the moment the checkpoint `in_save` of it is begun."""

    victim: str
    after_seconds: float
    in_save: int = 0
    """0 = any instant, else the how-manieth checkpoint of the attempt."""
    rank: int = 0


@dataclass(frozen=True)
class Attempt:
    """What became of one start of the run."""

    resumed_from: int
    """Step of the checkpoint it found; 0 = none."""
    reached: int
    """Last step in metrics.jsonl."""
    was_killed: bool
    was_saving: bool
    """Whether the kill left a half written checkpoint."""
    seconds: float
    differs: str
    """Empty, or what differs from the uninterrupted run."""


def attempt(start, assignments, folder, kill, reference, seconds_limit=PATIENCE_SECONDS) -> Attempt:
    """Start the run in `folder` once and `kill` it (None: let it end). AssertionError where it ends badly.

    `start` is ForkedRun or TorchrunRun, `reference` the metrics of the uninterrupted run by step ({}: none).
    """
    resumed_from = max(steps_of(folder), default=0)
    log = folder.with_name(folder.name + ".log")
    started = time.perf_counter()
    run = start(assignments, log)
    watched = Saves(folder, resumed_from)
    strikes_at = None if kill is None or kill.in_save else started + kill.after_seconds
    was_killed = False
    try:
        while run.poll() is None:
            now = time.perf_counter()
            assert now - started < seconds_limit, (
                f"{folder} was still running after {seconds_limit} s\n{tail_of(log)}"
            )
            if kill and kill.in_save and strikes_at is None and watched.begun() >= kill.in_save:
                strikes_at = now + kill.after_seconds
            if strikes_at is not None and now >= strikes_at and not was_killed:
                was_killed = strike(run, kill)
            time.sleep(0.001)
    finally:
        end_run(run)
    code = run.poll()
    assert was_killed or code == 0, f"{folder} ended with exit code {code}\n{tail_of(log)}"
    lines = read_metrics(folder)
    return Attempt(
        resumed_from=resumed_from,
        reached=len(lines),
        was_killed=was_killed,
        was_saving=any(folder.glob("checkpoints/step=*.partial")),
        seconds=round(time.perf_counter() - started, 3),
        differs=difference(lines, reference) if reference else "",
    )


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run of one layout."""

    folder: Path
    metrics: list
    seconds: float
    startup_seconds: float
    step_seconds: float


def uninterrupted(start, folder, latents, sharding, num_steps, save_every) -> Reference:
    """Train once from start to end without a kill."""
    assignments = settings(folder, latents, sharding, num_steps, save_every)
    done = attempt(start, assignments, folder, None, {})
    assert done.reached == num_steps, f"{folder} ended at step {done.reached} of {num_steps}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["speed/step_seconds"] for line in lines]
    return Reference(
        folder,
        read_metrics(folder),
        done.seconds,
        startup_seconds=max(0.0, done.seconds - sum(steps)),
        step_seconds=statistics.median(steps),
    )


def next_kill(rng, num_saves, expected_seconds, in_save) -> Kill:
    """A random kill of an attempt that is expected to take so long and to begin so many checkpoints."""
    victim, rank = rng.choice(VICTIMS), rng.randrange(2)
    if in_save:
        return Kill(victim, rng.uniform(0, SAVE_SECONDS), rng.randint(1, max(1, num_saves)), rank)
    return Kill(victim, rng.uniform(0, expected_seconds), 0, rank)


def kill_and_resume(
    start, reference, out, latents, sharding, *, num_kills, num_steps, save_every, rng, place=0
):
    """Yield (Kill or None, Attempt) of one layout until `num_kills` have struck and the last run has ended.

    A run that ends between is compared with the uninterrupted one, and a new one begins.
    """
    struck, number, folder, slowness = 0, 0, None, 1.0
    while folder is not None or struck < num_kills:
        if folder is None:
            number += 1
            folder = out / f"{sharding}-{number}"
        left = num_steps - max(steps_of(folder), default=0)
        usual = reference.startup_seconds + left * reference.step_seconds
        kill = None
        if struck < num_kills:
            num_saves, in_save = -(-left // save_every), (place + struck) % 3 == 1
            kill = next_kill(rng, num_saves, slowness * usual, in_save)
        assignments = settings(folder, latents, sharding, num_steps, save_every)
        done = attempt(start, assignments, folder, kill, reference.metrics)
        struck += done.was_killed
        if not done.was_killed:
            slowness = done.seconds / usual  # the machine may do other work now than during the reference
        has_ended = max(steps_of(folder), default=0) == num_steps  # also where it was killed after that
        if has_ended or not done.was_killed:
            differs = (
                done.differs or _short(done, num_steps) or checkpoint_difference(folder, reference.folder)
            )
            done = replace(done, differs=differs)
            folder = None
        yield kill if done.was_killed else None, done


def chaos(out, latents, *, start, num_kills, num_steps, save_every, seed, shardings=SHARDINGS) -> dict:
    """Kill `num_kills` times in all; {"runs", "kills"} with all that was seen, printed as it happens."""
    kills, runs = [], {}
    print(f"seed {seed}: {num_kills} kills of {num_steps} steps, a checkpoint every {save_every}; {latents}")
    for place, sharding in enumerate(shardings):
        share = (num_kills * (place + 1)) // len(shardings) - (num_kills * place) // len(shardings)
        if not share:
            continue
        whole = uninterrupted(start, out / f"{sharding}-whole", latents, sharding, num_steps, save_every)
        runs[sharding] = {"seconds": whole.seconds, "startup_seconds": round(whole.startup_seconds, 3)}
        print(f"\nlayout.sharding={sharding}, uninterrupted: {whole.seconds:.1f} s\n{_HEADER}", flush=True)
        rng = random.Random(f"{seed} {sharding}")
        resumed = kill_and_resume(
            start,
            whole,
            out,
            latents,
            sharding,
            num_kills=share,
            num_steps=num_steps,
            save_every=save_every,
            rng=rng,
            place=sum(row["was_killed"] for row in kills),
        )
        for kill, done in resumed:
            told = None if kill is None else asdict(kill)
            kills.append({"sharding": sharding, "kill": told, **asdict(done)})
            struck = sum(row["was_killed"] for row in kills)
            print(_row(struck, kill, done), flush=True)
            if done.differs:
                return {"runs": runs, "kills": kills}
    return {"runs": runs, "kills": kills}


_HEADER = (
    "kill  victim              instant                 resumed from  reached  in a save  equal\n"
    "----  ------------------  ----------------------  ------------  -------  ---------  -----"
)


def _row(number, kill, done):
    if kill is None:
        number, victim, instant = "", "-", f"ended, {done.seconds:.2f} s"
    elif kill.in_save:
        victim, instant = kill.victim, f"save {kill.in_save} + {1000 * kill.after_seconds:.0f} ms"
    else:
        victim, instant = kill.victim, f"{kill.after_seconds:.2f} s"
    if victim == "one rank":
        victim = f"rank {kill.rank}"
    saving = "yes" if done.was_saving else "no"
    return (
        f"{number!s:>4}  {victim:18}  {instant:22}  {done.resumed_from:12}  {done.reached:7}  {saving:9}  "
        f"{done.differs or 'yes'}"
    )


def _short(done, num_steps):
    return "" if done.reached == num_steps else f"the run ended at step {done.reached} of {num_steps}"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Kill training at random instants and compare what resumes.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", action="store_true", help="through `moviegen train` and torchrun")
    parser.add_argument("--out", type=Path, default=Path("out/chaos"), help="scratch folder, emptied first")
    parser.add_argument("--write", type=Path, help="JSON file for what was seen")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    started = time.perf_counter()
    warm_up()
    latents = (
        DEMO_LATENTS if (DEMO_LATENTS / "index.parquet").is_file() else write_latents(options.out / "latents")
    )
    seen = chaos(
        options.out,
        latents,
        start=TorchrunRun if options.launcher else ForkedRun,
        num_kills=options.kills,
        num_steps=options.steps,
        save_every=options.save_every,
        seed=options.seed,
        shardings=("optimizer",) if options.launcher else SHARDINGS,
    )
    seconds = time.perf_counter() - started
    wrong = [row for row in seen["kills"] if row["differs"]]
    struck = [row for row in seen["kills"] if row["was_killed"]]
    if options.write:
        facts = {
            "command": " ".join(("python tests/chaos.py", *sys.argv[1:])),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, no GPU, load {os.getloadavg()[1]:.0f}",
            "steps": options.steps,
            "save_every": options.save_every,
            "seed": options.seed,
            "seconds": round(seconds, 1),
        }
        options.write.write_text(json.dumps({**facts, **seen}, indent=1) + "\n", encoding="utf-8")
    if wrong:
        print(f"\nchaos: layout.sharding={wrong[0]['sharding']}: {wrong[0]['differs']}", file=sys.stderr)
        return 1
    saving = sum(row["was_saving"] for row in struck)
    print(
        f"\n{len(struck)} kills, {saving} of them inside a save, in {seconds:.0f} s: every resumed run is the"
    )
    print("uninterrupted one to the last bit, in its losses and in the weights, moments and EMA it ends with")
    return 0


if __name__ == "__main__":
    sys.exit(main())
