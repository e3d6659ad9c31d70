"""SIGTERM, by which clusters end a process some time before they kill it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class TerminatedError(BaseException):
    """SIGTERM has come. None of the exceptions that are taken for a failing client."""


class SigtermWatch:
    """
    Context in which SIGTERM is a request: `received` says whether it has come, and whatever runs in `breakable` is
    broken off by [`TerminatedError`]. At its end the process exits with 143, as SIGTERM would have had it, if one has
    come. Does nothing outside the main thread, or where the script handles or ignores SIGTERM by itself.
    """

    def __init__(self) -> None:
        self.received = False
        self._may_break: Callable[[], bool] | None = None
        self._watches = False

    def __enter__(self) -> "SigtermWatch":
        own_thread = threading.current_thread() is threading.main_thread()
        if own_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._process = os.getpid()
            self._watches = True
            signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watches:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.received:
            raise SystemExit(128 + signal.SIGTERM) from error

    @contextmanager
    def breakable(self, may_break: Callable[[], bool]) -> Iterator[None]:
        """Lets SIGTERM break off what runs here, whenever `may_break()` is true."""
        self._may_break = may_break
        try:
            self.end_if_received()
            yield
        finally:
            self._may_break = None

    def end_if_received(self) -> None:
        """Raises [`TerminatedError`] when SIGTERM has come."""
        if self.received:
            raise TerminatedError

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked: SIGTERM ends it as it ends every process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        if self._may_break is not None and self._may_break():
            raise TerminatedError
