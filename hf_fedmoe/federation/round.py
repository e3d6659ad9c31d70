"""One round: draw, send, train, receive, check, update the server, synchronise.

Shape suffixes: m participants, P elements of a model's row.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from ..data import ReservedSet
from ..strategies import ClientTask, Server, Strategy, Uploads
from ..weights import Codec, Payload, bytes_at_rank, compress_upload, fit_rank_, keep_private_, payload_fault
from .client_choice import CLIENT_CHOICES
from .client_store import ClientStore
from .local_training import OPTIMIZER_PREFIX, LocalTrainer
from .randomness import Stream, seed_of


logger = logging.get_logger(__name__)


@dataclass
class RoundReport:
    """
    What happened in a round.

    Args:
        clients (`list[int]`): Who took part.
        num_examples (`int`): Training examples of those whose upload was accepted.
        loss (`float`): Mean local training loss, weighted by examples.
        bytes_down (`int`), bytes_up (`int`): Communication with all participants.
        seconds (`dict[str, float]`): By stage: `clients`, `server`, `synchronise`.
        metrics (`dict[str, float]`): What the strategy reports.
        refused (`dict[int, str]`): Clients whose training failed or whose upload was refused, and why.
    """

    clients: list[int]
    num_examples: int = 0
    loss: float = float("nan")
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass
class Federation:
    """
    Everything a round works on.

    Args:
        server ([`~strategies.Server`]): Changed by every round.
        strategy ([`~strategies.Strategy`]): The method.
        local_trainer ([`LocalTrainer`]): Trains the clients.
        num_clients (`int`): M.
        client_data (`Callable`): From a client's number to its examples; only participants are asked for theirs.
        store ([`ClientStore`]): What stays with them.
        reserved ([`~data.ReservedSet`], *optional*): The server's own set.
        seed (`int`): Of everything random but the draw of clients.
        draw_seed (`int`): Of the draw of clients.
        keep_optimizer (`bool`): Whether each client keeps its optimizer state.
        client_choice (`str`, *optional*, defaults to `"uniform"`): How participants are drawn, a name in
            `CLIENT_CHOICES`.
        codec ([`~weights.Codec`], *optional*): How uploads are compressed.
        client_ranks (`list[int]`, *optional*): Ranks of the clients' LoRA adapters, over and over; all that of the
            server's if left out.
    """

    server: Server
    strategy: Strategy
    local_trainer: LocalTrainer
    num_clients: int
    client_data: Callable[[int], Subset]
    store: ClientStore
    reserved: ReservedSet | None
    seed: int
    draw_seed: int
    keep_optimizer: bool = False
    client_choice: str = "uniform"
    codec: Codec | None = None
    client_ranks: list[int] | None = None

    def draw(self, round_index: int, clients_per_round: int) -> list[int]:
        """The participants of a round."""
        rng = np.random.default_rng(seed_of(self.draw_seed, Stream.CLIENT_DRAW, round_index))
        return CLIENT_CHOICES[self.client_choice](self.num_clients, clients_per_round, rng)

    def run_round(
        self, round_index: int, clients_per_round: int, on_client: Callable[[int], None] | None = None
    ) -> RoundReport:
        """Runs round `round_index` (from 0); `on_client` is called after each client."""
        server, layout, started = self.server, self.server.layout, time.perf_counter()
        chosen = self.strategy.participants(server, self.draw(round_index, clients_per_round), round_index)
        report = RoundReport(chosen)
        rows_mP = torch.zeros(len(chosen), layout.size, dtype=layout.dtype, device=server.bank_SP.device)
        accepted: dict[int, tuple[int, Payload]] = {}
        stays: dict[int, dict[str, Tensor]] = {}
        shared = self.strategy.shared(server, round_index)
        for place, client in enumerate(chosen):
            links = self.strategy.links(server, client, chosen)
            task = None
            try:
                task = self.task(client, round_index, rows_mP[place])
                payload, stays[client] = self._train_client(task)
                fault = payload_fault(payload, layout)
            except Exception as error:  # whatever breaks on one client must not break the federation
                fault = f"{type(error).__name__}: {error}"
                logger.warning(f"Client {client} failed in round {round_index + 1}.", exc_info=error)
            if task is not None:
                report.bytes_down += links * task.received_bytes
            if fault is None:
                accepted[client] = (place, payload)
                report.bytes_up += links * payload.num_bytes(layout, shared)
            else:
                report.refused[client] = fault
                logger.warning(f"Round {round_index + 1} goes on without client {client}: {fault}.")
            if on_client is not None:
                on_client(client)
        if not accepted:
            reasons = "; ".join(f"client {client}: {fault}" for client, fault in report.refused.items())
            raise RuntimeError(f"No client of round {round_index + 1} sent a sound model. {reasons}")
        places, payloads = zip(*accepted.values(), strict=True)
        num_examples = [payload.num_examples for payload in payloads]
        uploads = Uploads(
            list(accepted),
            rows_mP if len(places) == len(chosen) else rows_mP[list(places)],
            [payload.integers for payload in payloads],
            torch.tensor(num_examples, dtype=torch.float32, device=rows_mP.device),
            [payload.metrics for payload in payloads],
        )
        report.num_examples = sum(num_examples)
        report.loss = float(np.average([payload.metrics["loss"] for payload in payloads], weights=num_examples))
        report.seconds["clients"] = time.perf_counter() - started
        started = time.perf_counter()
        report.metrics = self.strategy.update(
            server, uploads, self.reserved, round_index, seed_of(self.seed, Stream.SERVER, round_index)
        )
        # The bank is the model's own memory, but for these.
        if layout.integers:
            for module, taken in zip(self.strategy.server_models(server.model), server.integers, strict=True):
                layout.write_integers(taken, module)
        report.seconds["server"] = time.perf_counter() - started
        started = time.perf_counter()
        rows = self.strategy.synchronise(server, uploads)
        for client in uploads.clients:
            tensors = stays[client] | ({"row_P": rows[client]} if client in rows else {})
            if tensors:
                self.store.put(client, tensors)
        report.seconds["synchronise"] = time.perf_counter() - started
        return report

    def _train_client(self, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        """The upload, its row written to `task.out_P`, and what stays with the client if the upload is accepted."""
        payload, stays = self.strategy.train_client(self.local_trainer, task)
        shared = self.strategy.shared(self.server, task.round_index)
        if payload.row_bytes is None:
            payload.row_bytes = self._row_bytes(task.client, shared)
        for name, tensor in stays.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"`{name}`, which it would keep, holds values that are not finite")
        if self.keep_optimizer:
            stays |= self.local_trainer.optimizer_tensors()
        if shared is not None:
            known = Payload(self.server.bank_SP[0], self.server.integers[0])
            keep_private_(payload, known, self.server.layout, shared)
        residual_U = task.kept.get("residual_U")
        if self.codec is not None and (shared is None or shared):
            payload.row_bytes, residual_U = compress_upload(
                self.codec, self.server.layout, task.out_P, task.received_P, residual_U, shared
            )
        if residual_U is not None:
            stays["residual_U"] = residual_U
        return payload, stays

    def task(self, client: int, round_index: int, out_P: Tensor) -> ClientTask:
        """What a client has at hand in a round, for an upload to `out_P`."""
        kept = self.store.get(client)
        received_P = self.strategy.download(self.server, client, kept.get("row_P")).to(out_P.device)
        if self.server.layout.lora:
            received_P = received_P.clone()
            seed = seed_of(self.seed, Stream.ADAPTER_START, round_index, client)
            fit_rank_(received_P, self.server.layout, self._rank(client), seed)
        shared = self.strategy.shared(self.server, round_index)
        sent = Payload(received_P, self.server.integers[0], row_bytes=self._row_bytes(client, shared))
        optimizer = {name: kept.pop(name) for name in list(kept) if name.startswith(OPTIMIZER_PREFIX)}
        return ClientTask(
            client,
            round_index,
            self.client_data(client),
            received_P,
            self.server.integers[0],
            out_P,
            seed_of(self.seed, Stream.LOCAL_TRAINING, round_index, client),
            kept,
            optimizer or None,
            sent.num_bytes(self.server.layout, shared),
        )

    def personal_model(self, client: int, data: Dataset | None = None) -> nn.Module:
        """
        The model that is evaluated for a client; what it trains for that is forgotten again. `data` are the examples
        of one that the federation does not know.
        """
        server, row_P = self.server, self.server.bank_SP[0]
        kept = {name: t for name, t in self.store.get(client).items() if not name.startswith(OPTIMIZER_PREFIX)}
        seed = seed_of(self.seed, Stream.CLIENT_EVALUATION, client)
        data = self.client_data(client) if data is None else data
        task = ClientTask(client, 0, data, row_P, server.integers[0], torch.zeros_like(row_P), seed, kept)
        return self.strategy.personal_model(server, self.local_trainer, task)

    def _rank(self, client: int) -> int | None:
        """The rank of a client's adapters, `None` for that of the server's."""
        return None if self.client_ranks is None else self.client_ranks[client % len(self.client_ranks)]

    def _row_bytes(self, client: int, shared: Collection[str] | None) -> int | None:
        """Bytes of a row to or from a client of a smaller rank."""
        rank = self._rank(client)
        return None if rank is None else bytes_at_rank(self.server.layout, rank, shared)
