"""Flower as a link: messages go by its Message API, from a `Grid` to SuperNodes."""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from transformers.utils import logging

from .link import Answer


logger = logging.get_logger(__name__)

# Our message in one of Flower's: the bytes of a file of safetensors, which Flower never reads, in pieces by their
# numbers. Flower puts an array together from its chunks in two more copies of it: no array is long.
RECORD = "hf_fedmoe"
SERIALISATION = "safetensors"
# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TYPES = {"hello": MessageType.QUERY, "train": MessageType.TRAIN, "test": MessageType.EVALUATE}


def to_record(pieces: Iterable[bytes]) -> RecordDict:
    """Puts the pieces of a message into a record of Flower's."""
    record = ArrayRecord()
    for place, data in enumerate(pieces):
        record[str(place)] = Array(dtype="uint8", shape=(len(data),), stype=SERIALISATION, data=data)
    return RecordDict({RECORD: record})


def from_record(record: RecordDict) -> bytearray:
    """Takes a message out of a record of Flower's, which is empty then; raises `ValueError` if it is none of ours."""
    # Not by `record.array_records`: its view makes a cycle, which keeps the bytes until garbage is collected.
    found = record.get(RECORD)
    names = [str(place) for place in range(len(found or ()))]
    if not isinstance(found, ArrayRecord) or found.keys() != set(names):
        raise ValueError("the record holds no message of hf_fedmoe")
    packed = bytearray()
    for name in names:
        piece = found.pop(name)  # whose memory is free before the next one's is taken
        if piece.stype != SERIALISATION:
            raise ValueError(f"the record holds an array as {piece.stype!r}, where {SERIALISATION!r} is due")
        packed += piece.data
    return packed


class FlowerLink:
    """
    A link by Flower.

    Args:
        grid (`flwr.serverapp.Grid`): Of a `ServerApp`.
    """

    pause = 0.5

    def __init__(self, grid: Grid):
        self.grid = grid
        self._waiting: dict[str, None] = {}  # in the order in which they were sent

    def nodes(self) -> set[int]:
        """Returns the SuperNodes that SuperLink calls online."""
        return set(self.grid.get_node_ids())

    def send(self, node: int, kind: str, pieces: Iterable[bytes]) -> str:
        """Hands a message to SuperLink; raises `ConnectionError` if that does not take it."""
        with _chunks_given_back():
            message = Message(to_record(pieces), dst_node_id=node, message_type=TYPES[kind])
            ids: list[Any] = list(self.grid.push_messages([message]))
        if not ids or not ids[0]:
            raise ConnectionError("SuperLink does not take the message")
        self._waiting[ids[0]] = None
        return str(ids[0])

    def receive(self) -> Iterator[Answer]:
        """
        Gives the answers that SuperLink has, in the order of the messages. Each is pulled when the one before has been
        dealt with: Flower needs twice the memory of an answer while it puts its chunks together.
        """
        for message_id in list(self._waiting):
            if message_id in self._waiting:  # it may have been forgotten meanwhile
                came = self._pull(message_id)
                while came:
                    yield came.pop()  # which nothing here holds any more

    def _pull(self, message_id: str) -> list[Answer]:
        """Returns the answer to a message if it has come. Nothing of Flower's that holds its bytes is left behind."""
        with _chunks_given_back():
            came = [_answer(message_id, reply) for reply in self.grid.pull_messages([message_id])]
        if came:
            self.forget(message_id)
        return came

    def forget(self, message_id: str) -> None:
        """Leaves the answers to a message where they are."""
        self._waiting.pop(message_id, None)


def _answer(message_id: str, reply: Message) -> Answer:
    if reply.has_error():
        return Answer(message_id, None, f"Flower's error {reply.error.code}, {reply.error.reason}")
    try:
        return Answer(message_id, from_record(reply.content))
    except ValueError as error:
        return Answer(message_id, None, str(error), lost=False)


@contextmanager
def _chunks_given_back() -> Iterator[None]:
    """
    Has chunks of Flower's, of 5 MB, go back to the system when they are freed (glibc): they come and go in threads,
    and leave holes as large as a model otherwise. Afterwards memory is kept for what computes, as glibc itself does
    once it has seen large blocks.
    """
    mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else lambda name, value: 0
    mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
