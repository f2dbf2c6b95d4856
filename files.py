"""Files that survive a crash: written whole or not at all; and a folder's lock, which dies with its process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from settings import InputError


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file to write `path` with: beside it, flushed to the disk, and renamed once the block ends well.

    If it does not, `path` is as it was; InputError if the reason is the disk.
    """
    temporary = f"{path}.tmp"
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk takes no more
        reason = error.strerror if isinstance(error, OSError) else "the disk took no more"
        kept = "what it held before is still there" if os.path.exists(path) else "nothing of it is left behind"
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room, then run the same command" if full else "mend that, then run the same command"
        raise InputError(f"{path} could not be written ({reason}), {kept}: {advice}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def sync_folder(folder: str) -> None:
    """Makes a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: str) -> BinaryIO:
    """Locks `folder` for as long as the returned file is open, at most until the process ends, however it ends."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another run is at work in {folder}: wait for its end, or give another --checkpoint_dir"
        ) from None
    return file
