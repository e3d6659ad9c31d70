"""The participants of a round at work: training, probing, and what each upload costs and leaves behind.

Shape suffixes: m participants, P elements of a model's row.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers.utils import logging

from ..data import ReservedSet
from ..weights import Payload, all_finite, in_one_copy
from . import soundness
from .client_store import ClientStore
from .contract import ClientTask, Server, Strategy, has_plain_clients
from .filters import Filter
from .local_training import LocalTrainer, Reading
from .local_updates import OPTIMIZER_PREFIX
from .process_group import LeftAloneError
from .randomness import Stream, seed_of
from .refusals import client_number


logger = logging.get_logger(__name__)

# From a task to the upload and what stays with the client, as [`Strategy.train_client`].
Fit = Callable[[ClientTask], tuple[Payload, dict[str, Tensor]]]


@dataclass
class Reply:
    """
    A participant's answer to the server, besides its row.

    Args:
        received_bytes (`int`, *optional*), sent_bytes (`int`, *optional*): Of one exchange.
        integers (`dict[str, Tensor]`, *optional*): Integer buffers, on the CPU.
        num_examples (`int`, *optional*): Its training examples.
        metrics (`dict[str, float]`, *optional*): What it reports.
        tensors (`dict[str, Tensor]`, *optional*): What it sends beside its model, until they are collected.
        fault (`str`, *optional*): Why its training failed or its upload is refused.
        probed (`Tensor`, *optional*): What the server asked of its upload, on the CPU.
    """

    received_bytes: int = 0
    sent_bytes: int = 0
    integers: dict[str, Tensor] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fault: str | None = None
    probed: Tensor | None = None


@dataclass
class Participants:
    """
    The clients of a federation at work, one at a time or some at once, in this process.

    Args:
        server ([`Server`]): As the last round left it.
        strategy ([`Strategy`]): The method.
        local_trainer ([`LocalTrainer`]): Trains them.
        client_data (`Callable`): From a client's number to its examples.
        store ([`ClientStore`]): What stays with them.
        reserved ([`~data.ReservedSet`], *optional*): The server's own set.
        seed (`int`): Of their training.
        client_sizes (`Sequence[int]`): Examples of each.
        filters (`list[Filter]`): Through which payloads go, see [`make_filters`].
        keep_optimizer (`bool`, *optional*, defaults to `False`): Whether each keeps its optimizer state.
        client_name (`Callable`, *optional*): From a client's number to what messages call it.
    """

    server: Server
    strategy: Strategy
    local_trainer: LocalTrainer
    client_data: Callable[[int], Subset]
    store: ClientStore
    reserved: ReservedSet | None
    seed: int
    client_sizes: Sequence[int]
    filters: list[Filter]
    keep_optimizer: bool = False
    client_name: Callable[[int], str] = client_number

    def train(
        self,
        client: int,
        round_index: int,
        out_P: Tensor,
        trained: tuple[ClientTask, Payload] | None = None,
        fit: Fit | None = None,
    ) -> tuple[Reply, dict[str, Tensor]]:
        """
        Returns a participant's reply, its row written to `out_P`, and what stays with it if the upload is accepted.

        Args:
            client (`int`), round_index (`int`): Who, and when.
            out_P (`Tensor` of shape `[P]`): Where its model goes.
            trained (`tuple[ClientTask, Payload]`, *optional*): What there is of one that has been trained already.
            fit (`Callable`, *optional*): Trains it, [`Strategy.train_client`] if left out.
        """
        reply, task = Reply(), None
        retained: dict[str, Tensor] = {}
        fit = fit or (lambda task: self.strategy.train_client(self.local_trainer, task))
        try:
            with self.local_trainer.process_group.client():
                if trained is None:
                    task = self.task(client, round_index, out_P)
                    with self.local_trainer.clock.client():
                        due = soundness.tensors_due(self.strategy, self.server, client)
                        payload, retained = soundness.upload_of(
                            fit, task, self.strategy, self.local_trainer, self.server.bank_SP, due
                        )
                else:
                    task, payload = trained
                retained = self.finish_upload(task, payload, retained, self.filters)
                reply.fault = soundness.upload_fault(
                    self.strategy, self.server, task, payload, self.client_sizes[client]
                )
        except LeftAloneError as error:
            reply.fault = str(error)
        except soundness.BrokenPromiseError:
            raise
        except Exception as error:  # whatever breaks on one client must not break the federation
            reply.fault = f"{type(error).__name__}: {error}"
            logger.warning(f"Round {round_index + 1}: {self.client_name(client)} failed.", exc_info=error)
        if task is not None:
            reply.received_bytes = task.received.num_bytes
        if reply.fault is None:
            reply.sent_bytes, reply.tensors = payload.num_bytes, payload.tensors
            reply.integers = in_one_copy(payload.integers, "cpu")
            reply.num_examples, reply.metrics = payload.num_examples, payload.metrics
        return reply, retained

    def train_at_once(
        self, rows: dict[int, Tensor], round_index: int, train: Callable[[Sequence[ClientTask]], list[Payload]]
    ) -> dict[int, tuple[ClientTask, Payload]]:
        """Has the participants of a group, whose rows are given, trained together; nobody if that fails."""
        try:
            tasks = [self.task(client, round_index, out_P) for client, out_P in rows.items()]
            with self.local_trainer.clock.client(len(tasks)):
                payloads = train(tasks)
        except Exception as error:  # each is trained by itself, where only those fail that have to
            logger.warning(
                f"These cannot be trained at once and are trained alone: {', '.join(map(self.client_name, rows))}.",
                exc_info=error,
            )
            return {}
        return {task.client: (task, payload) for task, payload in zip(tasks, payloads, strict=True)}

    def probe(self, reply: Reply, row_P: Tensor) -> None:
        """Puts what the server asks of a sound upload into its reply."""
        if reply.fault is None:
            reply.probed = soundness.probe_of(self.strategy, self.server, row_P, self.reserved)
            if reply.probed is not None and not all_finite([reply.probed]):
                reply.fault = "what its model computes of the reserved set is not finite"

    def finish_upload(
        self, task: ClientTask, payload: Payload, retained: dict[str, Tensor], filters: Sequence[Filter]
    ) -> dict[str, Tensor]:
        """Makes a trained client's payload what travels, and returns all that stays with the client."""
        for name, tensor in retained.items():
            if not all_finite([tensor]):
                raise ValueError(f"`{name}`, which it would keep, holds values that are not finite")
        if self.keep_optimizer:
            retained |= self.local_trainer.optimizer_tensors()
        if not payload.sizes:
            payload.weigh(self.server.layout)
        for filter in filters:
            retained |= filter.upload(payload, task)
        return retained

    def read_ahead(
        self, groups: list[list[int]], round_index: int, reading: Callable[[Sequence[tuple[Subset, int]]], Reading]
    ) -> None:
        """Has worker processes, if there are any, begin to read what these groups of participants will train on."""
        if has_plain_clients(self.strategy):
            seeds = {client: self._training_seed(client, round_index) for clients in groups for client in clients}
            with suppress(Exception):  # what fails here fails again when its client trains, and counts there
                self.local_trainer.read_ahead(
                    reading([(self.client_data(client), seeds[client]) for client in clients]) for clients in groups
                )

    def _training_seed(self, client: int, round_index: int) -> int:
        return seed_of(self.seed, Stream.LOCAL_TRAINING, round_index, client)

    def task(self, client: int, round_index: int, out_P: Tensor) -> ClientTask:
        """Returns what a client has at hand in a round, for an upload to `out_P`."""
        kept = self.store.get(client)
        row_P = soundness.download_of(self.strategy, self.server, client, kept.get("row_P"))
        tensors = soundness.tensors_for(self.strategy, self.server, client)
        sent = Payload(row_P.to(out_P.device), self.server.integers[0])
        sent.tensors = {name: tensor.to(out_P.device) for name, tensor in tensors.items()}
        sent.weigh(self.server.layout)
        for filter in self.filters:
            filter.download(sent, client, round_index)
        optimizer = {name: kept.pop(name) for name in list(kept) if name.startswith(OPTIMIZER_PREFIX)}
        return ClientTask(
            client,
            round_index,
            self.client_data(client),
            sent,
            out_P,
            self._training_seed(client, round_index),
            kept,
            optimizer or None,
        )

    def personal_model(self, client: int, data: Subset | None = None) -> nn.Module:
        """
        The model that is evaluated for a client; what it trains for that is forgotten again. `data` are the examples
        of one that the federation does not know.
        """
        server, row_P = self.server, self.server.bank_SP[0]
        kept = {name: t for name, t in self.store.get(client).items() if not name.startswith(OPTIMIZER_PREFIX)}
        seed = seed_of(self.seed, Stream.CLIENT_EVALUATION, client)
        data = self.client_data(client) if data is None else data
        received = Payload(row_P, server.integers[0], tensors=soundness.tensors_for(self.strategy, server, client))
        task = ClientTask(client, 0, data, received, torch.zeros_like(row_P), seed, kept)
        return self.strategy.personal_model(server, self.local_trainer, task)
