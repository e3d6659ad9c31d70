"""Clients elsewhere: the engine of messages, its server and its nodes, and Flower as what carries the messages."""

from .link import Answer, Link
from .message_engine import MessageEngine
from .messages import Message, MessageError
from .node import Node
from .node_trainer import NodeTrainer
from .roster import Roster
from .server_dataset import ServerDataset
from .server_trainer import ServerTrainer
from .who_can_run import why_not


__all__ = [
    "Answer",
    "Link",
    "Message",
    "MessageEngine",
    "MessageError",
    "Node",
    "NodeTrainer",
    "Roster",
    "ServerDataset",
    "ServerTrainer",
    "why_not",
]
