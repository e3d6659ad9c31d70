"""A process that reads and collates batches, and the end of it that the process which started it holds."""

import os
import queue
import random
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor, multiprocessing
from torch.utils.data import Dataset, Subset


# The seed of what is random in a batch, augmentation, and its rows in the pool.
Wanted = tuple[int, list[int]]

# From this size on a tensor travels as shared memory, which takes a handshake but no copy.
SHARED_FROM_BYTES = 2**20

# How often a worker looks whether the process that started it is still there.
SECONDS_BETWEEN_LOOKS = 1


class BatchWorker:
    """
    One worker process. It reads what it is asked for in that order, each batch after seeding what is random with the
    batch's own seed.

    Args:
        pool (`torch.utils.data.Dataset`): The examples of all clients.
        collate (`Callable`): The data collator.
    """

    def __init__(self, pool: Dataset, collate: Callable):
        # What it was asked for and has not answered, whatever objects the asker knows these batches by.
        self.asked: deque[Any] = deque()
        self.connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_serve, args=(theirs, pool, collate, os.getpid()), name="hf_fedmoe batches", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def sentinel(self) -> int:
        """A handle that is ready once the process has ended."""
        return self._process.sentinel

    def ask(self, batch: Any, wanted: Wanted) -> None:
        """Has the process read what is wanted, after what it was asked for before; raises if it has ended."""
        self.asked.append(batch)
        self.connection.send(wanted)

    def answer(self) -> dict[str, Tensor] | Exception | None:
        """
        Returns the next answer that has come, a batch or what failed, and `None` if there is none yet.

        Raises:
            `EOFError`: If the process has ended.
        """
        # In this order: what it wrote before it ended is still there.
        ended = not self._process.is_alive()
        if not self.connection.poll():
            if ended:
                raise EOFError
            return None
        answer = self.connection.recv()
        if not isinstance(answer, Exception):
            answer = {name: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for name, t in answer.items()}
        return answer

    def end(self, patience: float = 0) -> str:
        """Ends the process unless it does so by itself within `patience` seconds; returns how it ended."""
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        self.connection.close()
        code = self._process.exitcode
        assert code is not None  # it has ended
        self._process.close()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def _serve(connection: Connection, pool: Dataset, collate: Callable, parent: int) -> None:
    """Answers until the connection ends. What Ctrl-C or an alarm means is for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    wanted: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
    # Requests are taken from the connection at once, so that who asks never waits for this process.
    threading.Thread(target=_listen, args=(connection, wanted, parent), daemon=True).start()
    while True:
        _send(connection, _read(pool, collate, *wanted.get()))


def _listen(connection: Connection, wanted: queue.SimpleQueue, parent: int) -> None:
    """Passes requests on; ends this process with the one that started it, also while a batch is being read."""
    try:
        while True:
            while not connection.poll(SECONDS_BETWEEN_LOOKS):
                if os.getppid() != parent:
                    os._exit(0)
            wanted.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _read(pool: Dataset, collate: Callable, seed: int, rows: list[int]) -> dict[str, Any] | Exception:
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        batch = collate(Subset(pool, rows).__getitems__(list(range(len(rows)))))
        return {name: _by_value(tensor) for name, tensor in batch.items()}
    except Exception as error:
        return _told(error)


def _by_value(tensor: Tensor) -> Tensor | np.ndarray:
    """A small tensor as an array, which travels as it is; numpy has no bfloat16."""
    small = tensor.nbytes < SHARED_FROM_BYTES and tensor.dtype != torch.bfloat16
    return tensor.detach().numpy() if small else tensor


def _told(error: Exception) -> Exception:
    """`error` with its traceback as a note; another with its name and text if it cannot travel."""
    note = "In a worker process:\n" + "".join(traceback.format_exception(error))
    try:
        error.add_note(note)
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(note)
    return error


def _send(connection: Connection, answer: dict[str, Any] | Exception) -> None:
    try:
        message = ForkingPickler.dumps(answer)
    except Exception as error:
        message = ForkingPickler.dumps(_told(error))
    connection.send_bytes(message)
