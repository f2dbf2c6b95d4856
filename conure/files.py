"""Files that survive a crash: written atomically, with a digest that detects a later change. And the lock of a folder,
which ends with its process."""

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from conure.errors import InputError

import torch

SEAL = b"\nsha256 "  # precedes the digest; torch.load ignores what follows the archive
SEAL_BYTES = len(SEAL) + 64
# Names of files that only the scripts write. Copies of checkpoints and snapshots may have any other name.
CHECKPOINT_NAME = r"(tp|ret)_t([1-9]\d*)\.(snapshot\.)?pt"
SCRIPTS_OWN = rf"{CHECKPOINT_NAME}|results\.csv|index\.csv"


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file that replaces `path` atomically: it lies beside it, and is flushed and renamed when the block ends well.

    If the block fails, `path` stays as it was; InputError if the disk is the reason.
    """
    temporary = f"{path}.tmp"
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with alone(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.remove(temporary)
                raise
        sync_folder(folder)
    except OSError as error:
        kept = "the old file is kept" if os.path.exists(path) else "nothing is left behind"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        first = "free some space" if full else "fix that"
        raise InputError(
            f"{path} could not be written ({error.strerror}; {kept}): {first}, then run the same command"
        ) from error


def check_output(path: str, overwrite: bool, own: bool = False) -> None:
    """InputError if `path` has a name that only the scripts write, or if it exists.

    It may exist with `overwrite`, or if it is the command's `own` earlier output.
    """
    name = os.path.basename(path)
    if re.fullmatch(SCRIPTS_OWN, name):
        kind = "a checkpoint or snapshot" if name.endswith(".pt") else "a table"
        raise InputError(f"{path} is the name of {kind} that the scripts write: give another name")
    if os.path.exists(path) and not (overwrite or own):
        raise InputError(f"{path} exists: --overwrite replaces it")


@contextmanager
def torch_writing() -> Iterator[None]:
    """Turns the RuntimeError that torch raises for a full disk into an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, "the disk is full") from error


def alone(path: str) -> BinaryIO:
    """An empty file at `path` with an exclusive lock until it is closed; waits for a process that holds the lock."""
    while True:
        file = opened(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        # The process that held the lock may have renamed the file, which then no longer is the one at `path`.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate()
                return file
        file.close()


def opened(path: str) -> BinaryIO:
    """The file at `path`, opened to read and write, and created if it is missing."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def save_sealed(path: str, content: dict[str, Any]) -> None:
    """Writes plain values and tensors, with the SHA-256 of all bytes as the last line; InputError as `whole_file`."""
    with whole_file(path) as file:
        with torch_writing():
            torch.save(content, file)
        size = file.tell()
        file.seek(0)
        digest = digest_of(file, size)
        file.write(SEAL + digest.encode())


def load_sealed(path: str) -> tuple[dict[str, Any] | None, str]:
    """Content and digest of what `save_sealed` wrote; the content is None if a single bit has changed or `path` is no
    file."""
    if not os.path.isfile(path):
        return None, ""
    with open(path, "rb") as file:
        seal = seal_of(file)
        size = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(0)
        if seal is None or digest_of(file, size) != seal:
            return None, ""
    return torch.load(path, map_location="cpu", weights_only=True), seal


def digest_of(file: BinaryIO, size: int) -> str:
    """The SHA-256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 24))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def seal_of(file: BinaryIO) -> str | None:
    """The digest in the file's last line; None if it has none."""
    if file.seek(0, os.SEEK_END) < SEAL_BYTES:
        return None
    file.seek(-SEAL_BYTES, os.SEEK_END)
    seal = file.read(SEAL_BYTES)
    return seal[len(SEAL) :].decode("ascii", "replace") if seal.startswith(SEAL) else None


def sync_folder(folder: str) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: str) -> BinaryIO:
    """Locks `folder` until the returned file is closed or the process ends."""
    os.makedirs(folder, exist_ok=True)
    file = opened(os.path.join(folder, ".lock"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another run is at work in {folder}: wait for it, or give another --checkpoint_dir") from None
    return file
