"""Whether a folder can be written, by doing so: permissions alone say nothing of full or read-only disks."""

import tempfile


def why_not_writable(folder) -> str:
    """What the system says to a new entry in `folder`, as in Read-only file system; "" where it takes it."""
    try:
        tempfile.TemporaryDirectory(prefix=".part-", dir=folder).cleanup()
    except OSError as error:
        return error.strerror
    return ""
