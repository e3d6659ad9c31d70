"""The server's step: the main process takes it, and the others do their part of what it hands out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data import ReservedSet
from ..weights import fuse_
from .contract import JointWork, Server, Work
from .processes import Processes, unbroken


T = TypeVar("T")


def take_step(step: Callable[[], T], server: Server, reserved: ReservedSet | None, processes: Processes) -> T:
    """
    What `step` returns in the main process, the only one that calls it. Meanwhile the others wait for what it gives to
    [`Server.share`] or `Server.join` and do their part of it. Afterwards `server` is the same in all; if anything
    fails in one, all raise.
    """
    if processes.count == 1:
        return step()

    def hand_out(work: Work, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        processes.tell((_share, (work, items)))
        return _share(work, items, server, reserved, processes)

    def fuse_held(weights_Sm: Tensor, keep_S: Tensor) -> None:
        processes.tell((_fuse_held, (weights_Sm.cpu(), keep_S.cpu())))
        _fuse_held(weights_Sm, keep_S, server, reserved, processes)

    def join(work: JointWork, tensors: dict[str, Tensor], settings: Any) -> Any:
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        processes.tell((_join, (work, kinds, settings)))
        return _join(work, kinds, settings, server, reserved, processes, tensors)

    def lead() -> T:
        server.hand_out = hand_out
        server.fuse_held = fuse_held if server.held else None
        server.join = join if server.gate_fit else None
        try:
            result = step()
        except Exception:
            processes.tell(None)
            raise
        finally:
            server.hand_out = server.fuse_held = server.join = None
        processes.tell(None)
        return result

    def help_out() -> None:
        error = None
        while (told := processes.tell()) is not None:
            part, arguments = told
            try:
                part(*arguments, server, reserved, processes)
            except Exception as caught:
                # Of what is shared the main process has heard, which ends its step: that is waited for here.
                error = caught
        if error is not None:
            raise error

    # Whatever fails in between, all come to this gathering, which raises it.
    result = processes.gather(lead if processes.index == 0 else help_out)[0]
    broadcast_server_(server, processes)
    return result


def _share(
    work: Work, items: Sequence[Any], server: Server, reserved: ReservedSet | None, processes: Processes
) -> list[dict[str, Tensor]]:
    """Each process works on every n-th item, with the main one's models; the main one gets all results."""
    broadcast_models_(server, processes)
    owners = [place % processes.count for place in range(len(items))]
    results: dict[int, dict[str, Tensor]] = {}

    def work_on_own() -> dict[int, dict[str, tuple[torch.Size, torch.dtype]]]:
        for place, owner in enumerate(owners):
            if owner == processes.index:
                results[place] = work(server, reserved, items[place])
        return {place: {name: (t.shape, t.dtype) for name, t in found.items()} for place, found in results.items()}

    kinds = processes.gather(work_on_own)
    for place, owner in enumerate(owners):
        if processes.index == 0 and owner != 0:
            results[place] = {
                name: torch.empty(shape, dtype=dtype, device=server.bank_SP.device)
                for name, (shape, dtype) in kinds[owner][place].items()
            }
        for tensor in results.get(place, {}).values():
            processes.move_(tensor, owner, 0)
    return [results[place] for place in sorted(results)]


def _fuse_held(
    weights_Sm: Tensor, keep_S: Tensor, server: Server, reserved: ReservedSet | None, processes: Processes
) -> None:
    """Each process fuses the uploads that it holds, and the main one's bank takes the sums, some columns at a time."""
    rows_nP, places = server.held
    weights_Sn, keep_S = weights_Sm[:, places].to(rows_nP.device), keep_S.to(rows_nP.device)
    with unbroken("Fusion"):
        fuse_(server.bank_SP, rows_nP, weights_Sn, keep_S, server.layout.batchnorm, processes.add_up_)


def _join(
    work: JointWork,
    kinds: dict[str, tuple[torch.Size, torch.dtype]],
    settings: Any,
    server: Server,
    reserved: ReservedSet | None,
    processes: Processes,
    tensors: dict[str, Tensor] | None = None,
) -> Any:
    """All processes do the same work together, with the main one's models and `tensors`."""
    broadcast_models_(server, processes)
    if tensors is None:
        device = server.bank_SP.device
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in kinds.items()}
    for tensor in tensors.values():
        processes.broadcast_(tensor)
    with unbroken("Work of all processes"):
        return work(server, reserved, tensors, settings)


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
