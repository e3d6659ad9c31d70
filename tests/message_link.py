"""A link of bytes in one process: nodes answer when the server looks for answers."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.deployment import Answer, Message, Node, NodeTrainer, ServerDataset, ServerTrainer
from tests.every_method import LORA_RUNS, RUNS, lora
from tests.tiny_federation import tiny_args, tiny_federation


class MessageLink:
    """
    Carries messages as bytes, to be answered by functions.

    Args:
        answers (`dict[int, Callable]`): Of each node that is connected, from bytes to bytes, or to `None`: no answer.
    """

    pause = 0.0

    def __init__(self, answers: dict[int, Callable[[bytes], bytes | None]]):
        self.answers = answers
        self.waiting: dict[str, tuple[int, bytes]] = {}
        self.sent = 0
        self.bytes_down = self.bytes_up = 0

    def nodes(self) -> set[int]:
        return set(self.answers)

    def send(self, node: int, kind: str, pieces: Iterable[bytes]) -> str:
        if node not in self.answers:
            raise ConnectionError(f"node {node} is gone")
        self.sent += 1
        packed = b"".join(pieces)
        self.bytes_down += len(packed)
        self.waiting[str(self.sent)] = node, packed
        return str(self.sent)

    def receive(self) -> list[Answer]:
        came = []
        for message_id, (node, packed) in list(self.waiting.items()):
            if node not in self.answers:
                continue
            answer = self.answers[node](packed)
            if answer is not None:
                self.bytes_up += len(answer)
                del self.waiting[message_id]
                came.append(Answer(message_id, answer))
        return came

    def forget(self, message_id: str) -> None:
        self.waiting.pop(message_id, None)


def answering(node: Node) -> Callable[[bytes], bytes]:
    return lambda packed: node.answer(Message.unpack(packed)).pack()


def tiny_node(
    folder: Path, name: str, client: int, data: FederatedDataset, test_share: float = 0.0, **changes: Any
) -> Node:
    """A node with the rows of a client of `data`, for one of `RUNS` or `LORA_RUNS`."""
    method = (RUNS | LORA_RUNS)[name]

    def make_trainer(settings: dict[str, Any]) -> NodeTrainer:
        args = tiny_args(folder / "trainer", **method.resumed | changes)
        own = {
            "peft_config": lora() if name in LORA_RUNS and method.adapters else None,
            "client_test_share": test_share,
        }
        return NodeTrainer(method.model(), args, data.client(client), method.strategy(), **own)

    return Node(folder, make_trainer, client)


def tiny_server(folder: Path, name: str, link: MessageLink, data: FederatedDataset, **changes: Any) -> ServerTrainer:
    """The server of those nodes."""
    method = (RUNS | LORA_RUNS)[name]
    limits = ("min_clients", "round_timeout", "client_test_share")
    own = {key: changes.pop(key) for key in limits if key in changes}
    rows = ServerDataset(data.num_clients, data.reserved, data.validation)
    args = tiny_args(folder, **method.resumed | changes)
    peft_config = lora() if name in LORA_RUNS and method.adapters else None
    return ServerTrainer(method.model(), args, rows, link, strategy=method.strategy(), peft_config=peft_config, **own)


def tiny_run(
    folder: Path, name: str, data: FederatedDataset | None = None, test_share: float = 0.0, **changes: Any
) -> ServerTrainer:
    """A finished run of one of `RUNS` or `LORA_RUNS` over messages, a node for each client."""
    data = data or tiny_federation()
    own = {key: value for key, value in changes.items() if key not in ("min_clients", "round_timeout")}
    nodes = [
        tiny_node(folder / f"node{client}", name, client, data, test_share, **own)
        for client in range(data.num_clients)
    ]
    link = MessageLink({100 + client: answering(node) for client, node in enumerate(nodes)})
    server = tiny_server(folder / "server", name, link, data, **{"min_clients": data.num_clients} | changes)
    server.train()
    return server
