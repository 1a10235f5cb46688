"""Who of a run is alive, and which rank holds up the others. No torch.

    rank (training/heartbeat.py) --Pulse--> NODE/rank-R.json --+   NODE: a folder on the node's own disk
                                  stacks -> NODE/rank-R.stack  |
    launcher of the node (node.py): Watch <--------------------+--> OUTPUT/heartbeats/HOST.json
                                          when nothing moves ----> OUTPUT/hangs/ATTEMPT/, and ranks are ended

The launcher watches, not a rank: a process that is stopped, or sits in a system call that does not return,
can not tell where it is. Where ranks were started without our launcher, the first rank of the node watches.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

HEARTBEATS, HANGS = "heartbeats", "hangs"
NODE_VARIABLE, ATTEMPT_VARIABLE = "MOVIEGEN_NODE", "MOVIEGEN_ATTEMPT"
"""Environment variables of ranks: the node's folder; a name of this start of the job, one for all nodes."""
PHASES = ("starting", "training", "validating", "saving", "stopping")
SECONDS = 10.0
"""Between two heartbeats."""
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of its threads, whatever it does; a stopped one does not."""
_RUN_FILE = "run.json"
_FROZEN = {
    "T": "it is stopped (SIGSTOP)",
    "t": "a debugger holds it",
    "D": "it is in a system call that does not return",
    "Z": "it has ended and nobody has noticed",
    "": "its process is gone",
}
_DUMP_SECONDS, _OTHERS_SECONDS = 2.0, 20.0
"""Given to ranks to write their stacks, and to other nodes to say what they see."""


@dataclass(frozen=True)
class Beat:
    """How far a rank is."""

    rank: int
    host: str
    step: int
    unix_seconds: float
    """When it last finished a step, or entered its phase."""
    phase: str
    """One of PHASES."""


@dataclass(frozen=True)
class Pulse:
    """A `Beat` with what tells a rank that waits from one that is waited for."""

    beat: Beat
    pid: int
    collectives: int = 0
    """Begun since the start, over all process groups: who has begun fewer is waited for."""
    where: str = ""
    """File, line and function of ours that the main thread was last seen in."""
    state: str = "S"
    """Of the process, a letter as `ps` shows it; "" where it is gone."""
    waits_in: str = ""
    """The kernel's function it sleeps in."""


