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
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from nemo_moviegen.launch import LAUNCH_FILE

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


def settings(output, latents, sharding, num_steps, save_every):
    """What is changed in tiny.t2iv, as one types it after `moviegen train tiny.t2iv`."""
    return [
        f"output={output}",
        f"data.folder={latents}",
        f"layout.sharding={sharding}",
        f"num_steps={num_steps}",
        f"save_every={save_every}",
        "init_from=",
        "data.image_every=4",
        "ema_decay=0.99",
        "optim.warmup_steps=5",
        "global_batch=4",
        "micro_batch=1",
        "validation.every=10",
        "validation.num_samples=2",
    ]


class ForkedRun:
    """One attempt on ranks forked from this process. Leads a process group of its own, which they share."""

    def __init__(self, assignments, log, break_it=None):
        fork = multiprocessing.get_context("fork")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.process = fork.Process(target=_launch_ranks, args=(assignments, str(log), port, break_it))
        self.process.start()
        self.pid, self.wait = self.process.pid, self.process.join

    def poll(self):
        return self.process.exitcode

    def ranks(self):
        try:
            return sorted(psutil.Process(self.pid).children(), key=lambda child: child.pid)
        except psutil.Error:
            return []


class TorchrunRun:
    """One attempt through `moviegen train`, whose torchrun starts each rank in a session of its own."""

    def __init__(self, assignments, log):
        command = [sys.executable, "-m", "nemo_moviegen", "train", "tiny.t2iv", *assignments]
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        self.pid, self.wait, self.poll = self.process.pid, self.process.wait, self.process.poll
        (output,) = (text.partition("=")[2] for text in assignments if text.startswith("output="))
        self.launch_file = f"{output}/{LAUNCH_FILE}"

    def ranks(self):
        """Found by what they were told to train, so also when the launcher is gone."""
        found = [p for p in psutil.process_iter(["cmdline"]) if self.launch_file in (p.info["cmdline"] or ())]
        return sorted(found, key=lambda process: process.pid)


def attempt(start, assignments, folder, kill, reference, seconds_limit=PATIENCE_SECONDS) -> Attempt:
    """Start the run in `folder` once and `kill` it (None: let it end). AssertionError where it ends badly.

    `start` is ForkedRun or TorchrunRun, `reference` the metrics of the uninterrupted run by step ({}: none).
    """
    resumed_from = max(_steps(folder), default=0)
    log = folder.with_name(folder.name + ".log")
    started = time.perf_counter()
    run = start(assignments, log)
    watched = _Saves(folder, resumed_from)
    strike = None if kill is None or kill.in_save else started + kill.after_seconds
    was_killed = False
    try:
        while run.poll() is None:
            now = time.perf_counter()
            assert now - started < seconds_limit, (
                f"{folder} was still running after {seconds_limit} s\n{_tail(log)}"
            )
            if kill and kill.in_save and strike is None and watched.begun() >= kill.in_save:
                strike = now + kill.after_seconds
            if strike is not None and now >= strike and not was_killed:
                was_killed = _strike(run, kill)
            time.sleep(0.001)
    finally:
        _end(run)
    code = run.poll()
    assert was_killed or code == 0, f"{folder} ended with exit code {code}\n{_tail(log)}"
    lines = read_metrics(folder)
    return Attempt(
        resumed_from=resumed_from,
        reached=len(lines),
        was_killed=was_killed,
        was_saving=any(folder.glob("checkpoints/step=*.partial")),
        seconds=round(time.perf_counter() - started, 3),
        differs=difference(lines, reference) if reference else "",
    )


def read_metrics(folder) -> list[dict]:
    """Lines of metrics.jsonl without the speeds; a last one that was being written does not count."""
    path, lines = Path(folder, "metrics.jsonl"), []
    for text in path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []:
        if text.endswith("\n"):
            lines.append({k: v for k, v in json.loads(text).items() if not _is_clock(k)})
    return lines


def _is_clock(name):
    return name.startswith("speed/") or name.endswith("seconds")


def difference(lines, reference) -> str:
    """The first line that is not the uninterrupted run's, in words; empty where there is none."""
    for number, line in enumerate(lines):
        if line["step"] != number + 1:
            return f"line {number + 1} of metrics.jsonl is of step {line['step']}"
        if number >= len(reference):
            return f"step {line['step']} is past the end of the uninterrupted run"
        for name in sorted(line.keys() | reference[number].keys()):
            mine, theirs = line.get(name), reference[number].get(name)
            if mine != theirs:
                return f"step {line['step']} differs: {name} is {mine!r} instead of {theirs!r}"
    return ""


