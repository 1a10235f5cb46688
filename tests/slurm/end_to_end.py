"""A run that a real SLURM ends in every way it can is the run nobody ended: `make slurm-test`.

    python tests/slurm/end_to_end.py [--out FOLDER]

Starts SLURM with one node (one_node.sh) and submits slurm/train.sbatch with the demo's model on two ranks:

    job 1   nobody touches it: the reference
    job 2   time limit near -> saves, requeues itself; pre-empted by another job -> saves, requeues itself;
            a rank killed -> requeues itself; scancel -> saves, stays cancelled
    job 3   the same submission again; a rank stopped (SIGSTOP) -> it is named, the job requeues; requeued by
            an operator -> saves; ends

Then each line of metrics.jsonl and the last checkpoint must be the reference's to the last bit. Where SLURM
can not be installed it says why and ends with 0.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
from chaos_compare import checkpoint_difference, difference, read_metrics  # noqa: E402
from chaos_runs import settings, write_latents  # noqa: E402

NUM_STEPS, SAVE_EVERY = 60, 7
PATIENCE_SECONDS = 300
"""More than any start, step or requeue takes on two busy cores."""
HANG_MINUTES = 0.25
CANNOT = 3
"""Exit code of one_node.sh where there can be no SLURM here."""


def slurm(*command, check=True) -> str:
    """What one of SLURM's commands prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert not check or done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return done.stdout.strip()


def wait_for(what, is_so, seconds=PATIENCE_SECONDS):
    """Return what `is_so()` returns once that is true; AssertionError names `what` when time is up."""
    ends = time.monotonic() + seconds
    while not (value := is_so()):
        assert time.monotonic() < ends, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return value


