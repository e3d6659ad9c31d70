"""Tests at the nodes: each tells of how many of its client's own test rows, and how many of these are right."""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .link import Answer
from .messages import Message, MessageError
from .roster import Roster


logger = logging.get_logger(__name__)

# Of the server's model, in messages.
SERVED = "served/"


class Counts(NamedTuple):
    """
    All that a node tells of a test.

    Args:
        test_size (`int`): Test rows.
        correct (`int`): Those of them whose class the model has found.
    """

    test_size: int
    correct: int


def served_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns what of a model's state is no frozen weight, by names in messages."""
    return {
        f"{SERVED}{name}": tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


@torch.no_grad()
def write_served_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Writes such tensors into a model; raises [`MessageError`] unless they are those of such a model."""
    own = served_tensors(model)
    due, found = ({name: (t.shape, t.dtype) for name, t in named.items()} for named in (own, tensors))
    if found != due:
        name = min(name for name in due.keys() | found.keys() if due.get(name) != found.get(name))
        raise MessageError(f"the server's model has {found.get(name)} as `{name}`, and {due.get(name)} is due")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def ask_for_tests(roster: Roster, model: nn.Module, timeout: float) -> dict[int, Counts]:
    """
    Has all nodes that are connected, or come meanwhile, test a model; returns what they tell, by their clients.

    Args:
        roster ([`Roster`]): The nodes.
        model (`nn.Module`): The server's.
        timeout (`float`): Seconds after which those that have not answered are left out.
    """
    deadline, tensors = time.monotonic() + timeout, served_tensors(model)
    counts, done = dict[int, Counts](), set[int]()
    asked, node_of = dict[str, int](), dict[int, int]()
    while time.monotonic() < deadline:
        roster.welcome()
        # Whoever was away has lost what it was asked.
        node_of = {client: node for client, node in node_of.items() if roster.node_of(client) == node}
        for client in sorted(roster.connected.keys() - node_of.keys() - done):
            node, facts = roster.connected[client], {"run": roster.run, "settings": roster.settings, "client": client}
            try:
                asked[roster.link.send(node, "test", Message("test", facts, tensors).pieces())] = client
                node_of[client] = node
            except ConnectionError as error:
                logger.warning(f"Client {client} cannot be asked to test: {error}.")
        if done and roster.connected.keys() <= done:
            break
        for answer in roster.link.receive():
            if roster.take(answer) or (client := asked.pop(answer.message_id, -1)) in (-1, *done):
                continue
            if answer.packed is None and answer.lost:
                node_of.pop(client, None)
                continue
            done.add(client)
            try:
                counts[client] = _counts_of(answer, client, roster.max_examples)
            except MessageError as error:
                logger.warning(f"Client {client} has not tested: {error}.")
        time.sleep(roster.link.pause)
    for message_id in asked:
        roster.link.forget(message_id)
    return counts


def _counts_of(answer: Answer, client: int, most: int) -> Counts:
    if answer.packed is None:
        raise MessageError(f"it sends no message: {answer.fault}")
    message = Message.unpack(answer.packed)
    facts = message.facts
    if message.kind != "tested":
        raise MessageError(str(facts.get("fault")) if message.kind == "failed" else f"it sends {message.kind!r}")
    size, correct = facts.get("test_size"), facts.get("correct")
    if facts.get("client") != client or type(size) is not int or type(correct) is not int:
        raise MessageError(f"it sends {facts!r}, where its client and two counts are due")
    if not (1 <= size <= most and 0 <= correct <= size):
        raise MessageError(f"it says that {correct} of {size} test rows are right, and has {most} at most")
    return Counts(size, correct)
