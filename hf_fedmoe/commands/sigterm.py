"""SIGTERM as an exception, which has the processes that a command started stopped on the way out."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def ending_with_sigterm() -> Iterator[None]:
    """Raises `SystemExit` in a block when SIGTERM comes, with the exit status that shells give it."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)
