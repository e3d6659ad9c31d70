"""One round: draw, send, train, receive, check, probe, update the server, synchronise.

Shape suffixes: m participants, P elements of a model's row.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from ..data import ReservedSet
from ..weights import (
    Codec,
    Payload,
    add_to_sum_,
    all_finite,
    bytes_at_rank,
    compress_upload,
    fit_rank_,
    keep_private_,
    mean_of_sum_,
    widen_rank_,
)
from . import soundness
from .client_choice import CLIENT_CHOICES
from .client_store import ClientStore
from .contract import ClientTask, Server, Strategy, Uploads, has_plain_clients
from .local_training import OPTIMIZER_PREFIX, LocalTrainer
from .processes import Processes, balance
from .randomness import Stream, seed_of
from .refusals import client_number, reasons
from .server_step import take_step
from .team import LeftAloneError


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
class Reply:
    """
    What the server hears of a participant besides its row.

    Args:
        received_bytes (`int`, *optional*), sent_bytes (`int`, *optional*): Of one exchange.
        integers (`dict[str, Tensor]`, *optional*): Integer buffers, on the CPU.
        num_examples (`int`, *optional*): Its training examples.
        metrics (`dict[str, float]`, *optional*): What it reports.
        fault (`str`, *optional*): Why its training failed or its upload is refused.
        probed (`Tensor`, *optional*): What the server asked of its upload, on the CPU.
    """

    received_bytes: int = 0
    sent_bytes: int = 0
    integers: dict[str, Tensor] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    probed: Tensor | None = None


@dataclass
class Federation:
    """
    Everything a round works on.

    Args:
        server ([`Server`]): Changed by every round.
        strategy ([`Strategy`]): The method.
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
        client_sizes (`Sequence[int]`): Examples of each client, by which processes share a round's clients out.
        processes ([`Processes`], *optional*): Of the launch; this one alone if left out.
        parallelism (`str`, *optional*, defaults to `"clients"`): What processes share out: `"clients"`, `"sums"` (the
            same, but that each adds its uploads up as they come, and only the sums are exchanged) or `"data"` (the
            batches of each client).
        client_name (`Callable`, *optional*): From a client's number to what messages call it.
        computes_finite (`Callable`, *optional*): Tells of a model whether what it computes of rows that the server
            knows is finite; it is asked after each step.
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
    client_sizes: Sequence[int] = field(kw_only=True)
    processes: Processes = field(kw_only=True, default_factory=Processes)
    parallelism: str = field(kw_only=True, default="clients")
    client_name: Callable[[int], str] = field(kw_only=True, default=client_number)
    computes_finite: Callable[[nn.Module], bool] = field(kw_only=True, default=lambda model: True)

    def __post_init__(self) -> None:
        # Whether uploads stay in the process that trained them: added up as they come, or one by one.
        self.apart = self.parallelism == "sums"
        self.sums = self.apart and self.strategy.averages
        self.together = self.parallelism == "data"
        self._rows_mP = self.server.bank_SP[:0]
        # Whether the server, and what clients keep, are those of a finished round.
        self.settled = True

    def draw(self, round_index: int, clients_per_round: int) -> list[int]:
        """The participants of a round."""
        rng = np.random.default_rng(seed_of(self.draw_seed, Stream.CLIENT_DRAW, round_index))
        return CLIENT_CHOICES[self.client_choice](self.num_clients, clients_per_round, rng)

    def run_round(
        self, round_index: int, clients_per_round: int, on_client: Callable[[int], None] | None = None
    ) -> RoundReport:
        """Runs round `round_index` (from 0); `on_client` is called after each client."""
        server, layout, started = self.server, self.server.layout, time.perf_counter()
        drawn = self.draw(round_index, clients_per_round)
        chosen = soundness.participants_of(self.strategy, server, drawn, round_index, self.num_clients)
        report = RoundReport(chosen)
        sizes = [self.client_sizes[client] for client in chosen]
        owners = [0] * len(chosen) if self.together else balance(sizes, self.processes.count)
        serves = self.processes.index == 0
        # The places in `chosen` of the rows that this process holds: of its own clients, or as the server of all.
        takes_all = serves and not self.apart
        held = [place for place, owner in enumerate(owners) if takes_all or owner == self.processes.index]
        groups = self._groups(chosen, owners)
        # A sum needs a row for itself and one for each client that is training, however many there are.
        rows_mP = self._upload_rows(max(map(len, groups), default=1) if self.sums else len(held))
        sum_P = torch.zeros(layout.size, device=rows_mP.device) if self.sums else None
        if self.sums:
            rows = {place: rows_mP[index] for group in groups for index, place in enumerate(group)}
        else:
            rows = dict(zip(held, rows_mP, strict=True))
        if self.together:
            replies, stays = self._train_together(chosen, round_index, rows, on_client)
        else:
            replies, stays = self._train_clients(chosen, owners, groups, round_index, rows, sum_P, on_client)
        for client, reply in zip(chosen, replies, strict=True):
            links = self.strategy.links(server, client, chosen)
            report.bytes_down += links * reply.received_bytes
            report.bytes_up += links * reply.sent_bytes
            if reply.fault is not None:
                report.refused[client] = reply.fault
                if serves:
                    name = self.client_name(client)
                    logger.warning(f"Round {round_index + 1} goes on without {name}: {reply.fault}.")
        places = [place for place, reply in enumerate(replies) if reply.fault is None]
        if not places:
            why = reasons(report.refused, self.client_name)
            raise RuntimeError(f"No client of round {round_index + 1} sent a sound model. {why}")
        num_examples = [replies[place].num_examples for place in places]
        soundness.check_probes(self.strategy, [replies[place].probed for place in places])
        if not self.sums and len(places) < len(chosen):
            rows_mP = rows_mP[[place in places for place in held]]
        uploads = Uploads(
            [chosen[place] for place in places],
            None if self.apart else rows_mP,
            [{name: t.to(rows_mP.device) for name, t in replies[place].integers.items()} for place in places],
            torch.tensor(num_examples, dtype=torch.float32, device=rows_mP.device),
            [replies[place].metrics for place in places],
            mean_1P=rows_mP[:1] if self.sums else None,
            probed=[t.to(rows_mP.device) for place in places if (t := replies[place].probed) is not None],
        )
        if self.apart and not self.sums:
            server.held = rows_mP, [places.index(place) for place in held if place in places]
        if self.sums:
            self.processes.add_up_(sum_P)
            mean_of_sum_(sum_P, sum(num_examples), layout.batchnorm)
            uploads.mean_1P.copy_(sum_P)
        report.num_examples = sum(num_examples)
        report.loss = float(np.average([metrics["loss"] for metrics in uploads.metrics], weights=num_examples))
        report.seconds["clients"] = time.perf_counter() - started
        started = time.perf_counter()
        self.settled = False
        seed = seed_of(self.seed, Stream.SERVER, round_index)
        step = (self.strategy, server, uploads, self.reserved, round_index, seed, self.computes_finite)
        report.metrics = take_step(lambda: soundness.sound_update(*step), server, self.reserved, self.processes)
        # The bank is the model's own memory, but for these.
        if layout.integers:
            for module, taken in zip(self.strategy.server_models(server.model), server.integers, strict=True):
                layout.write_integers(taken, module)
        report.seconds["server"] = time.perf_counter() - started
        started = time.perf_counter()
        self._synchronise(uploads, dict(zip(chosen, owners, strict=True)), stays)
        self.settled = True
        report.seconds["synchronise"] = time.perf_counter() - started
        return report

    def _upload_rows(self, count: int) -> Tensor:
        """Where uploads go. Kept from round to round: fresh pages of memory take time."""
        if len(self._rows_mP) < count:
            bank_SP = self.server.bank_SP
            self._rows_mP = torch.zeros(count, bank_SP.shape[1], dtype=bank_SP.dtype, device=bank_SP.device)
        return self._rows_mP[:count]

    def _train_clients(
        self,
        chosen: list[int],
        owners: list[int],
        groups: list[list[int]],
        round_index: int,
        rows: dict[int, Tensor],
        sum_P: Tensor | None,
        on_client: Callable[[int], None] | None,
    ) -> tuple[list[Reply], dict[int, dict[str, Tensor]]]:
        """
        Each process trains the participants that it owns, group by group, and gets the replies of the others; the
        server gets their rows too, unless `sum_P` adds up those of this process. What stays with a client is returned
        by its owner only.
        """
        stays: dict[int, dict[str, Tensor]] = {}
        index = self.processes.index

        def train_own() -> dict[int, Reply]:
            replies = {}
            self._read_ahead([[chosen[place] for place in places] for places in groups], round_index)
            for places in groups:
                for place in places:
                    self.server.layout.blank_(rows[place])
                trained = self._train_at_once({chosen[place]: rows[place] for place in places}, round_index)
                for place in places:
                    client = chosen[place]
                    reply, stays[client] = self._train_client(client, round_index, rows[place], trained.get(client))
                    self._probe(reply, rows[place])
                    if sum_P is not None and reply.fault is None:
                        add_to_sum_(sum_P, rows[place], reply.num_examples, self.server.layout.batchnorm)
                    replies[place] = reply
                    if on_client is not None:
                        on_client(client)
            return replies

        gathered = self.processes.gather(train_own)
        replies = [gathered[owner][place] for place, owner in enumerate(owners)]
        for place, owner in enumerate(owners):
            if replies[place].fault is None and place in rows and not self.apart:
                self.processes.move_(rows[place], owner, 0)
            if owner != index and on_client is not None:
                on_client(chosen[place])
        return replies, stays

    def _train_together(
        self,
        chosen: list[int],
        round_index: int,
        rows: dict[int, Tensor],
        on_client: Callable[[int], None] | None,
    ) -> tuple[list[Reply], dict[int, dict[str, Tensor]]]:
        """
        As [`Federation._train_clients`], but all processes train each participant together. All end with the same row,
        reply and what stays; those of the main process count. They take turns to probe.
        """
        stays: dict[int, dict[str, Tensor]] = {}
        own_P = torch.zeros_like(self.server.bank_SP[0])
        replies: list[Reply] = []
        errors: list[Exception] = []
        marks: list[tuple[float, float] | None] = []
        with self.local_trainer.team.together():
            self._read_ahead([[client] for client in chosen], round_index)
        for place, client in enumerate(chosen):
            row_P = rows.get(place, own_P)
            self.server.layout.blank_(row_P)
            with self.local_trainer.team.together():
                try:
                    reply, kept = self._train_client(client, round_index, row_P)
                except soundness.BrokenPromiseError as error:
                    errors.append(error)
                    reply, kept = Reply(fault=str(error)), {}
            replies.append(reply)
            marks.append(soundness.mark_of(row_P) if reply.fault is None else None)
            if self.processes.index == 0:
                stays[client] = kept
            if place % self.processes.count == self.processes.index:
                try:
                    self._probe(reply, row_P)
                except Exception as error:  # raised below, where nobody waits for this process
                    errors.append(error)
            if on_client is not None:
                on_client(client)

        def own_replies() -> tuple[list[Reply], list[tuple[float, float] | None]]:
            if errors:
                raise errors[0]
            return replies, marks

        gathered, marks = zip(*self.processes.gather(own_replies), strict=True)
        soundness.check_alike(self.strategy, chosen, marks)
        replies = gathered[0]
        for place, reply in enumerate(replies):
            reply.fault = next((told[place].fault for told in gathered if told[place].fault is not None), None)
            reply.probed = gathered[place % self.processes.count][place].probed
        return replies, stays

    def _probe(self, reply: Reply, row_P: Tensor) -> None:
        """Puts what the server asks of a sound upload into its reply."""
        if reply.fault is None:
            reply.probed = soundness.probe_of(self.strategy, self.server, row_P, self.reserved)
            if reply.probed is not None and not all_finite([reply.probed]):
                reply.fault = "what its model computes of the reserved set is not finite"

    def _synchronise(self, uploads: Uploads, owners: dict[int, int], stays: dict[int, dict[str, Tensor]]) -> None:
        """Hands what the server has for participants to their processes, each of which writes what its own keep."""
        rows: dict[int, Tensor] = {}

        def synchronise() -> list[int]:
            rows.update(soundness.rows_to_keep(self.strategy, self.server, uploads))
            return list(rows)

        for client in self.processes.on_main(synchronise):
            if self.processes.index == owners[client] and client not in rows:
                rows[client] = torch.empty_like(self.server.bank_SP[0])
            if client in rows:
                self.processes.move_(rows[client], 0, owners[client])

        def write() -> dict[int, str]:
            written = {}
            for client in uploads.clients:
                tensors = stays.get(client, {})
                if client in stays and client in rows:
                    tensors |= {"row_P": rows[client]}
                if tensors:
                    written[client] = self.store.put(client, tensors)
            return written

        for written in self.processes.gather(write):
            self.store.replace(written)

    def _train_at_once(self, rows: dict[int, Tensor], round_index: int) -> dict[int, tuple[ClientTask, Payload]]:
        """Trains the participants of a group, whose rows are given, together; nobody if it is one alone or fails."""
        if len(rows) == 1:
            return {}
        try:
            tasks = [self.task(client, round_index, out_P) for client, out_P in rows.items()]
            with self.local_trainer.clock.client(len(tasks)):
                payloads = self.local_trainer.train_at_once(tasks)
        except Exception as error:  # each is trained by itself, where only those fail that have to
            logger.warning(
                f"These cannot be trained at once and are trained alone: {', '.join(map(self.client_name, rows))}.",
                exc_info=error,
            )
            return {}
        return {task.client: (task, payload) for task, payload in zip(tasks, payloads, strict=True)}

    def _train_client(
        self, client: int, round_index: int, out_P: Tensor, trained: tuple[ClientTask, Payload] | None = None
    ) -> tuple[Reply, dict[str, Tensor]]:
        """
        A participant's reply, its row written to `out_P`, and what stays with it if the upload is accepted. `trained`
        is what there is of one that has been trained already.
        """
        reply, stays, task = Reply(), {}, None
        try:
            with self.local_trainer.team.client():
                if trained is None:
                    task = self.task(client, round_index, out_P)
                    with self.local_trainer.clock.client():
                        payload, stays = soundness.upload_of(
                            self.strategy, self.local_trainer, task, self.server.bank_SP
                        )
                else:
                    task, payload = trained
                stays = self._finish_upload(task, payload, stays)
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
            reply.received_bytes = task.received_bytes
        if reply.fault is None:
            reply.sent_bytes = payload.num_bytes(self.server.layout, self.strategy.shared(self.server, round_index))
            reply.integers = {name: tensor.cpu() for name, tensor in payload.integers.items()}
            reply.num_examples, reply.metrics = payload.num_examples, payload.metrics
        return reply, stays

    def _finish_upload(self, task: ClientTask, payload: Payload, stays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes a trained client's payload what travels, and returns all that stays with the client."""
        shared = self.strategy.shared(self.server, task.round_index)
        if payload.row_bytes is None:
            payload.row_bytes = self._row_bytes(task.client, shared)
        for name, tensor in stays.items():
            if not all_finite([tensor]):
                raise ValueError(f"`{name}`, which it would keep, holds values that are not finite")
        if self.keep_optimizer:
            stays |= self.local_trainer.optimizer_tensors()
        if self.client_ranks is not None:
            start_P = self.strategy.download(self.server, task.client, task.kept.get("row_P")).to(task.out_P.device)
            widen_rank_(task.out_P, start_P, self.server.layout, self._rank(task.client))
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
        return stays

    def _groups(self, chosen: list[int], owners: list[int]) -> list[list[int]]:
        """The places in `chosen` of the participants that this process owns, those together that it trains at once."""
        own = [place for place, owner in enumerate(owners) if owner == self.processes.index]
        groups = self.local_trainer.groups([self.client_sizes[chosen[place]] for place in own])
        return [[own[index] for index in group] for group in groups]

    def _read_ahead(self, groups: list[list[int]], round_index: int) -> None:
        """Worker processes, if there are any, begin to read what these participants will train on."""
        if has_plain_clients(self.strategy):
            with suppress(Exception):  # what fails here fails again when its client trains, and counts there
                self.local_trainer.read_ahead(
                    [(self.client_data(client), self._training_seed(client, round_index)) for client in clients]
                    for clients in groups
                )

    def _training_seed(self, client: int, round_index: int) -> int:
        return seed_of(self.seed, Stream.LOCAL_TRAINING, round_index, client)

    def task(self, client: int, round_index: int, out_P: Tensor) -> ClientTask:
        """What a client has at hand in a round, for an upload to `out_P`."""
        kept = self.store.get(client)
        received_P = soundness.download_of(self.strategy, self.server, client, kept.get("row_P")).to(out_P.device)
        if self.server.layout.lora:
            received_P = received_P.clone()
            # One start for all: averages need it, and so does what a client remembers of its entries.
            fit_rank_(received_P, self.server.layout, self._rank(client), seed_of(self.seed, Stream.ADAPTER_START))
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
            self._training_seed(client, round_index),
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
