"""Several processes of one task: each scores chunks of its own, so none waits for another.

A worker is a task of a finer partition: of task I of N, worker k of W scores what I + k N of N W would.
"""

import multiprocessing
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from nemo_moviegen.curation.work import score_missing

_POLL_SECONDS = 0.25
_told = {}
"""What a worker process shares with who started it: the count of videos that are done, and a wish to stop."""


class _Asked(Exception):
    """To stop: another worker failed."""


def score_in_workers(listing, output, recipe, task, workers, advance=lambda video: None) -> int:
    """`work.score_missing` of the task, by as many processes; returns the number of videos it measured.

    `advance` is called once for each video that is done, with None. What fails in a worker is raised here,
    after the others have ended the video at hand; ValueError where one was killed.
    """
    index, count = task
    # not forked: threads of what is loaded already (pyarrow, OpenCV) do not survive that
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (done, stop)) as pool:
        parts = [(index + number * count, count * workers) for number in range(workers)]
        waiting = [pool.submit(_score, listing, output, recipe, part) for part in parts]
        try:
            return _gathered(waiting, done, advance)
        except BrokenProcessPool:
            raise ValueError(
                f"one of {workers} workers was killed, mostly for want of memory: start again with fewer "
                "--workers; what was scored is kept"
            ) from None
        finally:
            stop.set()


def _gathered(futures, done, advance):
    told, pending = 0, set(futures)
    while pending:
        finished, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
        for future in finished:
            future.result()  # raises what it failed with
        for _ in range(done.value - told):
            advance(None)
            told += 1
    return sum(future.result() for future in futures)


def _start(done, stop):
    import cv2

    cv2.setNumThreads(1)  # workers share the cores out
    _told.update(done=done, stop=stop)


def _score(listing, output, recipe, part):
    def advance(video):
        with _told["done"].get_lock():
            _told["done"].value += 1
        if _told["stop"].is_set():
            raise _Asked

    return score_missing(listing, output, recipe, part, advance)
