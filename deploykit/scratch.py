"""Scratch folders beside what they will become, held by a lock while their process lives; what killed processes left is removed.

The lock is flock's, on the folder itself: the system drops it with the process, however that ends, and it holds across
containers that share a file system, where process ids do not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploykit.errors import InputError

PREFIX = ".making-"
_TRIES = 10


@contextmanager
def folder_in(parent: Path) -> Iterator[Path]:
    """A new empty folder in `parent` (which is there), its name starting with PREFIX; gone at the end, unless it was renamed.

    Raises OSError where it cannot be made.
    """
    path, handle = _made(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _made(parent: Path) -> tuple[Path, int]:
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # swept before it was locked
        if _may_lock(handle) and _is_at(handle, path):  # else another process is sweeping it, or has
            return path, handle
        os.close(handle)
    raise OSError(errno.EBUSY, "a scratch folder was removed again and again", str(parent))


def sweep(parent: Path) -> None:
    """Removes the scratch folders in `parent` that no living process holds."""
    for left in parent.glob(f"{PREFIX}*") if parent.is_dir() else ():
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds `folder` (made where it is missing) for one process at a time. At the end, folders that were made here and stayed
    empty are removed.

    Raises InputError where another process holds it, OSError where it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _held(folder)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # only when nothing came into it
        os.close(handle)


def _held(folder: Path) -> int:
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        if not _may_lock(handle):
            os.close(handle)
            raise InputError(
                f"another deploykit is writing into {folder}", "wait until it has ended, or choose another folder with -o"
            )
        if _is_at(handle, folder):  # else its last holder has just removed it, empty
            return handle
        os.close(handle)
    raise OSError(errno.EBUSY, "the folder was removed again and again", str(folder))


def _may_lock(handle: int) -> bool:
    """Locks the open folder; False where another holds it. True too on a file system without locks, where none is ever swept."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        return exc.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open folder is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
