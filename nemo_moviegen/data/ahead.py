"""What a loop needs next, made by a thread while the loop works."""

import queue
import threading

_END = object()


def ahead(items, depth):
    """Iterate over `items`, up to `depth` of which wait finished, and one more is under way in a thread.

    So at most `depth` + 1 items are held beside the one in use. Order, items and the error that ends them are
    those of `items`. With depth 0 there is no thread. An iterator that is closed, or collected, ends its
    thread, and `items` with it, where it stands.
    """
    if depth < 0:
        raise ValueError(f"depth {depth}: 0 makes items when they are asked for, 1 or more ahead of that")
    return _in_thread(items, depth) if depth else iter(items)


def _in_thread(items, depth):
    ready, stop = queue.Queue(depth), threading.Event()
    worker = threading.Thread(target=_make, args=(items, ready, stop), name="ahead", daemon=True)
    worker.start()
    try:
        while (made := ready.get())[0] is not _END:
            yield made[0]
        if made[1] is not None:
            raise made[1]
    finally:
        stop.set()
        while worker.is_alive():
            _drain(ready)  # a worker that waits for room sees `stop` once it has some
            worker.join(timeout=0.02)


def _make(items, ready, stop):
    error, items = None, iter(items)
    try:
        for item in items:
            ready.put((item,))
            if stop.is_set():
                break
    except BaseException as raised:  # handed over: it is raised where the items are used
        error = raised
    finally:
        if hasattr(items, "close"):
            items.close()  # a generator's own threads and files end here, not when memory is collected
    ready.put((_END, error))


def _drain(ready):
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        pass
