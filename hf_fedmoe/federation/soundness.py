"""
Checks of every method: its hooks keep their promises, and its server is sound after each step.

Shape suffixes: m participants, P elements of a row.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ReservedSet
from ..weights import Payload, StateLayout, all_finite, negative_variance, payload_fault
from .contract import ClientTask, Server, ServerStep, Strategy, Uploads
from .filters import RESIDUAL
from .local_training import LocalTrainer
from .local_updates import OPTIMIZER_PREFIX
from .uploads import NotKeptError


class BrokenPromiseError(RuntimeError):
    """A hook of a strategy did what it must not do. No client is at fault, and the run ends."""

    def __init__(self, strategy: Strategy, fault: str):
        super().__init__(
            f"The strategy {strategy.name!r} ({type(strategy).__name__}) does not keep what its hooks promise "
            f"(docs/strategies.md): {fault}."
        )


# The hooks


def participants_of(
    strategy: Strategy, server: Server, drawn: list[int], round_index: int, num_clients: int
) -> list[int]:
    """Returns who takes part in a round; raises [`BrokenPromiseError`] unless they are clients, each once."""
    chosen = list(strategy.participants(server, drawn, round_index))
    known = range(num_clients)
    if bool(chosen) < bool(drawn) or len(set(chosen)) < len(chosen) or not all(client in known for client in chosen):
        fault = f"`participants` gives {chosen}, where some of the clients 0 to {num_clients - 1}, each once, are due"
        raise BrokenPromiseError(strategy, fault)
    names = {*(slot.name for slot in server.layout.slots), *server.layout.integers}
    if unknown := set(strategy.shared(server, round_index) or ()) - names:
        raise BrokenPromiseError(strategy, f"`shared` names `{min(unknown)}`, which is no tensor of a client's model")
    return [int(client) for client in chosen]


def download_of(strategy: Strategy, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
    """Returns the row that a client starts from; raises [`BrokenPromiseError`] unless it is one."""
    return _row(
        strategy, f"`download` gives client {client}", strategy.download(server, client, kept_P), server.layout
    )


def tensors_for(strategy: Strategy, server: Server, client: int) -> dict[str, Tensor]:
    """Returns what a client is sent beside its model; raises [`BrokenPromiseError`] unless it is named tensors."""
    tensors = strategy.download_tensors(server, client)
    if fault := _fault_of_names(tensors, server.layout):
        raise BrokenPromiseError(strategy, f"`download_tensors` gives client {client} {fault}")
    return tensors


def tensors_due(strategy: Strategy, server: Server, client: int) -> dict[str, Tensor]:
    """Returns likes of what an upload has beside its model; raises [`BrokenPromiseError`] unless they are tensors."""
    tensors = strategy.upload_tensors(server, client)
    if fault := _fault_of_names(tensors, server.layout):
        raise BrokenPromiseError(strategy, f"`upload_tensors` gives {fault}")
    return tensors


def _fault_of_names(tensors: Any, layout: StateLayout) -> str | None:
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        return f"{_kind_of(tensors)}, where a dict from names to tensors is due"
    if taken := tensors.keys() & {*layout.sizes, *layout.integers}:
        return f"`{min(taken)}`, a name that a tensor of the model has"
    return None


def _kind_of(found: Any) -> str:
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    return str({name: type(value).__name__ for name, value in found.items()})


def upload_of(
    fit: Callable[[ClientTask], Any],
    task: ClientTask,
    strategy: Strategy,
    local: LocalTrainer,
    bank_SP: Tensor,
    due: dict[str, Tensor],
) -> tuple[Payload, dict[str, Tensor]]:
    """
    Has a client trained; raises [`BrokenPromiseError`] unless all is there that its upload needs: `due` are likes of
    what it has beside its model.
    """
    result = fit(task)
    fault = _fault_of_result(result, task, local.layout, bank_SP, needs_loss=local.example_privacy is None)
    if fault := fault or _fault_of_tensors(result[0].tensors, due):
        raise BrokenPromiseError(strategy, f"`train_client` of client {task.client} {fault}")
    if task.kept_optimizer is not None and not local.has_kept_optimizer:
        fault = "`train_client` does not give `task.kept_optimizer` to the trainer: say `keeps_optimizer = False`"
        raise BrokenPromiseError(strategy, fault)
    return result


def _fault_of_result(
    result: Any, task: ClientTask, layout: StateLayout, bank_SP: Tensor, needs_loss: bool
) -> str | None:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Payload)):
        return f"returns a {type(result).__name__}, where a `Payload` and what stays with the client are due"
    payload, retained = result
    row_P = payload.row_P
    if row_P.data_ptr() != task.out_P.data_ptr() or row_P.shape != task.out_P.shape or row_P.dtype != layout.dtype:
        return "sends another row than `task.out_P`, into which it has to be written"
    if blank := layout.blanks(task.out_P):
        more = f" and {len(blank) - 1} more" if blank[1:] else ""
        return f"leaves `{blank[0]}`{more} of `task.out_P` unwritten"
    try:
        operator.index(payload.num_examples)
    except TypeError:
        return f"reports num_examples = {payload.num_examples}, where the number of the client's examples is due"
    if fault := _fault_of_numbers(payload.metrics, "metrics"):
        return fault
    if needs_loss and "loss" not in payload.metrics:
        return f"reports the metrics {sorted(payload.metrics)}, without a `loss`"
    if not isinstance(retained, dict) or not all(isinstance(tensor, Tensor) for tensor in retained.values()):
        return "leaves something else with the client than named tensors"
    taken = [name for name in retained if name == RESIDUAL or name.startswith(OPTIMIZER_PREFIX)]
    if taken:
        return f"leaves `{taken[0]}` with the client, a name that belongs to the federation"
    # Memory that is written again before what stays is on disk.
    reused = {t.untyped_storage().data_ptr() for t in (task.out_P, task.received_P, bank_SP)}
    for name, tensor in retained.items():
        if tensor.untyped_storage().data_ptr() in reused:
            return f"leaves `{name}` with the client, a view of a row that is used again: clone it"
    return None


def _fault_of_tensors(tensors: Any, due: dict[str, Tensor]) -> str | None:
    found, expected = (
        {name: (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else type(t) for name, t in named.items()}
        for named in (tensors, due)
    )
    if found != expected:
        return f"sends {found} beside the model, where `upload_tensors` promises {expected}"
    return None


def _fault_of_numbers(found: Any, what: str) -> str | None:
    if not isinstance(found, dict):
        return f"gives a {type(found).__name__} as {what}, where a dict of numbers is due"
    for name, value in found.items():
        if not isinstance(value, Real):
            return f"gives {name!r} as {what} a {type(value).__name__}, where a number is due"
    return None


def upload_fault(strategy: Strategy, server: Server, task: ClientTask, payload: Payload, size: int) -> str | None:
    """
    Says why an upload must be refused, `None` when it is sound. One that is not finite because what the client was
    given was not, raises [`BrokenPromiseError`].
    """
    known = Payload(server.bank_SP[0], server.integers[0], size)
    fault = payload_fault(payload, server.layout, known) or strategy.upload_fault(server, payload)
    if fault is not None and not all_finite([task.received_P]):
        fault = f"`download` gives client {task.client} a row that is not finite"
        raise BrokenPromiseError(strategy, fault)
    return fault


def mark_of(row_P: Tensor) -> tuple[float, float]:
    """Returns the sum of a row and that of its absolute values, by which processes can tell whether it is the same."""
    return row_P.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(row_P, 1, dtype=torch.float64).item()


def check_alike(strategy: Strategy, chosen: list[int], marks: Sequence[Sequence[tuple[float, float] | None]]) -> None:
    """Raises [`BrokenPromiseError`] unless processes that trained each client together have the same rows of it."""
    for client, found in zip(chosen, zip(*marks, strict=True), strict=True):
        sums = [mark[0] for mark in found if mark is not None]
        size = max((mark[1] for mark in found if mark is not None), default=0.0)
        # Rounding moves a sum far less, and other steps far more.
        if sums and max(sums) - min(sums) > 1e-8 * size:
            fault = f"`shares_batches` is True, but processes end with different models of client {client}"
            raise BrokenPromiseError(strategy, f"{fault}: train by `local.steps` and `local.step`")


def probe_of(strategy: Strategy, server: Server, row_P: Tensor, reserved: ReservedSet | None) -> Tensor | None:
    """Returns what is asked of a sound upload, on the CPU; raises [`BrokenPromiseError`] for what is no tensor."""
    probed = strategy.probe(server, row_P, reserved)
    if probed is not None and not isinstance(probed, Tensor):
        raise BrokenPromiseError(strategy, f"`probe` gives a {type(probed).__name__}, where a tensor is due")
    return None if probed is None else probed.cpu()


def check_probes(strategy: Strategy, probed: list[Tensor | None]) -> None:
    """Raises [`BrokenPromiseError`] unless the same was asked of all uploads of a round."""
    kinds = {None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in probed}
    if len(kinds) > 1:
        raise BrokenPromiseError(strategy, f"`probe` gives different things for different uploads, {list(kinds)}")


def rows_to_keep(strategy: Strategy, server: Server, uploads: Uploads) -> dict[int, Tensor]:
    """Returns what `synchronise` leaves with participants; raises [`BrokenPromiseError`] unless it is theirs."""
    with kept_needs(strategy, "synchronise"):
        rows = strategy.synchronise(server, uploads)
    if not isinstance(rows, dict):
        fault = f"`synchronise` gives a {type(rows).__name__}, where a dict from clients to rows is due"
        raise BrokenPromiseError(strategy, fault)
    if strangers := [client for client in rows if client not in uploads.clients]:
        fault = f"`synchronise` gives rows for {strangers}, and the round accepted uploads of {uploads.clients}"
        raise BrokenPromiseError(strategy, fault)
    for client, row_P in rows.items():
        _row(strategy, f"`synchronise` gives client {client}", row_P, server.layout)
    if not all_finite(rows.values()):
        raise BrokenPromiseError(strategy, "`synchronise` gives rows that are not finite")
    return rows


def _row(strategy: Strategy, gives: str, row_P: Any, layout: StateLayout) -> Tensor:
    if not isinstance(row_P, Tensor) or row_P.shape != (layout.size,) or row_P.dtype != layout.dtype:
        is_tensor = isinstance(row_P, Tensor)
        found = f"{tuple(row_P.shape)} of {row_P.dtype}" if is_tensor else f"a {type(row_P).__name__}"
        raise BrokenPromiseError(strategy, f"{gives} {found}, where a row ({layout.size},) of {layout.dtype} is due")
    return row_P


# The server


def sound_update(
    strategy: Strategy, uploads: Uploads, step: ServerStep, computes: Callable[[nn.Module], bool]
) -> dict[str, float]:
    """
    Takes a round's step, and raises `RuntimeError` unless the server is sound after it.

    Args:
        strategy, uploads, step: As in [`Strategy.update`].
        computes (`Callable`): Tells of a model whether what it computes is finite, see [`computes_finite`].
    """
    server, bank_SP = step.server, step.server.bank_SP
    with kept_needs(strategy, "update"):
        report = strategy.update(server, uploads, step)
    if server.bank_SP is not bank_SP:
        moved = "`update` puts another tensor in the place of `server.bank_SP`, which the model would not follow"
        raise BrokenPromiseError(strategy, f"{moved}: change it in place, `server.bank_SP.copy_(...)`")
    if fault := _fault_of_numbers(report, "its report"):
        raise BrokenPromiseError(strategy, f"`update` {fault}")
    check_state(strategy, server)
    if (fault := server_fault(server, computes)) is None:
        return report
    alone = suspects(server, uploads, computes)
    raise RuntimeError(
        f"The server is not sound after its step of round {step.round_index + 1}, in which the clients "
        f"{uploads.clients} took part: {fault}.{f' So are the models that {alone} sent.' if alone else ''} {REMEDY}"
    )


@contextmanager
def kept_needs(strategy: Strategy, hook: str) -> Iterator[None]:
    """Raises [`BrokenPromiseError`] when a hook asks for more of the uploads than its method `needs`."""
    try:
        yield
    except NotKeptError as error:
        fault = f"`needs` is {strategy.needs!r}, but `{hook}` does more with the uploads: {error}"
        raise BrokenPromiseError(strategy, fault) from error


def check_start(strategy: Strategy, server: Server) -> None:
    """Raises `ValueError` for a model that cannot be trained as it is."""
    check_state(strategy, server)
    if fault := server_fault(server, lambda model: True):
        raise ValueError(f"`model` cannot be trained: {fault}. Load another checkpoint of it.")


def sound_finish(strategy: Strategy, step: ServerStep, computes: Callable[[nn.Module], bool]) -> None:
    """Takes the step after the last round; arguments and errors are those of [`sound_update`]."""
    strategy.finish(step.server, step)
    if fault := server_fault(step.server, computes):
        raise RuntimeError(f"The server is not sound after what {strategy.name!r} does last: {fault}. {REMEDY}")


REMEDY = (
    "Nothing of it was saved, and the checkpoints of earlier rounds are as they were: load the model of the last one "
    "with `from_pretrained` and train it in a new run, with a lower learning rate or without the clients at fault."
)


def check_state(strategy: Strategy, server: Server) -> None:
    """Raises [`BrokenPromiseError`] unless a checkpoint can hold what the strategy keeps on the server."""
    bank = server.bank_SP.untyped_storage().data_ptr()
    for name, tensor in server.tensors.items():
        if not isinstance(tensor, Tensor):
            fault = f"`server.tensors[{name!r}]` is a {type(tensor).__name__}, where a tensor is due"
            raise BrokenPromiseError(strategy, fault)
        if tensor.untyped_storage().data_ptr() == bank:
            fault = f"`server.tensors[{name!r}]` is a view of the bank, which no checkpoint would know: clone it"
            raise BrokenPromiseError(strategy, fault)
    for integers in server.integers:
        if integers.keys() != set(server.layout.integers):
            fault = f"`server.integers` has {sorted(integers)}, where {sorted(server.layout.integers)} is due"
            raise BrokenPromiseError(strategy, fault)


def server_fault(server: Server, computes: Callable[[nn.Module], bool]) -> str | None:
    """
    Says what of the server is unsound, `None` if nothing is: all that it holds must be finite, no variance below 0,
    and what its model computes finite. One pass over its memory, without a mask of its size.
    """
    layout = server.layout
    beside = dict(server.beside_bank()) | {f"server.tensors[{name!r}]": t for name, t in server.tensors.items()}
    if not all_finite([server.bank_SP, *beside.values()]):
        for s, row_P in enumerate(server.bank_SP):
            for name, view in layout.views(row_P).items():
                if not all_finite([view]):
                    return f"`{name}` of its model {s} holds values that are not finite"
        name = next((name for name, tensor in beside.items() if not all_finite([tensor])), "padding")
        return f"`{name}` holds values that are not finite"
    if fault := negative_variance(server.bank_SP, layout):
        return fault
    for name, tensor in server.tensors.items():
        rows = tensor.dim() and tensor.shape[-1] == layout.size
        if rows and (fault := negative_variance(tensor.reshape(-1, layout.size), layout)):
            return f"in `server.tensors[{name!r}]`, as long as a row, {fault}: leave what is no parameter at 0"
    return None if computes(server.model) else "what its model computes of known rows is not finite"


def suspects(server: Server, uploads: Uploads, computes: Callable[[nn.Module], bool]) -> list[int]:
    """Returns the clients whose models are unsound by themselves."""
    found = []
    for client, row_P in uploads.by_client():
        server.layout.write(row_P, server.worker)
        if not computes(server.worker):
            found.append(client)
    return found


@torch.no_grad()
def computes_finite(
    model: nn.Module, rows: dict[str, Tensor] | None, autocast: Callable[[], AbstractContextManager]
) -> bool:
    """Tells whether a model's scores of a batch are finite, as it is evaluated; `True` without a batch."""
    if rows is None:
        return True
    training = model.training
    with autocast():
        scores = model.eval()(**rows).logits
    model.train(training)
    return all_finite([scores])
