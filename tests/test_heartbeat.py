"""Who of a run is alive, who is suspected of holding up the others, and a hang on two real ranks."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_moviegen import heartbeat
from nemo_moviegen.heartbeat import Beat, Pulse, Watch, read_heartbeats, suspects, write_heartbeats
from nemo_moviegen.stopping import HUNG

ROOT = Path(__file__).resolve().parents[1]


def pulse(rank, step=7, collectives=100, state="S", host="n1", **changes):
    return Pulse(
        Beat(rank, host, step, 0.0, "training"), 1000 + rank, collectives, "a.py:1 f", state, **changes
    )


@pytest.mark.parametrize(
    ("changed", "who", "why"),
    [
        ({}, [], ""),
        ({2: {"state": "T"}}, [2], "it is stopped (SIGSTOP)"),
        ({2: {"state": "D"}}, [2], "system call that does not return"),
        ({2: {"state": ""}}, [2], "its process is gone"),
        ({1: {"step": 6}}, [1], "others have ended step 7"),
        ({0: {"collectives": 97}, 3: {"collectives": 99}}, [0, 3], "others wait for it, 3 collectives ahead"),
        ({1: {"step": 6}, 2: {"state": "T"}}, [2], "it is stopped"),
        ({1: {"step": 6}, 3: {"collectives": 90}}, [1], "others have ended"),
    ],
)
def test_who_holds_up_the_others(changed, who, why):
    found = suspects([pulse(rank, **changed.get(rank, {})) for rank in range(4)])
    assert [p.beat.rank for p, _ in found] == who
    assert not who or why in found[0][1]


def test_heartbeats_are_a_file_a_node_and_read_by_rank(tmp_path):
    assert read_heartbeats(tmp_path) == []
    for host, ranks in (("n2", (2, 3)), ("n1", (0, 1))):
        write_heartbeats(tmp_path, host, [Beat(rank, host, 5, 1.5, "saving") for rank in ranks])
    (tmp_path / "heartbeats" / "n3.json").write_text('[{"rank": ')
    assert [(beat.rank, beat.host) for beat in read_heartbeats(tmp_path)] == [
        (0, "n1"),
        (1, "n1"),
        (2, "n2"),
        (3, "n2"),
    ]
    heartbeat.forget_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path) == []


def watched(tmp_path, monkeypatch, seconds):
    """Whether a watcher calls two ranks a hang that move for `seconds`, by its own clock of 0.5 s a hang."""
    monkeypatch.setattr(heartbeat, "report_hang", lambda *_: None)
    ended, node = [], tmp_path / "node"
    node.mkdir()
    heartbeat.describe_run(node, tmp_path / "run", hang_minutes=0.5 / 60)
    watch = Watch(node, end=lambda: ended.append(True)).start()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        moved = time.time()
        for rank in range(2):
            heartbeat.write_pulse(node, replace(pulse(rank), beat=Beat(rank, "n1", 1, moved, "training")))
        time.sleep(0.1)
    hung_while_moving = watch.hung
    while not watch.hung and time.monotonic() - began < seconds + 20:
        time.sleep(0.1)
    watch.stop()
    return hung_while_moving, watch.hung, ended


def test_ranks_that_move_are_left_alone_and_ended_once_they_do_not(tmp_path, monkeypatch):
    assert watched(tmp_path, monkeypatch, seconds=3) == (False, True, [True])


def run_ranks(output, how):
    command = [sys.executable, "-m", "nemo_moviegen.node", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MOVIEGEN_ATTEMPT": "42.0"}
    environment |= {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, str(ROOT / "tests" / "hanging.py"), str(output), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("how", "function"), [("loop", "goes_round_for_good"), ("gather", "waits_for_itself")]
)
def test_a_rank_that_hangs_is_named_with_its_stack_and_all_are_ended(tmp_path, how, function):
    done = run_ranks(tmp_path, how)
    assert done.returncode == HUNG, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "is stuck" in line)
    assert "moviegen: rank 1 on " in line and "others wait for it" in line
    assert f"stacks of all ranks are in {tmp_path}/hangs/42.0" in line
    stacks = {rank: (tmp_path / "hangs" / "42.0" / f"rank-{rank}.txt").read_text() for rank in (0, 1)}
    assert f"in {function}" in stacks[1] and "hanging.py" in stacks[1]
    assert "all_reduce" in stacks[0], "the other is where it waits"


def test_ranks_that_end_well_are_no_hang(tmp_path):
    done = run_ranks(tmp_path, "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is stuck" not in done.stdout and not (tmp_path / "hangs").exists()
