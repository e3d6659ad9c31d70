"""The server's step: the main process takes it, and the others do their part of what it hands out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .contract import JointWork, Server, ServerStep, Uploads, Work
from .processes import Processes, unbroken


T = TypeVar("T")


class SharedStep(ServerStep):
    """
    A [`ServerStep`] of several processes: the main one takes it, the others do their part of what it tells them.

    Args:
        step ([`ServerStep`]): What this process has of it.
        processes ([`Processes`]): Of the launch.
        uploads ([`Uploads`], *optional*): What this process has of them.
    """

    def __init__(self, step: ServerStep, processes: Processes, uploads: Uploads | None):
        super().__init__(**vars(step))
        self.processes, self.uploads = processes, uploads

    def share(self, work: Work, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        self.processes.tell((SharedStep.do_own, (work, items)))
        return self.do_own(work, items)

    def join(self, work: JointWork, tensors: dict[str, Tensor], settings: Any) -> Any:
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self.processes.tell((SharedStep.do_together, (work, kinds, settings)))
        return self.do_together(work, kinds, settings, tensors)

    def do_own(self, work: Work, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Works on every n-th item, with the main process's models; that one gets all results."""
        broadcast_models_(self.server, self.processes)
        owners = [place % self.processes.count for place in range(len(items))]
        results: dict[int, dict[str, Tensor]] = {}

        def work_on_own() -> dict[int, dict[str, tuple[torch.Size, torch.dtype]]]:
            for place, owner in enumerate(owners):
                if owner == self.processes.index:
                    results[place] = work(self, items[place])
            return {place: {name: (t.shape, t.dtype) for name, t in found.items()} for place, found in results.items()}

        kinds = self.processes.gather(work_on_own)
        for place, owner in enumerate(owners):
            if self.processes.index == 0 and owner != 0:
                results[place] = {
                    name: torch.empty(shape, dtype=dtype, device=self.server.bank_SP.device)
                    for name, (shape, dtype) in kinds[owner][place].items()
                }
            for tensor in results.get(place, {}).values():
                self.processes.move_(tensor, owner, 0)
        return [results[place] for place in sorted(results)]

    def do_together(
        self,
        work: JointWork,
        kinds: dict[str, tuple[torch.Size, torch.dtype]],
        settings: Any,
        tensors: dict[str, Tensor] | None = None,
    ) -> Any:
        """Does what all processes do together, with the main one's models and `tensors`."""
        broadcast_models_(self.server, self.processes)
        if tensors is None:
            device = self.server.bank_SP.device
            tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in kinds.items()}
        for tensor in tensors.values():
            self.processes.broadcast_(tensor)
        with unbroken("Work of all processes"):
            return work(self, tensors, settings)


def take_step(
    act: Callable[[ServerStep], T], step: ServerStep, processes: Processes, uploads: Uploads | None = None
) -> T:
    """
    Returns what `act(step)` returns in the main process, the only one that calls it. Meanwhile the others wait for
    what it gives to [`ServerStep.share`], [`ServerStep.join`] or [`ShardedUploads`], and do their part of it.
    Afterwards the server is the same in all; if anything fails in one, all raise.
    """
    if processes.count == 1:
        return act(step)
    shared = SharedStep(step, processes, uploads)

    def lead() -> list[T]:
        try:
            result = act(shared)
        except Exception:  # no other: where that comes from, nobody listens
            processes.tell(None)
            raise
        processes.tell(None)
        return [result]

    def help_out() -> list[T]:
        error = None
        while (told := processes.tell()) is not None:
            part, arguments = told
            try:
                part(shared, *arguments)
            except Exception as caught:
                # Of what is shared the main process has heard, which ends its step: that is waited for here.
                error = caught
        if error is not None:
            raise error
        return []

    # Whatever fails in between, all come to this gathering, which raises it.
    result = processes.gather(lead if processes.index == 0 else help_out)[0][0]
    broadcast_server_(step.server, processes)
    return result


def broadcast_models_(server: Server, processes: Processes) -> None:
    """Copies the bank, and what else of the model is no frozen weight, from the main process to the others."""
    processes.broadcast_(server.bank_SP)
    for _, tensor in server.beside_bank():
        processes.broadcast_(tensor)


def broadcast_server_(server: Server, processes: Processes) -> None:
    """Copies the server's state from the main process to the others."""
    if processes.count == 1:
        return
    broadcast_models_(server, processes)
    kinds = {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in server.tensors.items()}
    integers = [{name: tensor.cpu() for name, tensor in taken.items()} for taken in server.integers]
    kinds, integers = processes.tell((kinds, integers))
    if processes.index:
        server.tensors = {
            name: torch.empty(shape, dtype=dtype, device="cpu" if device == "cpu" else processes.device)
            for name, (shape, dtype, device) in kinds.items()
        }
        server.integers = [{name: t.to(processes.device) for name, t in taken.items()} for taken in integers]
    for tensor in server.tensors.values():
        processes.broadcast_(tensor)
