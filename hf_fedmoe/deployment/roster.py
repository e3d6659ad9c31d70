"""The nodes of a federation: which is which client, and whether it can take part."""

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.counted import counted
from ..federation import read_json, write_json
from .link import Answer, Link
from .messages import Message, MessageError


logger = logging.get_logger(__name__)

# The underscore keeps it from the Hub: whoever knows a node's text can pass for it. Once it had none.
TABLE_NAME, FORMER_NAME = "_nodes.json", "clients.json"
# Of a client that registers, unless the server says otherwise: by its examples it weighs.
MAX_EXAMPLES = 1_000_000
# Of the link, until a node that could not answer is asked again.
PAUSES = 10
# Until a node is greeted again that says nothing, and may have been killed and be back under its number.
PATIENCE_SECONDS = 120


@dataclass
class Identity:
    """
    Hashes of a model, which server and nodes must have in common.

    Args:
        layout (`str`): Hash of the names, shapes and types of what travels.
        frozen (`str`): Hash of what nobody trains.
    """

    layout: str
    frozen: str


class Roster:
    """
    The nodes of a federation and the clients that they are.

    A node is known by a random text that its folder keeps, so that it is the same client after a restart. Its number
    is what its configuration says, or else the first that is free when it comes, and is kept: in the server's folder,
    beside the checkpoints.

    Args:
        link ([`Link`]): To the nodes.
        folder (`Path`): The server's, `output_dir`.
        sizes_M (`np.ndarray` of shape `[M]`): Changed in place: rows of each client.
        settings (`dict`): Sent to each node, by which it makes its client.
        max_examples (`int`): As many may a node say that it has.
    """

    def __init__(
        self, link: Link, folder: Path, sizes_M: np.ndarray, settings: dict[str, Any], max_examples: int = MAX_EXAMPLES
    ):
        self.link, self.sizes_M, self.settings, self.max_examples = link, sizes_M, settings, max_examples
        self.path = Path(folder) / TABLE_NAME
        if not self.path.exists() and (former := self.path.with_name(FORMER_NAME)).exists():
            former.rename(self.path)
        table = read_json(self.path) or {"run": uuid.uuid4().hex[:12], "clients": {}}
        self.run: str = table["run"]
        self.numbers: dict[str, int] = table["clients"]
        # Of the private tensors with which nodes begin: they must know them, or are sent them.
        self.starts: dict[int, dict[str, str]] = {}
        self.identity: Identity | None = None
        self.connected: dict[int, int] = {}
        self._greeted: set[int] = set()
        self._greeted_at: dict[int, float] = {}
        # Until when nodes that did not answer are not greeted again, by the monotonic clock.
        self._not_before: dict[int, float] = {}
        self._waiting: dict[str, int] = {}

    def open(self, identity: Identity) -> None:
        """Says what nodes must have in common with the server; from now on they are greeted."""
        self.identity = identity
        self._write()

    def wait_for(self, count: int) -> None:
        """Waits until so many clients have a node."""
        told = -1
        while len(self.connected) < count:
            if len(self.connected) > told:
                told = len(self.connected)
                logger.warning(f"{told} of {counted(count, 'node')} connected; the first round waits.")
            self.welcome()
            for answer in self.link.receive():
                self.take(answer)
            if len(self.connected) < count:
                time.sleep(self.link.pause)

    def node_of(self, client: int) -> int | None:
        """Returns the node that is a client now, `None` if there is none."""
        return self.connected.get(client)

    def welcome(self) -> None:
        """Greets nodes that have come, and forgets those that have gone."""
        present = self.link.nodes()
        self.connected = {client: node for client, node in self.connected.items() if node in present}
        self._greeted &= present
        self._not_before = {node: until for node, until in self._not_before.items() if node in present}
        hello = Message("hello", {"run": self.run, "settings": self.settings})
        now = time.monotonic()
        silent = {node for node in self._waiting.values() if now > self._greeted_at[node] + PATIENCE_SECONDS}
        due = present - self._greeted | present & silent
        for node in sorted(node for node in due if now >= self._not_before.get(node, 0.0)):
            self._greeted.add(node)
            self._greeted_at[node] = now
            try:
                self._waiting[self.link.send(node, "hello", hello.pieces())] = node
            except ConnectionError:
                self._greeted.discard(node)

    def take(self, answer: Answer) -> bool:
        """Tells whether an answer was one to a greeting, which is then dealt with."""
        node = self._waiting.pop(answer.message_id, None)
        if node is None:
            return False
        for message_id in [other for other, greeted in self._waiting.items() if greeted == node]:
            self.link.forget(message_id)
            del self._waiting[message_id]
        try:
            if answer.packed is None:
                if answer.lost:  # it may have been restarted meanwhile
                    self._greeted.discard(node)
                    self._not_before[node] = time.monotonic() + PAUSES * self.link.pause
                raise MessageError(answer.fault or "no answer")
            self._register(node, Message.unpack(answer.packed))
        except (MessageError, KeyError, TypeError, ValueError) as error:
            logger.warning(f"Node {node} cannot take part: {error}.".replace("..", "."))
        return True

    def _register(self, node: int, answer: Message) -> None:
        facts = answer.facts
        if answer.kind == "failed":
            raise MessageError(f"it says: {facts['fault']}")
        name, wanted, size = str(facts["node"]), facts["client"], facts["num_examples"]
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= self.max_examples:
            raise MessageError(
                f"it reports {size!r} examples, where 1 to {self.max_examples} (`max_client_examples`) are due"
            )
        self._check(facts)
        start = {str(key): str(value) for key, value in dict(facts["start"]).items()}
        client = self._number(name, wanted)
        self.numbers[name] = client
        self._write()
        self.connected[client] = node
        self.starts[client] = start
        self.sizes_M[client] = size
        logger.info(f"Node {node} is client {client}, with {counted(size, 'example')}.")

    def _check(self, facts: dict[str, Any]) -> None:
        assert self.identity is not None  # or nobody was greeted
        for what, wanted in vars(self.identity).items():
            if facts[what] != wanted:
                parts = {"layout": "what clients train", "frozen": "what nobody trains"}
                raise MessageError(
                    f"its model is another than the server's in {parts[what]} (hash {facts[what]}, here {wanted}): "
                    "give both the same checkpoint, adapters and versions"
                )

    def _number(self, name: str, wanted: int | None) -> int:
        """Returns the client that a node is; raises [`MessageError`] if it can be none."""
        taken, known = {client: other for other, client in self.numbers.items()}, self.numbers.get(name)
        if wanted is None and known is not None:
            return known
        if wanted is None:
            wanted = next((client for client in range(len(self.sizes_M)) if client not in taken), None)
            if wanted is None:
                raise MessageError(f"all {len(self.sizes_M)} clients have a node: raise `num_clients`")
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted < len(self.sizes_M):
            raise MessageError(f"it is configured as client {wanted!r}, and clients are 0 to {len(self.sizes_M) - 1}")
        if taken.get(wanted, name) != name:
            raise MessageError(
                f"it is configured as client {wanted}, which another node is: give it another number, or the folder "
                "of that node if it is that one"
            )
        return wanted

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"run": self.run, "clients": self.numbers})
