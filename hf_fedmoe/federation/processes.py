"""
The processes of one launch (`accelerate launch`, `torchrun`): each trains other clients of a round, and the main one
is the server as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn


T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """
    The processes of a launch, and what they tell each other; one alone tells nobody anything.

    Args:
        index (`int`, *optional*, defaults to 0): Number of this one; 0 is the main process.
        count (`int`, *optional*, defaults to 1): How many there are.
        device (`torch.device`, *optional*): Of this process, where the process group's backend wants its tensors.
        timeout (`int`, *optional*, defaults to 1800): Seconds that the process group waits for one of them.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: int = 1800

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Waits for other processes in a block; raises [`BrokenOffError`] if one does not come."""
        try:
            yield
        except RuntimeError as error:
            if "gloo/transport" not in str(error):
                raise
            if "Timed out" in str(error):
                reason = (
                    f"has waited for another one for `ddp_timeout` = {self.timeout} s. That one hangs, or has more to "
                    "do than takes so long: raise `ddp_timeout`, or see what it is at"
                )
            else:
                reason = "has lost another one, which ended: its own output says why"
            raise BrokenOffError(f"Process {self.index} {reason}.") from error

    def gather(self, make: Callable[[], T]) -> list[T]:
        """
        Returns what `make` returns in each process, in their order. If it fails in one, all raise: none waits for one
        that has left. It must not communicate by itself, and its tensors must be on the CPU.
        """
        if self.count == 1:
            return [make()]
        made, error = None, None
        try:
            made = make()
        except Exception as caught:
            error = caught
        told: list = [None] * self.count
        with self.waiting():
            dist.all_gather_object(told, (made, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for index, (_, fault) in enumerate(told):
            if fault is not None:
                raise RuntimeError(f"Process {index} failed: {fault}")
        return [made for made, _ in told]

    def on_main(self, make: Callable[[], T]) -> T:
        """Returns what `make` returns in the main process, the only one that calls it; see [`Processes.gather`]."""
        return self.gather(lambda: [make()] if self.index == 0 else [])[0][0]

    def tell(self, message: Any = None) -> Any:
        """Returns the main process's `message` in all of them."""
        told = [message]
        with self.waiting():
            dist.broadcast_object_list(told, 0)
        return told[0]

    def gather_numbers(self, number: int) -> list[int]:
        """Returns the numbers of all processes, in their order."""
        if self.count == 1:
            return [number]
        own = torch.tensor([number], device=self.device)
        told = [torch.empty_like(own) for _ in range(self.count)]
        with self.waiting():
            dist.all_gather(told, own)
        return torch.cat(told).tolist()

    def all_reduce_(self, tensor: Tensor) -> None:
        """Makes `tensor` the sum of those of all processes."""
        if self.count > 1:
            with self.waiting():
                dist.all_reduce(tensor)

    @torch.no_grad()
    def move_(self, tensor: Tensor, source: int, target: int) -> None:
        """Copies `tensor` from process `source` to process `target`; a no-op elsewhere."""
        if source == target or self.index not in (source, target):
            return
        moved = tensor.detach().to(self.device).contiguous()
        with self.waiting():
            if self.index == source:
                dist.send(_bytes(moved), target)
            else:
                dist.recv(_bytes(moved), source)
        if self.index == target:
            tensor.copy_(moved)

    @torch.no_grad()
    def broadcast_(self, tensor: Tensor) -> None:
        """Copies `tensor` from the main process to all others."""
        if self.count == 1:
            return
        sent = tensor.detach().to(self.device).contiguous()
        with self.waiting():
            dist.broadcast(_bytes(sent), 0)
        if self.index:
            tensor.copy_(sent)

    def reduce_(self, tensor: Tensor) -> None:
        """Makes `tensor` the sum of those of all processes, in the main one only."""
        if self.count == 1:
            return
        summed = tensor.to(self.device)
        with self.waiting():
            dist.reduce(summed, 0)
        if self.index == 0:
            tensor.copy_(summed)

    def broadcast_model_(self, model: nn.Module) -> None:
        """Copies all parameters and buffers from the main process to all others."""
        for tensor in [*model.parameters(), *model.buffers()]:
            self.broadcast_(tensor)


def leave_group() -> None:
    """
    Ends what the process group runs, for the end of a process: gloo's threads, which nobody waited for, would abort it
    now and then, and the launcher would end the others with it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class BrokenOffError(BaseException):
    """
    A failure, in this process, of what all do at once: the others may wait for it in a collective. The run has to
    end, so this is none of the exceptions that are taken for a failing client.
    """


@contextmanager
def unbroken(what: str) -> Iterator[None]:
    """Ends the run if a block fails that must succeed in all processes."""
    try:
        yield
    except Exception as error:
        raise BrokenOffError(f"{what} failed, {type(error).__name__}: {error}") from error


def _bytes(tensor: Tensor) -> Tensor:
    """Views a contiguous tensor as bytes: not every backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def balance(sizes: Sequence[int], count: int) -> list[int]:
    """
    Gives each client one of `count` processes: the largest client first, each to the process that has the least to
    do so far (longest processing time first, Graham 1969).
    """
    loads, owners = [0] * count, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += sizes[place]
    return owners
