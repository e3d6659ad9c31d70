"""The interface of a transport, which is all that the engine of messages knows of it."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    """
    The answer to a message, or why there is none.

    Args:
        message_id (`str`): Of the message that it answers.
        packed (`bytes`, *optional*): The answer, `None` if there will be none. A `bytearray` is read without a copy.
        fault (`str`, *optional*): Why there will be none.
        lost (`bool`, *optional*, defaults to `True`): Whether another try may bring it; not where the node itself has
            sent what is no answer.
    """

    message_id: str
    packed: bytes | bytearray | None
    fault: str | None = None
    lost: bool = True


class Link(Protocol):
    """The server's end of a transport. Nodes are known by numbers that it gives them while they are connected."""

    pause: float
    """Seconds between two looks for answers."""

    def nodes(self) -> set[int]:
        """Returns the nodes that are connected now."""

    def send(self, node: int, kind: str, pieces: Iterable[bytes]) -> str:
        """
        Sends a message of a kind (`"hello"`, `"train"` or `"test"`), whose bytes come in pieces, and returns its id at
        once. Raises `ConnectionError` if the node is gone.
        """

    def receive(self) -> Iterable[Answer]:
        """Gives the answers that have come since the last call, one by one, without waiting for any."""

    def forget(self, message_id: str) -> None:
        """Answers to a message are not waited for any more."""
