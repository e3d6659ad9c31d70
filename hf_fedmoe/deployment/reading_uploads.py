"""An upload from the wire, read with suspicion: whoever sent it may have sent anything."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..federation import ClientTask, Server
from ..federation.participants import Reply
from ..weights import Codec, Payload, encoded_names, read_upload_
from .messages import Message, MessageError
from .travel import BESIDE, ENCODED, INTEGERS, ROW, part, shapes_due, write_row_


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
        message_id (`str`, *optional*), node (`int`, *optional*): Of the last message to it.
        answer ([`Message`], *optional*): What it has answered, until that is read.
        answered (`bool`, *optional*, defaults to `False`): Whether there has been an answer.
    """

    place: int
    task: ClientTask
    rank: int | None
    names: frozenset[str]
    due: dict[str, Tensor]
    reply: Reply
    message_id: str | None = None
    node: int | None = None
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
    _check_tensors(message.tensors, asked, server, encoded)
    views = layout.views(out_P)
    out_P.zero_()
    for name, known in layout.views(server.bank_SP[0]).items():
        if name not in asked.names:
            views[name].copy_(known)
    write_row_(out_P, message.tensors, layout, asked.rank)
    if codec is not None and encoded:
        sent = {name: tensor.to(out_P.device) for name, tensor in part(message.tensors, ENCODED).items()}
        _check_code(sent, codec, sum(views[name].numel() for name in encoded))
        try:
            read_upload_(codec, layout, out_P, task.received_P, sent, asked.names)
        except (RuntimeError, IndexError) as error:  # places beyond the row
            raise MessageError(f"its encoded update cannot be read: {error}") from error
    integers = {name: known.clone() for name, known in server.integers[0].items()}  # of one that is not sent, too
    integers |= part(message.tensors, INTEGERS)
    num_examples, metrics = _numbers(facts)
    beside = {name: tensor.to(out_P.device) for name, tensor in part(message.tensors, BESIDE).items()}
    return Payload(out_P, integers, num_examples, metrics, beside)


def _check_tensors(tensors: dict[str, Tensor], asked: Asked, server: Server, encoded: set[str]) -> None:
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(ROW)}
    wanted = shapes_due(server.layout, asked.names - encoded, asked.rank)
    _check_alike(found, wanted, "of its model")
    for name in found:
        if tensors[name].dtype != server.layout.dtype:
            raise MessageError(f"`{name}` is of {tensors[name].dtype}, where {server.layout.dtype} is due")
    due = {f"{BESIDE}{name}": (like.shape, like.dtype) for name, like in asked.due.items()}
    beside = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items() if name.startswith(BESIDE)}
    _check_alike(beside, due, "beside its model")
    known = {f"{INTEGERS}{name}" for name in server.integers[0]}
    for name in tensors.keys() - found.keys() - beside.keys():
        if name not in known and not (encoded and name.startswith(ENCODED)):
            raise MessageError(f"it sends `{name}`, which nobody asked for")


def _check_code(sent: dict[str, Tensor], codec: Codec, num_elements: int) -> None:
    """Raises [`MessageError`] unless an encoded update has the form of one."""
    likes = codec.encode(torch.zeros(num_elements))
    due, found = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} for tensors in (likes, sent)
    )
    _check_alike(found, due, "of its encoded update")


def _check_alike(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raises [`MessageError`] for the first difference."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise MessageError(
                f"it sends {_words(found.get(name))} as `{name}` {what}, where {_words(wanted.get(name))} is due"
            )


def _words(found: Any) -> str:
    if found is None:
        return "nothing"
    shape, dtype = found if isinstance(found, tuple) and isinstance(found[-1], torch.dtype) else (found, None)
    return f"{tuple(shape)}" + (f" of {dtype}" if dtype else "")


def _numbers(facts: dict[str, Any]) -> tuple[int, dict[str, float]]:
    num_examples, metrics = facts.get("num_examples"), facts.get("metrics")
    if not isinstance(num_examples, int) or isinstance(num_examples, bool):
        raise MessageError(f"it reports num_examples = {num_examples!r}, where a number is due")
    if not isinstance(metrics, dict) or not all(isinstance(value, Real) for value in metrics.values()):
        raise MessageError(f"it reports the metrics {metrics!r}, where numbers by their names are due")
    if "loss" not in metrics:
        raise MessageError(f"it reports the metrics {sorted(metrics)}, without a `loss`")
    return num_examples, metrics
