"""Starting what `chaos` kills: ranks forked from this process with a small launcher, or torchrun."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import warnings

import psutil

from nemo_moviegen.launch import LAUNCH_FILE


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


def end_run(run):
    """End what is left of an attempt."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for process in run.ranks():
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(5)


def tail_of(log, num_lines=25):
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
    from nemo_moviegen.data.random_latents import write_random_latents
    from nemo_moviegen.validation import heldout_folder

    recipe, rng = recipes.get("tiny.t2iv"), np.random.default_rng(0)
    shape = (recipe.latent_frames, recipe.latent_height, recipe.latent_width)
    for place, count in ((folder, num_samples), (heldout_folder(folder), 6)):
        write_random_latents(place, recipe.size, count, rng, shapes=[shape])
    return folder


class Saves:
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


def strike(run, kill) -> bool:
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


def steps_of(folder):
    from nemo_moviegen.training.checkpoint import checkpoints

    return list(checkpoints(folder))
