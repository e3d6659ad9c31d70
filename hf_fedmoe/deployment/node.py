"""A node: answers the server's messages by training the client whose rows are here."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..federation import ClientTask, soundness
from ..federation.filters import Filter, Ranks
from ..federation.local_updates import OPTIMIZER_PREFIX
from ..weights import Payload
from .messages import Message, MessageError
from .node_store import NodeStore, identity_of
from .node_tests import served_tensors, write_served_
from .node_trainer import NodeTrainer
from .travel import BESIDE, INTEGERS, frozen_digest, layout_digest, part, payload_tensors, tensor_digests, write_row_


logger = logging.get_logger(__name__)


class Node:
    """
    One client, where its rows are.

    Args:
        folder (`Path`): Its own: what stays with the client, and by what the node is known again.
        make_trainer (`Callable`): From the server's settings to the client's trainer.
        client (`int`, *optional*): Its number, if it is configured.
    """

    def __init__(
        self, folder: str | Path, make_trainer: Callable[[dict[str, Any]], NodeTrainer], client: int | None = None
    ):
        self.folder, self.make_trainer, self.client = Path(folder), make_trainer, client
        self._made: tuple[str, TrainedClient] | None = None

    def answer(self, message: Message) -> Message:
        """Answers the server; whatever goes wrong here is told to it in words."""
        try:
            client = self.trained_client(message.facts)
            if message.kind == "hello":
                return client.introduce(self.client)
            if message.kind == "train":
                return client.train(message)
            if message.kind == "test":
                return client.test(message)
            raise MessageError(f"there is no message {message.kind!r}")
        except Exception as error:  # the server goes on without this client, and says why
            logger.warning("A message could not be answered.", exc_info=error)
            return Message("failed", {"fault": f"{type(error).__name__}: {error}"})

    def trained_client(self, facts: dict[str, Any]) -> "TrainedClient":
        """Returns the client of a run, made when it is asked for first, and again of other settings."""
        run = str(facts["run"])
        if not run.isalnum():  # it becomes the name of a folder
            raise MessageError(f"the run is called {run!r}, where letters and digits are due")
        made_of = json.dumps([run, facts["settings"]])
        if self._made is None or self._made[0] != made_of:
            trainer = self.make_trainer(facts["settings"])
            self._made = made_of, TrainedClient(trainer, NodeStore(self.folder, run), identity_of(self.folder))
        return self._made[1]


class TrainedClient:
    """
    The client of one run.

    Args:
        trainer ([`NodeTrainer`]): Trains it.
        store ([`NodeStore`]): What stays with it.
        node (`str`): By what its node is known again.
    """

    def __init__(self, trainer: NodeTrainer, store: NodeStore, node: str):
        self.trainer, self.store, self.node = trainer, store, node
        self.federation = trainer.federation
        self.participants = self.federation.participants
        self.server, self.strategy = self.participants.server, self.participants.strategy
        self.layout = self.server.layout
        # A node of a smaller rank sends its adapters as they are: the server widens them.
        self.filters: list[Filter] = [each for each in self.participants.filters if not isinstance(each, Ranks)]

    @cached_property
    def start(self) -> dict[str, str]:
        """Hashes of the tensors with which the client begins."""
        return tensor_digests(self.server.bank_SP[0], self.layout, self.layout.sizes)

    def introduce(self, client: int | None) -> Message:
        """Says who this is, and by which model."""
        facts = {
            "node": self.node,
            "client": client,
            "num_examples": self.trainer.client_size,
            "layout": layout_digest(self.layout),
            "frozen": frozen_digest(self.server.worker),
            "start": self.start,
        }
        return Message("node", facts)

    def train(self, message: Message) -> Message:
        """Trains the client as it is asked, and returns its upload. What stays is on disk by then."""
        facts = message.facts
        client, round_index, rank = int(facts["client"]), int(facts["round"]), facts["rank"]
        self.trainer.state.global_step = round_index  # of schedules that span the rounds
        task = self.task(message, self.store.get(client, int(facts["accepted"]), int(facts["oldest"])))
        message.tensors.clear()  # the task has copies, and training needs the memory
        due = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (dtype, shape) in facts["due"].items()
        }
        local, names = self.federation.local_trainer, set(facts["names"])
        self.layout.blank_(task.out_P)
        with local.clock.client():
            payload, retained = soundness.upload_of(
                lambda task: self.strategy.train_client(local, task),
                task,
                self.strategy,
                local,
                self.server.bank_SP,
                due,
            )
        retained = self.participants.finish_upload(task, payload, retained, self.filters)
        if retained:
            self.store.put(client, round_index, {name: tensor.detach().cpu() for name, tensor in retained.items()})
        told: dict[str, Any] = {"client": client, "round": round_index}
        told |= {"num_examples": int(payload.num_examples), "metrics": dict(payload.metrics)}
        return Message("trained", told, payload_tensors(payload, self.layout, names, rank))

    def test(self, message: Message) -> Message:
        """Tests the server's model on the client's own test rows, and tells how many are right."""
        model, data = self.server.model, self.trainer.federated_dataset
        assert data is not None
        if not data.client_test_indices:
            raise MessageError("`client_test_share` is 0, and so there are no test rows")
        before = {name: tensor.clone() for name, tensor in served_tensors(model).items()}
        try:
            write_served_(model, message.tensors)
            (score,) = self.trainer.client_scores(self.federation)
        finally:
            write_served_(model, before)  # a client without a round begins with what was there
        correct = round(score.accuracy * score.test_size)
        told = {"client": int(message.facts["client"]), "test_size": score.test_size, "correct": correct}
        return Message("tested", told)

    def task(self, message: Message, kept: dict[str, Tensor]) -> ClientTask:
        """Makes the client's task of what came and of what it has kept."""
        facts, device = message.facts, self.server.bank_SP.device
        client = int(facts["client"])
        row_P = self.own_row(client, message, kept).to(device)
        write_row_(row_P, message.tensors, self.layout, facts["rank"])
        integers = self.server.integers[0] | part(message.tensors, INTEGERS)
        beside = {name: tensor.to(device, copy=True) for name, tensor in part(message.tensors, BESIDE).items()}
        optimizer = {name: kept.pop(name) for name in list(kept) if name.startswith(OPTIMIZER_PREFIX)}
        return ClientTask(
            client,
            int(facts["round"]),
            self.participants.client_data(0),
            Payload(row_P, {name: tensor.to(device, copy=True) for name, tensor in integers.items()}, tensors=beside),
            torch.zeros_like(row_P),
            int(facts["seed"]),
            kept,
            optimizer or None,
        )

    def own_row(self, client: int, message: Message, kept: dict[str, Tensor]) -> Tensor:
        """Returns the row whose private tensors are the client's own: of its last round, or of the common start."""
        if "row_P" in kept:
            return self.strategy.download(self.server, client, kept["row_P"]).clone()
        return self.server.bank_SP[0].clone()
