"""Worker processes that read and collate the batches of clients while others train."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainingArguments


# The seed of what is random in a batch, augmentation, and its rows in the pool.
Wanted = tuple[int, list[int]]


class _Batches(Dataset):
    """Whole batches of a pool, each by what is wanted of it."""

    def __init__(self, pool: Dataset, collate: Callable):
        self.pool, self.collate = pool, collate

    def __getitem__(self, wanted: Wanted) -> Any:
        seed, rows = wanted
        torch.default_generator.manual_seed(seed)
        return self.collate(Subset(self.pool, rows).__getitems__(list(range(len(rows)))))


class BatchReader:
    """
    Reads batches of all clients in the same worker processes: to start them anew for each client takes longer than
    many a client's training. What a worker draws follows from the batch alone, not from what it read before.

    Args:
        pool (`torch.utils.data.Dataset`): The examples of all clients.
        collate (`Callable`): The data collator.
        args ([`~transformers.TrainingArguments`]): `dataloader_num_workers`, `dataloader_prefetch_factor` and
            `dataloader_pin_memory`.
    """

    def __init__(self, pool: Dataset, collate: Callable, args: TrainingArguments):
        self.pool = pool
        self._wanted: list[Wanted] = []
        self._make_loader = partial(
            DataLoader,
            _Batches(pool, collate),
            batch_size=None,
            sampler=self._wanted,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=True,
            generator=torch.Generator(),  # the global one is dropout's
        )
        self._stop()

    def expect(self, passes: Iterable[list[Wanted]]) -> None:
        """The workers begin to read these, one pass after another."""
        self._passes = deque(passes)
        self._wanted[:] = itertools.chain.from_iterable(self._passes)
        self._left = 0
        if self._loader is None:
            self._loader = self._make_loader()
        self._batches = iter(self._loader)

    def read(self, wanted: list[Wanted]) -> Iterator[dict[str, Tensor]]:
        """
        The batches of a pass, which are being read already if it was expected. What was expected before it, and what
        nobody has read of the last pass, is left out.

        Raises:
            `RuntimeError`: If another pass has begun before the end of this one.
        """
        self._current = wanted
        self._go_to(wanted)
        try:
            while self._left:
                if self._current is not wanted:
                    raise RuntimeError("Two passes over clients' batches at once: read one to its end first.")
                self._left -= 1
                yield next(self._batches)
        except Exception:
            # Whatever it was, a dead worker perhaps: the next pass gets new ones.
            self._stop()
            raise

    def _go_to(self, wanted: list[Wanted]) -> None:
        try:
            while wanted in self._passes:
                for _ in range(self._left):
                    next(self._batches)
                self._left = len(other := self._passes.popleft())
                if other == wanted:
                    return
        except Exception:  # of a batch that nobody wants any more
            self._stop()
        self.expect([wanted])
        self._left = len(self._passes.popleft())

    def _stop(self) -> None:
        self._loader: DataLoader | None = None
        self._batches: Iterator = iter(())
        self._passes: deque[list[Wanted]] = deque()
        # Batches of the pass that was begun last.
        self._left = 0
