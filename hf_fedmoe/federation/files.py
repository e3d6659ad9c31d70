"""Files that are either whole or absent, whenever the process dies, and how to know them again."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# The underscore keeps what a killed process leaves from the Hub, and from whoever looks for checkpoints.
TEMPORARY, REPLACED = "_tmp-", "_old-"


@dataclass(frozen=True)
class FileDigest:
    """
    Size and checksum, by which a file is known again.

    Args:
        size (`int`): Bytes.
        sha256 (`str`): SHA-256 of its content, hexadecimal.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Reads the file once, without holding it in memory; other threads run meanwhile."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(file.tell(), sha256)


def sync(path: Path) -> None:
    """Forces a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a file that [`write_json`] wrote, `None` where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is the old or the new one whenever the process dies."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        sync(temporary)
        temporary.replace(path)
    except BaseException:  # a full disk, say, on which what is half written would only take more
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """
    Yields a temporary folder beside `target`; when the block ends its files are synced to disk and it is renamed to
    `target`. An older `target` stays readable until then. If anything fails, the block or the disk, the temporary
    folder is removed, an older `target` is back in its place, and the error is raised.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (target.with_name(prefix + target.name) for prefix in (TEMPORARY, REPLACED))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    try:
        sync(target.parent)
    finally:
        if replaced.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def remove_directory(folder: Path) -> None:
    """Deletes a folder under another name, so that what a killed process leaves of it is not taken for it."""
    doomed = folder.with_name(REPLACED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Deletes what killed processes left of folders in `parent` that are called like `pattern`, a glob."""
    for prefix in (TEMPORARY, REPLACED):
        for folder in parent.glob(prefix + pattern):
            shutil.rmtree(folder, ignore_errors=True)
