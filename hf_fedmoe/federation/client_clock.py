"""The time that a client has for its local training."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext


# An alarm that nobody heeds, a collator may try again whatever happens, rings again.
SECONDS_BETWEEN_ALARMS = 1.0


class TimeIsUpError(BaseException):
    """Interrupts a client, and is none of the exceptions that a collator which tries again would catch."""


class ClientClock:
    """
    Measures the training of clients, and ends that of one that takes longer than it may.

    In the main thread an alarm of the operating system (`SIGALRM`) interrupts whatever Python runs or waits for,
    also a collator that hangs. In other threads the time is looked at between batches only.

    Args:
        seconds (`float`, *optional*): For each client; without limit if 0 or left out.

    Attributes:
        spent (`float`): Seconds that clients have trained for so far, in this process.
    """

    def __init__(self, seconds: float | None = None):
        self.seconds, self.spent = seconds, 0.0
        self._end: float | None = None
        self._whole = 0

    @contextmanager
    def client(self, count: int = 1) -> Iterator[None]:
        """
        Times a block in which `count` clients are trained, one or several at once.

        Raises:
            `TimeoutError`: If that takes longer than `count` times `seconds`.
        """
        started = time.perf_counter()
        try:
            with self._limit(count):
                yield
        finally:
            self.spent += time.perf_counter() - started

    @contextmanager
    def _limit(self, count: int) -> Iterator[None]:
        if not self.seconds:
            yield
            return
        seconds = count * self.seconds
        self._end = time.monotonic() + seconds
        main = threading.current_thread() is threading.main_thread()
        try:
            with alarm(seconds, self.check) if main else nullcontext():
                try:
                    yield
                    self.check()
                finally:
                    self._end = None  # from here on it does not ring
        except TimeIsUpError as error:
            each = f" for each of {count} clients" if count > 1 else ""
            raise TimeoutError(f"took longer than `client_timeout` = {self.seconds:g} s{each}") from error
        finally:
            self._end = None

    def check(self) -> None:
        """Interrupts the client if its time is up and nothing is being kept whole."""
        if self._end is not None and not self._whole and time.monotonic() >= self._end:
            raise TimeIsUpError

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Holds the alarm back in a block that must not be left half done, since the next client finds it."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
        self.check()


@contextmanager
def alarm(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    """Calls `ring` after `seconds` and again and again; then the handler and the timer that were there are back."""
    started, left, interval = time.monotonic(), 0.0, 0.0
    former = signal.signal(signal.SIGALRM, lambda *_: ring())
    try:
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_BETWEEN_ALARMS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former or signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)
