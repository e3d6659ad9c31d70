"""Counting the file operations of a piece of code, and letting one of them fail or be the last."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch


EVENTS = frozenset(
    (
        *(
            "open",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
        ),
        *("os.listdir", "os.scandir", "shutil.rmtree", "shutil.copyfile", "shutil.move"),
    )
)
_watch: Callable[[str, object], None] | None = None
_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if _watch is not None and event in EVENTS:
        _watch(event, arguments[0])


@contextmanager
def before_each_operation(act: Callable[[int, str], None]) -> Iterator[None]:
    """
    Calls `act(number, what)` before each operation on files, from 0: what Python itself audits, `fsync`, and the two
    ends of a safetensors file, which is written by other code.
    """
    global _watch, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good: there is no way to remove one
        _hooked = True
    count, fsync, serialize_file = 0, os.fsync, safetensors.torch.serialize_file

    def step(what: str, path: object) -> None:
        global _watch
        nonlocal count
        if isinstance(path, str | os.PathLike) and "/site-packages/" in str(path):
            return  # a module that is imported only now
        watch, _watch = _watch, None  # what `act` does counts no more
        try:
            count += 1
            act(count - 1, f"{what} {Path(path).name}" if isinstance(path, str | os.PathLike) else what)
        finally:
            _watch = watch

    def audited_fsync(descriptor: int) -> None:
        step("fsync", None)
        fsync(descriptor)

    def audited_serialize_file(tensors: dict, path: object, *arguments: object, **keywords: object) -> None:
        step("write", path)
        serialize_file(tensors, path, *arguments, **keywords)
        step("written", path)

    os.fsync, safetensors.torch.serialize_file = audited_fsync, audited_serialize_file
    _watch = step
    try:
        yield
    finally:
        os.fsync, safetensors.torch.serialize_file, _watch = fsync, serialize_file, None