class Job:
    """A submission of slurm/train.sbatch into `folder`."""

    def __init__(self, folder, latents, *extra, options=()):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        self.seen = self.log.stat().st_size if self.log.exists() else 0
        assignments = settings(folder, latents, "optimizer", NUM_STEPS, SAVE_EVERY)
        environment = f"--export=ALL,RECIPE=tiny.t2iv,CLUSTER=cpu_2,VENV={sys.prefix}"
        self.id = slurm(
            *("sbatch", "--parsable", "--nodes=1", f"--output={self.log}", environment, *options),
            *("slurm/train.sbatch", *assignments, *extra),
        )

    def field(self, name) -> str:
        shown = slurm("scontrol", "show", "job", "--oneliner", self.id)
        return re.search(rf"(?:^| ){name}=(\S*)", shown).group(1)

    def said(self) -> str:
        """What the job wrote into its log since the last time it was asked for by `after`."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[self.seen :]

    def after(self, words):
        """Wait until the log says `words`, and forget what stands before their end."""
        with self.told():
            found = wait_for(f"{words!r} in the log", lambda: re.search(words, self.said()))
        self.seen += found.end()
        return found

    def steps(self) -> int:
        return len(read_metrics(self.folder))

    def trains(self, attempt) -> list:
        """Wait until the ranks of that attempt have done three more steps; returns their processes."""
        with self.told():
            before = self.steps()
            wait_for(f"job {self.id} to start again", lambda: self._runs(attempt))
            wait_for(f"three steps of attempt {attempt}", lambda: self.steps() >= before + 3)
        assert self.steps() < NUM_STEPS, "the run is over before it could be ended"
        print(f"  attempt {attempt} trains, step {self.steps()}", flush=True)
        return self.ranks()

    def _runs(self, attempt):
        return self.field("JobState") == "RUNNING" and self.field("Restarts") == str(attempt)

    def ranks(self) -> list:
        found = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            environ = process.info["environ"] or {}
            is_train = "train" in (process.info["cmdline"] or ())
            if is_train and environ.get("SLURM_JOB_ID") == self.id and "RANK" in environ:
                found.append((int(environ["RANK"]), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def ends(self, state):
        with self.told():
            wait_for(f"job {self.id} to end", lambda: self.field("JobState") in FINAL)
            assert self.field("JobState") == state, f"job {self.id} is {self.field('JobState')}, not {state}"

    @contextlib.contextmanager
    def told(self):
        """An AssertionError inside also shows the end of the log."""
        try:
            yield
        except AssertionError as error:
            lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise AssertionError(f"{error}\n{lines}") from None


FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def end_it_in_every_way(folder, latents):
    print("job 2: its time limit is near", flush=True)
    job = Job(folder, latents, options=("--time=3", "--signal=B:USR1@100"))
    near = "the time limit is near: job .* saves"
    with job.told():
        wait_for("three steps", lambda: job.steps() >= 3 or re.search(near, job.said()))
    ranks = job.ranks()
    for rank in ranks:  # the limit is minutes, the run seconds
        rank.send_signal(signal.SIGSTOP)
    job.after(near)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    job.after(r"stopped after step .* \(the time limit is near\)")
    job.after("requeueing job")
    slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")

    print("job 2: another job takes its node", flush=True)
    job.trains(attempt=1)
    first = slurm(
        "sbatch", "--parsable", "--partition=main", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    job.after(r"stopped after step .* \(.*\)")
    job.after("requeueing job")
    wait_for("the other job", lambda: "COMPLETED" in slurm("scontrol", "show", "job", first))

    print("job 2: a rank is killed", flush=True)
    job.trains(attempt=2)[1].kill()
    job.after(r"failure 1 of 3\), requeueing job")

    print("job 2: it is cancelled", flush=True)
    job.trains(attempt=3)
    slurm("scancel", job.id)
    job.ends("CANCELLED")
    job.after("is (CANCELLED|COMPLETING), so it is left alone")

    print("job 3: a rank hangs", flush=True)
    job = Job(folder, latents, f"hang_minutes={HANG_MINUTES}")
    job.trains(attempt=0)[1].send_signal(signal.SIGSTOP)
    found = job.after(r"moviegen: rank 1 .*is stuck.*")
    print(f"  {found.group()}", flush=True)
    job.after("requeueing job")

    print("job 3: an operator requeues it", flush=True)
    job.trains(attempt=1)
    slurm("scontrol", "requeue", job.id)
    job.after(r"stopped after step .* \(SIGTERM to the batch script\)")
    job.trains(attempt=2)
    job.ends("COMPLETED")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", help="folder for everything, kept (a temporary one)")
    options = parser.parse_args()
    out = Path(options.out or tempfile.mkdtemp(prefix="moviegen-slurm-")).resolve()
    one_node = ROOT / "tests" / "slurm" / "one_node.sh"
    out.mkdir(parents=True, exist_ok=True)
    started = subprocess.run([one_node, "start", out / "slurm"], stdout=subprocess.PIPE, text=True)
    if started.returncode == CANNOT:
        print("slurm-test: skipped, for the reason above")
        return 0
    ended_well = False
    try:
        assert started.returncode == 0, "one_node.sh failed"
        os.environ.update(SLURM_CONF=str(out / "slurm" / "slurm.conf"), OMP_NUM_THREADS="1")
        latents = write_latents(out / "latents")
        begun = time.monotonic()
        print("job 1: the run that nobody ends", flush=True)
        Job(out / "whole", latents).ends("COMPLETED")
        end_it_in_every_way(out / "run", latents)
        differs = difference(read_metrics(out / "run"), read_metrics(out / "whole"))
        assert not differs, differs
        assert len(read_metrics(out / "run")) == NUM_STEPS
        differs = checkpoint_difference(out / "run", out / "whole")
        assert not differs, differs
        print(
            f"slurm-test: {NUM_STEPS} steps of a run ended in six ways equal those of a run nobody ended, "
            f"to the last bit; {time.monotonic() - begun:.0f} s"
        )
        ended_well = True
    finally:
        subprocess.run([one_node, "stop", out / "slurm"], check=False)
        if ended_well and not options.out:
            shutil.rmtree(out)
        elif not ended_well:
            print(f"slurm-test: logs are in {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
