"""Tasks side by side in a few processes: what fails in one of them, or kills its process, is told of it alone."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


# Seconds that a process has to end by itself, with a checkpoint where it makes one.
GRACE = 30
WATCHED_EVERY = 2.0


@dataclass
class Failure:
    """
    The reason for which a task did not end.

    Args:
        reason (`str`): In one line.
        details (`str`): The traceback, when there is one.
        refused (`bool`): Whether it was a `ValueError`, `OSError` or `ImportError`, by which settings are refused.
    """

    reason: str
    details: str = ""
    refused: bool = False


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


class SideBySide:
    """
    Processes that stay for several tasks, since importing takes longer than many a task. A context manager: at its end
    they are stopped.

    Args:
        num_processes (`int`): How many work at a time. They start when they are needed.
    """

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Any]] = {}

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self._idle:
            with suppress(OSError):  # its process may be gone
                worker.connection.send(None)
        for worker, _ in self._busy.values():
            worker.process.terminate()
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            worker.process.join(GRACE)
            worker.process.kill()  # nothing happens to one that has ended
            worker.process.join()
            worker.connection.close()
        self._idle, self._busy = [], {}

    def run(
        self,
        function: Callable[[Any], None],
        tasks: Iterable[Any],
        watch: Callable[[list[Any]], None] = lambda busy: None,
    ) -> Iterator[tuple[Any, Failure | None]]:
        """
        Calls a function of a module with each task.

        Args:
            function (`Callable`): Imported in the processes by its name.
            tasks (`Iterable`): Its only argument each; what can be pickled.
            watch (`Callable`, *optional*): Called with the tasks at work, every two seconds in which none ends.

        Yields:
            `tuple`: A task and its [`Failure`], `None` when there was none, as they end.
        """
        waiting = list(tasks)
        while waiting or self._busy:
            while waiting and len(self._busy) < self.num_processes:
                self._idle = [worker for worker in self._idle if worker.process.is_alive()]
                worker = self._idle.pop() if self._idle else _start()
                task = waiting.pop(0)
                self._busy[worker.connection] = worker, task  # before the order: an interrupt may come with it
                worker.connection.send((function, task))
            ended = wait(list(self._busy), timeout=WATCHED_EVERY)
            if not ended:
                watch([task for _, task in self._busy.values()])
            for connection in ended:
                assert isinstance(connection, Connection)  # all that it was given are
                worker, task = self._busy[connection]
                failure: Failure | None
                try:
                    failure = connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    failure = Failure(_end_of(worker.process.exitcode))
                    connection.close()
                else:
                    self._idle.append(worker)
                del self._busy[connection]
                yield task, failure


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()  # so that the end of the process is the end of the connection
    return _Worker(process, ours)


def _serve(connection: Connection) -> None:
    """A process: tasks until there are no more, or nobody is left who sends any."""
    # Control-C reaches all processes of a terminal. Of checkpoints there is always a whole one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        try:
            order = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if order is None:
            return
        function, task = order
        failure = None
        try:
            function(task)
        except Exception as error:
            reason = " ".join(str(error).split())
            refused = isinstance(error, ValueError | OSError | ImportError)
            named = reason if refused and reason else f"{type(error).__name__}: {reason}"
            failure = Failure(named, traceback.format_exc(), refused)
        connection.send(failure)


def _end_of(exitcode: int | None) -> str:
    assert exitcode is not None  # it was waited for
    if exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    hint = ", is there enough memory?" if exitcode == -signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-exitcode).name}{hint}"