def read_heartbeats(output) -> list[Beat]:
    """The last heartbeat of every rank of the run in that folder, by rank; empty where there is none."""
    beats = []
    for path in Path(output, HEARTBEATS).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is being replaced, or no file of ours
            beats += [Beat(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return sorted(beats, key=lambda beat: beat.rank)


def write_heartbeats(output, host, beats):
    """Replace the file of that host."""
    _replace(Path(output, HEARTBEATS, f"{host}.json"), [asdict(beat) for beat in beats])


def forget_heartbeats(output):
    """Remove those of an earlier start, which may have run on other nodes."""
    shutil.rmtree(Path(output, HEARTBEATS), ignore_errors=True)


def node_folder() -> Path:
    """Where this node's ranks leave their pulses: the launcher's folder, or one that the ranks agree on."""
    if folder := os.environ.get(NODE_VARIABLE):
        return Path(folder)
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}-{os.environ.get('MASTER_PORT', 0)}"
    return Path(tempfile.gettempdir(), f"moviegen-{os.getuid()}-{start}")


def write_pulse(folder, pulse):
    """Leave a rank's pulse for the watcher of its node."""
    _replace(Path(folder, f"rank-{pulse.beat.rank}.json"), asdict(pulse))


def read_pulses(folder) -> list[Pulse]:
    """What the ranks of a node have left, or what a node has left of its ranks, by rank."""
    entries = []
    for path in Path(folder).glob("*.json"):
        if path.name != _RUN_FILE:
            with contextlib.suppress(OSError, ValueError):
                read = json.loads(path.read_text(encoding="utf-8"))
                entries += read if isinstance(read, list) else [read]
    pulses = [Pulse(**(entry | {"beat": Beat(**entry["beat"])})) for entry in entries]
    return sorted(pulses, key=lambda pulse: pulse.beat.rank)


def stack_file(folder, rank) -> Path:
    """Where a rank writes its stacks when it gets DUMP_SIGNAL."""
    return Path(folder, f"rank-{rank}.stack")


def describe_run(folder, output, hang_minutes):
    """Tell the watcher of the node where the run's folder is and what a hang is (0 minutes: nothing)."""
    _replace(Path(folder, _RUN_FILE), {"output": str(output), "hang_seconds": 60 * hang_minutes})


def beat_seconds(hang_seconds) -> float:
    """Seconds between two heartbeats of a run that calls so many without a step a hang; 0 = nothing is."""
    return min(SECONDS, max(0.2, hang_seconds / 10)) if hang_seconds else SECONDS


def suspects(pulses) -> list[tuple[Pulse, str]]:
    """The ranks that hold up the others, and why one thinks so; empty where all wait for each other.

    In this order: processes that can not run; ranks that are steps behind; ranks that have begun fewer
    collectives, so that the others wait for them in one.
    """
    frozen = [(p, _FROZEN[p.state]) for p in pulses if p.state in _FROZEN]
    if frozen or not pulses:
        return frozen
    last = max(p.beat.step for p in pulses)
    behind = [p for p in pulses if p.beat.step < last]
    if behind:
        return [(p, f"others have ended step {last}") for p in behind]
    most = max(p.collectives for p in pulses)
    late = [p for p in pulses if p.collectives < most]
    return [(p, f"others wait for it, {most - p.collectives} collectives ahead") for p in late]


@dataclass
class Watch:
    """Looks at a node's folder every few seconds: publishes heartbeats, `end()`s the ranks when they hang.

    A hang is `hang_minutes` in which no rank of the node ended a step or entered a phase. Time in which this
    process itself was suspended does not count.
    """

    folder: Path
    end: object
    """Called without arguments once a hang was reported."""
    hung: bool = False
    _over: threading.Event = field(default_factory=threading.Event)
    _publishing: threading.Thread = field(default_factory=threading.Thread)

    def start(self):
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def stop(self):
        self._over.set()

    def _run(self):
        moved, quiet, interval, looked = None, 0.0, 1.0, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            quiet, looked = quiet + min(now - looked, 2 * interval), now
            try:
                run = json.loads((self.folder / _RUN_FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # no rank has come so far
                continue
            interval = beat_seconds(run["hang_seconds"])
            pulses = read_pulses(self.folder)
            self._publish(run["output"], pulses)
            seen = [(p.beat.step, p.beat.phase, p.beat.unix_seconds) for p in pulses]
            if seen != moved or not pulses:
                moved, quiet = seen, 0.0
            elif run["hang_seconds"] and quiet >= run["hang_seconds"]:
                self.hung = True
                report_hang(self.folder, Path(run["output"]), pulses, quiet)
                self.end()
                return

    def _publish(self, output, pulses):
        """In a thread: a file system that hangs must not keep the hang from being seen."""
        if pulses and not self._publishing.is_alive():
            beats = [pulse.beat for pulse in pulses]
            self._publishing = threading.Thread(target=_try_to_publish, args=(output, beats), daemon=True)
            self._publishing.start()


def report_hang(folder, output, pulses, quiet_seconds):
    """Collect stacks in OUTPUT/hangs/ATTEMPT; say which ranks of this node hold up others, a line each."""
    pulses = [_looked_at(pulse) for pulse in pulses]
    for pulse in pulses:
        if pulse.state not in _FROZEN:
            with contextlib.suppress(OSError):
                os.kill(pulse.pid, DUMP_SIGNAL)
    time.sleep(_DUMP_SECONDS)
    host = pulses[0].beat.host
    hang = output / HANGS / os.environ.get(ATTEMPT_VARIABLE, time.strftime("%Y%m%d-%H%M%S"))
    told = []
    telling = threading.Thread(target=_tell, args=(folder, hang, output, pulses, told), daemon=True)
    telling.start()
    telling.join(2 * _OTHERS_SECONDS)
    everyone, silent = told[0] if told else (pulses, [f"file system of {output}: it does not answer"])
    found = suspects(everyone)
    for pulse, why in found:
        if pulse.beat.host == host:
            _say(line_about(pulse, why, quiet_seconds, hang))
    if host == everyone[0].beat.host:
        if silent:
            _say(f"no word from {', '.join(silent)}")
        if not found:
            _say(f"no step for {_span(quiet_seconds)}, and no rank is behind the others: see {hang}")


def line_about(pulse, why, quiet_seconds, hang) -> str:
    """The line an operator reads: rank, host, process, why, where, and the folder of the stacks."""
    beat = pulse.beat
    waits = f" in the kernel's {pulse.waits_in}" if pulse.waits_in and pulse.state in _FROZEN else ""
    place = f"; last seen at {pulse.where}" if pulse.where else ""
    return (
        f"rank {beat.rank} on {beat.host} (pid {pulse.pid}) is stuck, no step for {_span(quiet_seconds)}: "
        f"{why}{waits}; {beat.phase} after step {beat.step}{place}; stacks of all ranks are in {hang}"
    )


def process_state(pid) -> tuple[str, str]:
    """(letter of the state, kernel function it sleeps in) of a process; ("", "") where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state = text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "", ""
    with contextlib.suppress(OSError):
        waits_in = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8").strip()
        return state, waits_in if waits_in != "0" else ""
    return state, ""


def this_host() -> str:
    """The short name of this machine, as SLURM names its nodes."""
    return socket.gethostname().partition(".")[0]


def node_name() -> str:
    """What SLURM calls this node, for `--exclude`; `this_host()` outside of it."""
    return os.environ.get("SLURMD_NODENAME") or this_host()


def _looked_at(pulse) -> Pulse:
    state, waits_in = process_state(pulse.pid)
    return replace(pulse, state=state, waits_in=waits_in)


def _tell(folder, hang, output, pulses, told):
    """Write what this node knows where others read it; `told` gets (pulses of all, hosts that are silent)."""
    hang.mkdir(parents=True, exist_ok=True)
    for pulse in pulses:
        source, target = stack_file(folder, pulse.beat.rank), hang / f"rank-{pulse.beat.rank}.txt"
        text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
        frozen = f"no stacks: {_FROZEN.get(pulse.state, 'it did not answer the signal')} {pulse.waits_in}\n"
        target.write_text(
            text or f"{frozen}last seen at {pulse.where or 'no line of ours'}\n", encoding="utf-8"
        )
    _replace(hang / f"{pulses[0].beat.host}.json", [asdict(pulse) for pulse in pulses])
    expected = {beat.host for beat in read_heartbeats(output)}
    ends = time.monotonic() + _OTHERS_SECONDS
    while True:
        there = {path.stem for path in hang.glob("*.json")}
        if expected <= there or time.monotonic() > ends:
            break
        time.sleep(0.5)
    told.append((read_pulses(hang), sorted(expected - there)))


def _try_to_publish(output, beats):
    with contextlib.suppress(OSError):  # a full disk is the checkpoints' to report
        write_heartbeats(output, beats[0].host, beats)


def _replace(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(part, path)


def _say(line):
    print(f"moviegen: {line}", flush=True)


def _span(seconds) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
