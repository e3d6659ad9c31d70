"""Between the app at a node and the client's own process: whoever asks may be killed at any byte."""

import struct
import threading
from multiprocessing.connection import Client, Listener
from types import SimpleNamespace

from hf_fedmoe.deployment import Message
from hf_fedmoe.deployment.relay import FAMILY, STOP, serve


def test_who_asks_may_die_at_any_byte_of_its_message(tmp_path):
    """The client goes on: a process that ended here would take its client out of the federation."""
    told, codes = [], []
    node = SimpleNamespace(answer=lambda message: told.append(message.kind) or Message("node"))
    supernode = SimpleNamespace(wait=lambda: ended.wait(30) and 3, poll=lambda: 3 if ended.is_set() else None)
    ended, socket = threading.Event(), str(tmp_path / "s")
    hello = Message("hello", {"run": "abc"}).pack()
    # A message of one piece and the empty one that ends it.
    whole = struct.pack("!i", len(hello)) + hello + struct.pack("!i", 0)
    with Listener(socket, FAMILY, backlog=16) as listener:
        serving = threading.Thread(target=lambda: codes.append(serve(node, socket, supernode, listener)), daemon=True)
        serving.start()
        for sent in (0, 2, 4, 20, len(whole) - 1):
            with Client(socket, FAMILY) as connection:
                connection._send(whole[:sent])
        with Client(socket, FAMILY) as connection:  # an empty message of a server, which ends nobody's client
            connection.send_bytes(STOP)
        with Client(socket, FAMILY) as connection:
            connection._send(whole)
        with Client(socket, FAMILY) as connection:  # gone before its answer, the next one is answered
            for piece in (hello[:8], hello[8:], STOP):
                connection.send_bytes(piece)
            assert connection.poll(10)
            assert Message.unpack(connection.recv_bytes()).kind == "node"
            assert connection.recv_bytes() == STOP
        ended.set()
        serving.join(30)
    assert told == ["hello", "hello"] and codes == [3] and STOP == b""
