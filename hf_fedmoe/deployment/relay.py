"""
From Flower's app at a node to the process of `hf-fedmoe client`: Flower starts a process for each message, and a model
would be loaded anew in each. A message goes through a socket of this machine, which only its user can open, in pieces
and an empty one.
"""

import subprocess
import threading
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from .messages import Message, MessageError
from .node import Node


FAMILY = "AF_UNIX"
# Ends a message. One of no pieces says that nobody will ask any more, if SuperNode has ended: a server can send it
# too.
STOP = b""


def serve(node: Node, socket: Path, supernode: subprocess.Popen, listener: Listener) -> int:
    """Answers what comes through a socket, in this thread, until SuperNode ends; returns that one's code."""
    threading.Thread(target=_stop_with, args=(supernode, socket), daemon=True).start()
    while True:
        with listener.accept() as connection:
            if not _answer(node, connection) and (code := supernode.poll()) is not None:
                return code


def _answer(node: Node, connection: Connection) -> bool:
    """Answers one message; tells whether it was one."""
    packed = bytearray()
    try:
        while piece := connection.recv_bytes():
            packed += piece
    except (EOFError, OSError):  # whoever asked has gone, before its message or amid it
        return True
    if not packed:
        return False
    try:
        message = Message.unpack(packed)
        del packed  # training needs the memory
        answer = node.answer(message)
    except MessageError as error:
        answer = Message("failed", {"fault": str(error)})
    with suppress(OSError):  # gone meanwhile; the server will ask again
        for piece in answer.pieces():
            connection.send_bytes(piece)
        connection.send_bytes(STOP)
    return True


def _stop_with(supernode: subprocess.Popen, socket: Path) -> None:
    supernode.wait()
    with Client(str(socket), FAMILY) as connection:
        connection.send_bytes(STOP)
