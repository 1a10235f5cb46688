"""One node's ranks: torchrun, with exit codes that say what to do next and signals that end nothing at once.

    python -m nemo_moviegen.node TORCHRUN-ARGUMENTS -m nemo_moviegen train ...

`moviegen train` and slurm/train.sbatch start their ranks here. torchrun alone ends with 1 whatever its ranks
said, and kills them 30 s after it was asked to stop itself: a step of a large model takes longer. It also
watches its ranks: it publishes their heartbeats and ends them where they hang (heartbeat.py).
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from nemo_moviegen.heartbeat import NODE_VARIABLE, Watch
from nemo_moviegen.stopping import HUNG, MISTAKE, SIGNALS, TO_GO_ON, TO_STAY

_HANDLED_BY_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def run_ranks(arguments) -> int:
    """Start the ranks that torchrun's `arguments` describe and wait for them.

    Returns 0, a code of stopping.py that a rank ended with, or 128 + the signal that ended the launcher.
    SystemExit with one line where a rank failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = get_args_parser().parse_args([f"--signals-to-handle={_HANDLED_BY_TORCHRUN}", *arguments])
    logging.disable(logging.ERROR)  # torchrun's own account of a failed rank, which has said why itself
    passed_on = _pass_signals_on()
    folder = tempfile.mkdtemp(prefix="moviegen-")
    os.environ[NODE_VARIABLE] = folder
    watch = Watch(Path(folder), end=_kill_ranks).start()
    try:
        run(options)
    except ChildFailedError as error:
        return HUNG if watch.hung else _code_of(error, passed_on)
    except SignalException as error:
        return 128 + error.sigval
    finally:
        watch.stop()
        del os.environ[NODE_VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)
        logging.disable(logging.NOTSET)
    return 0


def _code_of(error, passed_on) -> int:
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    for code in (MISTAKE, TO_STAY, TO_GO_ON):
        if code in codes.values():
            return code
    rank, failure = error.get_first_failure()
    if -failure.exitcode in passed_on:  # before the rank listened: nothing has been done that could be lost
        return TO_GO_ON
    raise SystemExit(f"moviegen: rank {rank} ended with exit code {failure.exitcode}") from None


def _pass_signals_on() -> set:
    """Hand signals of `SIGNALS` to the ranks instead of ending; returns the set they are noted in."""
    noted = set()

    def hand_on(number, frame):
        noted.add(number)
        _signal_ranks(number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, hand_on)
    return noted


def _kill_ranks():
    _signal_ranks(signal.SIGKILL)


def _signal_ranks(number):
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(run_ranks(sys.argv[1:]))
