"""Apps of Flower's: a `ServerApp` that runs a `ServerTrainer`, and a `ClientApp` that is a `Node`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.counted import counted
from .flower_link import FlowerLink, from_record, to_record
from .link import Link
from .messages import Message, MessageError
from .node import Node
from .node_trainer import NodeTrainer
from .server_trainer import ServerTrainer


logger = logging.get_logger(__name__)

# From a link and Flower's context to the server's trainer.
MakeServer = Callable[[Link, Context], ServerTrainer]
# From the settings that the server sent and Flower's context to the client's trainer.
MakeClient = Callable[[dict[str, Any], Context], NodeTrainer]


def server_app(make_trainer: MakeServer) -> ServerApp:
    """
    A Flower app for the server: trains, going on from the last checkpoint in `output_dir` if there is one, and saves
    the model there with its card and its log.

    Args:
        make_trainer (`Callable`): From a [`Link`] and Flower's `Context` to a [`ServerTrainer`].
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        trainer = make_trainer(FlowerLink(grid), context)
        folder = Path(str(trainer.args.output_dir))
        trainer.goes_on_by = "the same server, started again,"
        started = folder.is_dir() and get_last_checkpoint(str(folder))
        trainer.train(resume_from_checkpoint=started or None)
        trainer.save_model()
        if trainer.client_test_share:
            _print_client_tests(trainer)
        trainer.save_state()
        trainer.create_model_card()

    return app


def _print_client_tests(trainer: ServerTrainer) -> None:
    """Prints how well clients are served; whatever goes wrong, the model is there."""
    try:
        found = trainer.evaluate_clients()
    except RuntimeError as error:
        logger.warning(f"Clients' own test rows are left out. {error}")
        return
    print(
        f"{counted(int(found['clients_tested']), 'client')} tested on own rows: accuracy "
        f"{found['clients_accuracy']:.3f}, bottom decile {found['clients_bottom_decile']:.3f}, worst "
        f"{found['clients_worst']:.3f}"
    )


def client_app(make_trainer: MakeClient) -> ClientApp:
    """
    A Flower app for a node: its `--node-config` has `folder`, where what stays with the client lies, and may have
    `client`, its number.

    Args:
        make_trainer (`Callable`): From the settings that the server sent and Flower's `Context` to a [`NodeTrainer`].
    """
    app = ClientApp()

    def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
        config = context.node_config
        if "folder" not in config:
            raise ValueError('`folder` is missing in --node-config: name a folder of this node alone, folder="...".')
        client = config.get("client")
        node = Node(
            str(config["folder"]),
            partial(_with_context, make_trainer, context),
            None if client is None else int(client),
        )
        try:
            asked = Message.unpack(from_record(message.content))
        except (MessageError, ValueError) as error:
            answered = Message("failed", {"fault": str(error)})
        else:
            answered = node.answer(asked)
        return FlowerMessage(to_record(answered.pieces()), reply_to=message)

    app.query()(answer)
    app.train()(answer)
    app.evaluate()(answer)
    return app


def _with_context(make_trainer: MakeClient, context: Context, settings: dict[str, Any]) -> NodeTrainer:
    return make_trainer(settings, context)
