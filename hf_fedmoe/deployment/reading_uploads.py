"""An upload from the wire, read with suspicion: whoever sent it may have sent anything."""

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..federation import ClientTask, Server
from ..federation.participants import Reply
from ..weights import Codec, Payload, encoded_names, read_upload_
from ..weights.payload import MOST_BATCHES
from .messages import Message, MessageError
from .travel import BESIDE, ENCODED, INTEGERS, part, shapes_due, write_row_


# Types of tensors by their kinds; numbers may come in another type of the kind.
KINDS = (
    (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
# Characters of what a client calls one of its metrics.
_LONGEST_NAME = 100


@dataclass
class Asked:
    """
    A participant who has been asked.

    Args:
        place (`int`): Among the participants of the round.
        task ([`~federation.ClientTask`]): What the server knows of its task.
        rank (`int`, *optional*): Of its adapters.
        names (`frozenset[str]`): Tensors of the model that travel in this round.
        due (`dict[str, Tensor]`): Likes of what it sends beside its model.
        reply ([`~federation.participants.Reply`]): What is known of its answer.
        node (`int`, *optional*): Which has its task, as far as is known.
        message_ids (`list[str]`, *optional*): Of the messages to it that may be answered, the last one last.
        fault (`str`, *optional*): Why its node could not answer, if it could not.
        not_before (`float`, *optional*, defaults to 0): Until when it is not asked again, by the monotonic clock.
        answer ([`Message`], *optional*): What it has answered, until that is read.
        answered (`bool`, *optional*, defaults to `False`): Whether there has been an answer.
    """

    place: int
    task: ClientTask
    rank: int | None
    names: frozenset[str]
    due: dict[str, Tensor]
    reply: Reply
    node: int | None = None
    message_ids: list[str] = field(default_factory=list)
    fault: str | None = None
    not_before: float = 0.0
    answer: Message | None = None
    answered: bool = False


def read_upload(message: Message, asked: Asked, server: Server, codec: Codec | None, out_P: Tensor) -> Payload:
    """
    Returns an upload as the federation knows it, its row written to `out_P`; `codec` is that of uploads, if any.

    What does not travel has the server's values. Whether the numbers are sound is checked afterwards.

    Raises:
        MessageError: For what is not what was asked for, in words.
    """
    facts, task, layout = message.facts, asked.task, server.layout
    if message.kind != "trained":
        raise MessageError(f"it sends {message.kind!r}, where an upload is due")
    for name, wanted in (("client", task.client), ("round", task.round_index)):
        if facts.get(name) != wanted:
            raise MessageError(f"it sends an upload of {name} {facts.get(name)!r}, where that of {wanted} is due")
    encoded = set() if codec is None else set(encoded_names(layout, asked.names))
    tensors = as_agreed(message.tensors, asked, server, encoded)
    views = layout.views(out_P)
    out_P.zero_()
    for name, known in layout.views(server.bank_SP[0]).items():
        if name not in asked.names:
            views[name].copy_(known)
    write_row_(out_P, tensors, layout, asked.rank)
    if codec is not None and encoded:
        sent = {name: tensor.to(out_P.device) for name, tensor in part(tensors, ENCODED).items()}
        _check_code(sent, codec, sum(views[name].numel() for name in encoded))
        try:
            read_upload_(codec, layout, out_P, task.received_P, sent, asked.names)
        except (RuntimeError, IndexError) as error:  # places beyond the row
            raise MessageError(f"its encoded update cannot be read: {error}") from error
    integers = {name: known.clone() for name, known in server.integers[0].items() if name not in asked.names}
    # Not as views, which would keep the message; where the server's own are.
    integers |= {name: tensor.to(out_P.device, copy=True) for name, tensor in part(tensors, INTEGERS).items()}
    num_examples, metrics = _numbers(facts)
    beside = {name: tensor.to(out_P.device) for name, tensor in part(tensors, BESIDE).items()}
    return Payload(out_P, integers, num_examples, metrics, beside)


def as_agreed(tensors: dict[str, Tensor], asked: Asked, server: Server, encoded: set[str]) -> dict[str, Tensor]:
    """
    Returns the tensors of an upload in the types that were agreed on; raises [`MessageError`] unless they are those
    that were asked for. No shape is broadcast, and a number is taken in another type only where both hold the same.
    """
    layout = server.layout
    row = shapes_due(layout, asked.names - encoded, asked.rank)
    due = {name: (shape, layout.dtype) for name, shape in row.items()}
    due |= {f"{INTEGERS}{name}": (t.shape, t.dtype) for name, t in server.integers[0].items() if name in asked.names}
    due |= {f"{BESIDE}{name}": (like.shape, like.dtype) for name, like in asked.due.items()}
    code = {name: tensor for name, tensor in tensors.items() if encoded and name.startswith(ENCODED)}
    found = {name: tensor for name, tensor in tensors.items() if name not in code}
    _check_alike(
        {name: tensor.shape for name, tensor in found.items()}, {name: shape for name, (shape, _) in due.items()}
    )
    return code | {name: _in_type(name, tensor, due[name][1]) for name, tensor in found.items()}


def _in_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in another type of its kind; raises [`MessageError`] where that holds other numbers."""
    if tensor.dtype == dtype:
        return tensor
    if any(tensor.dtype in kind and dtype in kind for kind in KINDS):
        converted = tensor.to(dtype)
        if torch.equal(converted.to(tensor.dtype).nan_to_num(), tensor.nan_to_num()):
            return converted
    raise MessageError(f"`{name}` is of {tensor.dtype}, and {dtype}, which is due, does not hold the same numbers")


def _check_code(sent: dict[str, Tensor], codec: Codec, num_elements: int) -> None:
    """Raises [`MessageError`] unless an encoded update has the form of one."""
    likes = codec.encode(torch.zeros(num_elements))
    due, found = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} for tensors in (likes, sent)
    )
    _check_alike(found, due)


def _check_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises [`MessageError`] for the first difference."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            sent, due = _words(found.get(name)), _words(wanted.get(name))
            raise MessageError(f"it sends {sent} as `{name}`, where {due} is due")


def _words(found: Any) -> str:
    if found is None:
        return "nothing"
    shape, dtype = (found, None) if isinstance(found, torch.Size) else found
    return f"{tuple(shape)}" + (f" of {dtype}" if dtype else "")


def _numbers(facts: dict[str, Any]) -> tuple[int, dict[str, float]]:
    num_examples, metrics = facts.get("num_examples"), facts.get("metrics")
    if not isinstance(num_examples, int) or isinstance(num_examples, bool):
        raise MessageError(f"it reports num_examples = {num_examples!r}, where a number is due")
    if not isinstance(metrics, dict) or not all(isinstance(value, Real) for value in metrics.values()):
        raise MessageError(f"it reports the metrics {metrics!r}, where numbers by their names are due")
    for name, value in metrics.items():
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise MessageError(
                f"it reports a metric {name!r}, where a printable name is due, of {_LONGEST_NAME} characters at most"
            )
        if isinstance(value, int) and abs(value) > MOST_BATCHES:  # of which there may be no float
            raise MessageError(f"it reports a number of {value.bit_length()} bits as {name}")
    if "loss" not in metrics:
        raise MessageError(f"it reports the metrics {sorted(metrics)}, without a `loss`")
    return num_examples, metrics
