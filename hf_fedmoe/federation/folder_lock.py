"""A lock on the folder of a run, which ends with its process, however that ends."""

import fcntl
import gc
import json
import os
import socket
import weakref
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# The underscore keeps it from the Hub.
LOCK_NAME = "_lock"


class FolderLock:
    """
    Keeps every other [`FolderLock`] out of a folder, in this process and in all others (`flock`), until `release`,
    until nobody refers to it any more, or until the process ends. Forked processes do not hold it.

    Args:
        folder (`Path`): Must exist.

    Raises:
        `RuntimeError`: When it is taken; says by whom.
    """

    def __init__(self, folder: Path):
        path = folder / LOCK_NAME
        self._descriptor: int | None = None
        try:
            descriptor = _locked(path)
            if descriptor is None:
                # A notebook's cell that is run again leaves the old trainer behind, in a circle of references.
                gc.collect()
                descriptor = _locked(path)
        except OSError as error:
            logger.warning(f"{path} cannot be locked ({error}): take care that no other run writes into that folder.")
            return
        if descriptor is None:
            raise RuntimeError(
                f"`output_dir` {str(folder)!r} is in use by another run, {_holder(path)}: choose another one, or end "
                "that run (one of this process ends with its trainer, `del trainer`)."
            )
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._descriptor = descriptor
        self._release = weakref.finalize(self, _unlock, descriptor, path)
        _held.add(self)

    def release(self) -> None:
        """Lets others in; may be called again."""
        if self._descriptor is not None:
            self._descriptor = None
            self._release()

    def leave_to_parent(self) -> None:
        """Forgets the lock in a forked process, where the parent holds it."""
        if self._descriptor is not None:
            self._release.detach()
            os.close(self._descriptor)
            self._descriptor = None


_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for lock in list(_held):
        lock.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _locked(path: Path) -> int | None:
    """Opens the file at `path`, locked and empty; `None` if another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that its holder has deleted meanwhile


def _unlock(descriptor: int, path: Path) -> None:
    """Deletes the file while it is locked, so that no other holder's is deleted."""
    try:
        if _is_at(descriptor, path):
            path.unlink()
    except OSError:
        pass  # a file that stays hinders nobody
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Reads who holds the lock."""
    try:
        found = json.loads(path.read_text())
        here = (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
        return "of this process" if here else f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