def checkpoint_difference(folder, reference) -> str:
    """What differs between the last checkpoints of two runs, in words; empty where nothing does."""
    import torch

    from nemo_moviegen.training.checkpoint import last_checkpoint, read_state
    from nemo_moviegen.training.storage import check_files, read_whole, tensor_shapes

    states, tensors = [], []
    for run in (folder, reference):
        last = last_checkpoint(run)
        check_files(last / "tensors")
        states.append(read_state(last))
        tensors.append(read_whole(last / "tensors", sorted(tensor_shapes(last / "tensors"))))
    if states[0] != states[1]:
        return f"state.json of the last checkpoint says {states[0]} instead of {states[1]}"
    if tensors[0].keys() != tensors[1].keys():
        return f"the last checkpoint has other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())}"
    for name, tensor in tensors[0].items():
        if not torch.equal(tensor, tensors[1][name]):
            off = (tensor != tensors[1][name]).sum().item()
            return f"{name} of the last checkpoint differs in {off} of {tensor.numel()} elements"
    return ""


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
        left = num_steps - max(_steps(folder), default=0)
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
        has_ended = max(_steps(folder), default=0) == num_steps  # also where it was killed after that
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


class _Saves:
    """Counts the checkpoints of an attempt as they are begun."""

    def __init__(self, folder, first_step):
        self.folder, self.seen = folder / "checkpoints", {first_step}
        self.old = {first_step}

    def begun(self):
        with contextlib.suppress(FileNotFoundError):
            for path in os.scandir(self.folder):
                number = path.name.partition("=")[2].partition(".")[0]
                if number.isdigit() and int(number) > min(self.old):
                    self.seen.add(int(number))
        return len(self.seen - self.old)


def _strike(run, kill) -> bool:
    """SIGKILL the victims; False where all have ended before."""
    ranks = [process.pid for process in run.ranks()]
    pids = ranks[kill.rank : kill.rank + 1] if kill.victim == "one rank" else ranks
    if kill.victim == "ranks and launcher" or not pids:  # none: so early that they are not there yet
        pids = [run.pid, *pids]  # the launcher first, before it ends the ranks in its own way
    struck = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            struck = True
    return struck


def _end(run):
    """End what is left of an attempt."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for process in run.ranks():
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(5)


def _steps(folder):
    from nemo_moviegen.training.checkpoint import checkpoints

    return list(checkpoints(folder))


def _tail(log, num_lines=25):
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def _launch_ranks(assignments, log, port, break_it):
    """What torchrun does: two ranks, and when one dies the other is told to end, and then made to."""
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115, the rest of its life
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_train, args=(rank, assignments, port, break_it)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            ended = waiting.pop(sentinel)
            ended.join()
            if ended.exitcode:
                for other in waiting.values():
                    other.terminate()
                for other in waiting.values():
                    other.join(2)
                    other.kill()
                sys.exit(1)


def _train(rank, assignments, port, break_it):
    import recipes
    from nemo_moviegen.launch import launch
    from nemo_moviegen.recipe import override

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="chaos",
    )
    if break_it:
        break_it()
    launch(override(recipes.get("tiny.t2iv"), assignments))


def warm_up():
    """Import everything before the first fork; one thread, or a forked rank hangs in its parent's pool."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    from nemo_moviegen.training.cpu import stand_in_for_cuda
    from nemo_moviegen.training.record import quiet

    quiet()
    stand_in_for_cuda()
    import nemo.lightning

    quiet()
    import nemo.collections.llm

    import nemo_moviegen.training.guard
    import nemo_moviegen.training.module
    import nemo_moviegen.training.monitor
    import nemo_moviegen.training.saving
    import nemo_moviegen.training.strategy
    import nemo_moviegen.training.validation  # noqa: F401

    quiet()
    return nemo


def write_latents(folder, num_samples=48):
    """Random latents of the demo's shapes, a third of them images, and a few held out; returns the folder."""
    import numpy as np

    import recipes
    from nemo_moviegen.data.latents import LatentSample, LatentWriter, write_empty_prompt
    from nemo_moviegen.encode import heldout_folder

    recipe, rng = recipes.get("tiny.t2iv"), np.random.default_rng(0)
    size, area = recipe.size, (recipe.latent_height, recipe.latent_width)

    def features():
        return {c.name: rng.normal(size=(rng.integers(1, c.max_tokens), c.width)) for c in size.contexts}

    for place, count in ((folder, num_samples), (heldout_folder(folder), 6)):
        with LatentWriter(place) as writer:
            for i in range(count):
                frames = 1 if i % 3 == 0 else recipe.latent_frames
                writer.add(
                    LatentSample(
                        sample_id=i,
                        clip_id=f"clip{i}",
                        caption="",
                        fps=16.0,
                        contexts=features(),
                        latent_TCHW=rng.normal(size=(frames, size.input_channels, *area)),
                    )
                )
        write_empty_prompt(place, features())
    return folder


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
