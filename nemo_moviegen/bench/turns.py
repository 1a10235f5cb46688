"""Ways to do the same work that take turns of some steps, each in a process of its own that stays alive.

Other work on a machine comes and goes within seconds and may cost a step a third of its time. Ways that are
measured one after the other do not see the same of it; ways in turns of a second do, so that the ratios of
their times within a turn say what they differ by.
"""

import multiprocessing
import time
from dataclasses import dataclass

import psutil

from nemo_moviegen.bench.measure import growth_mib


@dataclass(frozen=True, kw_only=True)
class Turns:
    """One way."""

    step_seconds: list[list[float]]
    """Of each turn its steps, from the end of one to the end of the next."""
    growth_mib: float
    """By how much resident memory exceeded at most what it was before the way began."""
    facts: dict
    """What the way told of itself."""


class Turn:
    """What a way calls at the end of each step: `if not step_done(): stop`."""

    def __init__(self, pipe, steps):
        self._pipe, self._steps, self._seconds, self._last = pipe, steps, [], None
        self.facts = {}
        """To be told with the times, such as {"parameters": 10}."""

    def step_done(self) -> bool:
        """Whether the way is to take another step; waits for its turn before it says so."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        if self._last is None or len(self._seconds) == self._steps:
            self._pipe.send(self._seconds)
            self._seconds = []
            if not self._pipe.recv():
                return False
            now = time.perf_counter()
        self._last = now
        return True


def in_turns(ways, *, turns, steps, warm_up=1) -> tuple[dict, dict]:
    """({name: Turns}, {name: why it could not run}) of `ways`, which map a name to a function of a `Turn`.

    Every way takes `turns` turns of `steps` steps, in another order each time, after `warm_up` turns and a
    first step that do not count. One that raises is left out, and its error is told.
    """
    started = {name: _start(way, steps) for name, way in ways.items()}
    seconds, failed = {name: [] for name in ways}, {}
    names = list(ways)

    def hear(name):
        """What the way sends next; None where it failed."""
        child, pipe = started[name]
        try:
            heard = pipe.recv()
        except EOFError:
            child.join()
            heard = f"its process ended with code {child.exitcode}"
        if isinstance(heard, str):
            failed[name] = heard
            return None
        return heard

    for name in names:
        hear(name)  # it is built, and has taken one step
    for turn in range(-warm_up, turns):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            if name in failed:
                continue
            started[name][1].send(True)
            heard = hear(name)
            if heard is not None and turn >= 0:
                seconds[name].append(heard)
    found = {name: _ended(*started[name], seconds[name]) for name in names if name not in failed}
    for child, _ in started.values():
        child.join()
    return found, failed


def _start(way, steps):
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    child = context.Process(target=_work, args=(way, theirs, steps))
    child.start()
    theirs.close()
    return child, pipe


def _ended(child, pipe, step_seconds):
    pipe.send(False)
    growth_mib, facts = pipe.recv()
    return Turns(step_seconds=step_seconds, growth_mib=growth_mib, facts=facts)


def _work(way, pipe, steps):
    before = psutil.Process().memory_info().rss
    turn = Turn(pipe, steps)
    try:
        way(turn)
        pipe.send((growth_mib(before), turn.facts))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:300])
