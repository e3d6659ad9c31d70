"""Batches of clients, read and collated by worker processes while others train."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from .batch_worker import BatchWorker, Wanted


@dataclass(eq=False)
class _Batch:
    """
    A batch on its way.

    Args:
        wanted (`Wanted`): Its seed and rows.
        worker ([`BatchWorker`], *optional*): Which was asked for it and has not answered.
        answer (`dict[str, Tensor]` or `Exception`, *optional*): The batch, or why there is none.
        deaths (`int`, *optional*, defaults to 0): How many workers have died while they were at it.
    """

    wanted: Wanted
    worker: BatchWorker | None = None
    answer: dict[str, Tensor] | Exception | None = None
    deaths: int = 0


class BatchReader:
    """
    Reads batches of all clients in the same worker processes: to start them anew for each client takes longer than
    many a client's training. What is random in a batch follows from the batch's own seed, whichever worker reads it,
    and however often.

    A worker that dies takes nobody's batches with it: they are read again, and the one that it was at by a new worker
    that has nothing else to do. If that dies too, this batch, and no other, raises.

    Args:
        pool (`torch.utils.data.Dataset`): The examples of all clients.
        collate (`Callable`): The data collator.
        args ([`~transformers.TrainingArguments`]): `dataloader_num_workers` and `dataloader_prefetch_factor`.
    """

    def __init__(self, pool: Dataset, collate: Callable, args: TrainingArguments):
        self.pool, self.collate = pool, collate
        self._num_workers = args.dataloader_num_workers
        self._most_ahead = self._num_workers * (args.dataloader_prefetch_factor or 2)
        self._workers: list[BatchWorker] = []
        self._passes: deque[deque[_Batch]] = deque()
        # What is left of the pass that was begun last.
        self._current: deque[_Batch] = deque()
        # What no worker has been asked for, in order, and how many batches are on their way or here.
        self._waiting: deque[_Batch] = deque()
        self._ahead = 0

    def expect(self, passes: Iterable[list[Wanted]]) -> None:
        """The workers begin to read these, one pass after another, in the place of what was expected before."""
        self._expect(passes)
        self._ask()

    def read(self, wanted: list[Wanted], check: Callable[[], None] = lambda: None) -> Iterator[dict[str, Tensor]]:
        """
        The batches of a pass, which are being read already if it was expected. What was expected before it, and what
        nobody has read of the last pass, is left out.

        Args:
            wanted (`list[Wanted]`): The batches, in order.
            check (`Callable`, *optional*): Called now and then while a batch is waited for; may raise.

        Raises:
            `RuntimeError`: If another pass has begun before the end of this one, or workers die of a batch.
        """
        own = self._undisturbed(lambda: self._go_to(wanted))
        while own:
            if self._current is not own:
                raise RuntimeError("Two passes over clients' batches at once: read one to its end first.")
            answer = self._undisturbed(lambda: self._take(own, check))
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def close(self) -> None:
        """Ends the workers; what is read after this starts new ones."""
        self._expect([])
        self._end(self._workers)

    def _undisturbed(self, work: Callable[[], Any]) -> Any:
        """Returns what `work` does. If it is interrupted, at whatever, nothing that was on its way is relied upon."""
        try:
            return work()
        except BaseException:
            self._end(self._workers)
            raise

    def _expect(self, passes: Iterable[list[Wanted]]) -> None:
        self._current = deque()
        self._passes = deque(deque(map(_Batch, wanted)) for wanted in passes)
        self._leave_out()

    def _go_to(self, wanted: list[Wanted]) -> deque[_Batch]:
        """Makes the pass of `wanted` the current one."""
        expected = list(self._passes)
        place = next((i for i, own in enumerate(expected) if [batch.wanted for batch in own] == wanted), None)
        if place is None:
            self._expect([wanted])
            place = 0
        if self._current or place:
            self._passes = deque(itertools.islice(self._passes, place, None))
            self._current = deque()
            self._leave_out()
        self._current = self._passes.popleft()
        return self._current

    def _leave_out(self) -> None:
        """Forgets batches of passes that have gone, and ends the workers that are at one: it may be hanging there."""
        wanted = set(itertools.chain(self._current, *self._passes))
        self._end([worker for worker in self._workers if not wanted.issuperset(worker.asked)])

    def _take(self, own: deque[_Batch], check: Callable[[], None]) -> dict[str, Tensor] | Exception:
        """The answer of the first batch of a pass, which leaves it."""
        self._ask()
        while (answer := own[0].answer) is None:
            self._hear(check)
            self._ask()
        self._ahead -= 1
        own.popleft()
        self._ask()  # so that workers have something to do while this one is trained on
        return answer

    def _ask(self) -> None:
        """Asks workers for what waits, in order, each time the one that has least to do."""
        while self._waiting and self._ahead < self._most_ahead:
            worker = self._worker_for(self._waiting[0])
            if worker is None:
                return
            batch = self._waiting.popleft()
            batch.worker = worker
            self._ahead += 1
            try:
                worker.ask(batch, batch.wanted)
            except OSError:
                self._lose(worker)

    def _worker_for(self, batch: _Batch) -> BatchWorker | None:
        """
        A worker that may be asked for a batch now. One at which a worker has died gets a new one to itself: any other
        may have died as well, of something else, and nobody has noticed.
        """
        idle = [worker for worker in self._workers if not worker.asked]
        if idle and batch.deaths and len(self._workers) == self._num_workers:
            self._end(idle[:1])
        if len(self._workers) < self._num_workers and (batch.deaths or not idle):
            self._workers.append(BatchWorker(self.pool, self.collate))
            return self._workers[-1]
        free = [worker for worker in self._workers if not any(asked.deaths for asked in worker.asked)]
        return None if batch.deaths else min(free, key=lambda worker: len(worker.asked), default=None)

    def _hear(self, check: Callable[[], None]) -> None:
        """Waits for answers, and for the end of workers."""
        asked = [worker for worker in self._workers if worker.asked]
        wait([handle for worker in asked for handle in (worker.connection, worker.sentinel)], timeout=1)
        check()
        for worker in asked:
            try:
                answer = worker.answer()
            except Exception:  # it has ended, perhaps in the middle of an answer
                self._lose(worker)
            else:
                if answer is not None:
                    batch = worker.asked.popleft()
                    batch.answer, batch.worker = answer, None

    def _lose(self, worker: BatchWorker) -> None:
        """Queues again all that a worker that has died was asked for, unless the first of it is to blame."""
        suspect = worker.asked[0]
        suspect.deaths += 1
        (how,) = self._end([worker], patience=1)
        if suspect.deaths > 1:
            _, rows = suspect.wanted
            some = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            suspect.answer = RuntimeError(
                f"two worker processes died reading it, one after the other, and the second {how}: look at the rows "
                f"{some} of `train_dataset.pool`, and at the memory that `dataloader_num_workers` = "
                f"{self._num_workers} processes need"
            )
            self._waiting.remove(suspect)
            self._ahead += 1

    def _end(self, workers: list[BatchWorker], patience: float = 0) -> list[str]:
        """Ends workers and returns how each ended; what they were asked for waits again if it is still wanted."""
        ended = []
        for worker in list(workers):
            self._workers.remove(worker)
            for batch in worker.asked:
                batch.worker = None
            ended.append(worker.end(patience))
        there = list(itertools.chain(self._current, *self._passes))
        self._waiting = deque(batch for batch in there if batch.worker is None and batch.answer is None)
        self._ahead = len(there) - len(self._waiting)
        return ended
