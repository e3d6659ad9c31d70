"""Clients elsewhere: the engine of messages, its server and its nodes, and Flower as what carries the messages."""

from ..lazy_names import lazy_names


# What each name is of. A module is imported with the first of its names: only the last ones need Flower.
_MODULES = {
    "Answer": "link",
    "Link": "link",
    "Message": "messages",
    "MessageEngine": "message_engine",
    "MessageError": "messages",
    "Node": "node",
    "NodeTrainer": "node_trainer",
    "Roster": "roster",
    "ServerDataset": "server_dataset",
    "ServerTrainer": "server_trainer",
    "methods_table": "who_can_run",
    "make_node_trainer": "federation_file",
    "make_server_trainer": "federation_file",
    "why_not": "who_can_run",
    "FlowerLink": "flower_link",
    "client_app": "flower_apps",
    "server_app": "flower_apps",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
