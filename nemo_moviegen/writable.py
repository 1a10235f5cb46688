"""Writing: whether a folder takes it, found by doing so (permissions alone say nothing of full or read-only
disks), and texts that appear whole."""

import os
import tempfile


def why_not_writable(folder) -> str:
    """What the system says to a new entry in `folder`, as in Read-only file system; "" where it takes it."""
    try:
        tempfile.TemporaryDirectory(prefix=".part-", dir=folder).cleanup()
    except OSError as error:
        return error.strerror
    return ""


def write_whole(path, text):
    """Write a text file that appears under its name when it is whole, in place of one that was there."""
    part = path.with_name(f".part-{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
