"""Writing behind a run: what files take is copied at once and written by threads, while the run goes on."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor


class WriteBehind:
    """
    Does the jobs that it is given in threads of its own, while the caller goes on. When one fails, its error is raised
    by the next call that may raise it, and by every one after that.

    Args:
        max_bytes (`int`): How much jobs may hold in memory until they are done; a single one may hold more.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        # To write one file keeps a core busy with copying it: a disk can take several.
        num_threads = min(4, max(1, (os.cpu_count() or 1) // 4))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="write-behind")
        self._jobs: deque[tuple[Future, int]] = deque()
        self._held_bytes = 0

    def make_room(self, num_bytes: int) -> None:
        """Waits until there is room for a job of `num_bytes`; raises the error of one that has failed."""
        while self._jobs and (self._jobs[0][0].done() or self._held_bytes + num_bytes > self.max_bytes):
            self._take_first()

    def add(self, num_bytes: int, work: Callable[..., None], *arguments: Any) -> None:
        """Adds the job `work(*arguments)`, which holds `num_bytes`."""
        self._jobs.append((self._threads.submit(work, *arguments), num_bytes))
        self._held_bytes += num_bytes

    def add_last(self, work: Callable[..., None], *arguments: Any) -> None:
        """Adds a job that begins when all before it have ended, however they did."""
        before = [job for job, _ in self._jobs]

        def wait_and_work() -> None:
            wait(before)  # they were begun before this one
            work(*arguments)

        self.add(0, wait_and_work)

    def rest(self) -> None:
        """Waits until there is nothing to do; errors are left for the next call."""
        wait([job for job, _ in self._jobs])

    def finish(self) -> None:
        """Waits until all jobs are done; raises the error of one that has failed."""
        self.rest()
        while self._jobs:
            self._take_first()

    def close(self) -> None:
        """Ends the threads when all jobs are done; raises as [`WriteBehind.finish`] does."""
        self._threads.shutdown()
        self.finish()

    def _take_first(self) -> None:
        job, num_bytes = self._jobs[0]
        job.result()  # one that has failed stays the first
        self._jobs.popleft()
        self._held_bytes -= num_bytes


def host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to CPU memory of their own; from a GPU at once, to memory that is pinned for that."""
    copies, streams = {}, set()
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if tensor.is_cuda:
            streams.add(torch.cuda.current_stream(tensor.device))
    for stream in streams:
        stream.synchronize()
    return copies
