"""Flower as a link: messages go by its Message API, from a `Grid` to SuperNodes."""

from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from transformers.utils import logging

from .link import Answer


logger = logging.get_logger(__name__)

# Our message in one of Flower's: the bytes of a file of safetensors, which Flower sends in chunks and never reads.
RECORD = ENTRY = "hf_fedmoe"
SERIALISATION = "safetensors"
TYPES = {"hello": MessageType.QUERY, "train": MessageType.TRAIN}


def to_record(packed: bytes) -> RecordDict:
    """Puts bytes into a record of Flower's."""
    array = Array(dtype="uint8", shape=(len(packed),), stype=SERIALISATION, data=packed)
    return RecordDict({RECORD: ArrayRecord({ENTRY: array})})


def from_record(record: RecordDict) -> bytes:
    """Takes bytes out of a record of Flower's; raises `ValueError` if it is none of ours."""
    try:
        array = record.array_records[RECORD][ENTRY]
    except KeyError:
        raise ValueError("the record holds no message of hf_fedmoe") from None
    if array.stype != SERIALISATION:
        raise ValueError(f"the record holds an array as {array.stype!r}, where {SERIALISATION!r} is due")
    return array.data


class FlowerLink:
    """
    A link by Flower.

    Args:
        grid (`flwr.serverapp.Grid`): Of a `ServerApp`.
    """

    pause = 0.5

    def __init__(self, grid: Grid):
        self.grid = grid
        self._waiting: set[str] = set()

    def nodes(self) -> set[int]:
        """Returns the SuperNodes that SuperLink calls online."""
        return set(self.grid.get_node_ids())

    def send(self, node: int, kind: str, packed: bytes) -> str:
        """Hands a message to SuperLink; raises `ConnectionError` if that does not take it."""
        message = Message(to_record(packed), dst_node_id=node, message_type=TYPES[kind])
        ids: list[Any] = list(self.grid.push_messages([message]))
        if not ids or not ids[0]:
            raise ConnectionError("SuperLink does not take the message")
        self._waiting.add(ids[0])
        return str(ids[0])

    def receive(self) -> list[Answer]:
        """Returns the answers that SuperLink has."""
        if not self._waiting:
            return []
        came = []
        for reply in self.grid.pull_messages(sorted(self._waiting)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in self._waiting:
                self._waiting.discard(message_id)
                came.append(_answer(message_id, reply))
        return came

    def forget(self, message_id: str) -> None:
        """Leaves the answers to a message where they are."""
        self._waiting.discard(message_id)


def _answer(message_id: str, reply: Message) -> Answer:
    if reply.has_error():
        return Answer(message_id, None, f"Flower's error {reply.error.code}, {reply.error.reason}")
    try:
        return Answer(message_id, from_record(reply.content))
    except ValueError as error:
        return Answer(message_id, None, str(error))
