"""The command line: `moviegen COMMAND`. What each does is in commands/."""

import linecache
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from nemo_moviegen.arguments import parse
from nemo_moviegen.commands import bench, data, evaluation, sampling, telling, training

_OUR_CODE = tuple(str(Path(__file__).resolve().parents[1] / name) for name in ("nemo_moviegen", "recipes"))
_PATIENCE_SECONDS = 20
"""What a rank needs at most to end after its last line, and its launcher to see it, on a busy machine."""


def main(arguments=None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, said in one line on stderr."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # torch, at import
    try:
        return COMMANDS[options.command](options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug or not _is_users_mistake(error):
            raise
        _say(error)
        return 2


COMMANDS = {
    "recipes": telling.recipes_command,
    "count": telling.count_command,
    "plan": telling.plan_command,
    "progress": telling.progress_command,
    "report": telling.report_command,
    "shapes": data.shapes_command,
    "cut": data.cut_command,
    "curate": data.curate_command,
    "encode": data.encode_command,
    "train": training.train_command,
    "submit": training.submit_command,
    "average": training.average_command,
    "demo": training.demo_command,
    "generate": sampling.generate_command,
    "compare": sampling.compare_command,
    "evaluate": evaluation.evaluate_command,
    "bench": bench.bench_command,
}


def _is_users_mistake(error) -> bool:
    """Whether the error is one of our own checks, or a file that is not there: no stack trace helps then."""
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return True
    if not isinstance(error, ValueError) or not error.__traceback__:
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = os.path.realpath(frame.filename).startswith(_OUR_CODE)
    return ours and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise ")


def _say(error):
    """One line for all ranks: where the first says the same, its end is that of the others, which wait."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler would let the wait go on
        time.sleep(_PATIENCE_SECONDS)
    where = f" (rank {rank})" if rank else ""
    said = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        said = f"{error.filename}: {error.strerror.lower()}; check the path and its permissions"
    print(f"moviegen: {' '.join(said.split())}{where}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
