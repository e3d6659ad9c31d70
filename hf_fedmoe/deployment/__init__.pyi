"""The names of `_MODULES`, for type checkers, which do not run `__getattr__`."""

from .federation_file import make_node_trainer as make_node_trainer
from .federation_file import make_server_trainer as make_server_trainer
from .flower_apps import client_app as client_app
from .flower_apps import server_app as server_app
from .flower_link import FlowerLink as FlowerLink
from .link import Answer as Answer
from .link import Link as Link
from .message_engine import MessageEngine as MessageEngine
from .messages import Message as Message
from .messages import MessageError as MessageError
from .node import Node as Node
from .node_trainer import NodeTrainer as NodeTrainer
from .roster import Roster as Roster
from .server_dataset import ServerDataset as ServerDataset
from .server_trainer import ServerTrainer as ServerTrainer
from .who_can_run import methods_table as methods_table
from .who_can_run import why_not as why_not
