"""One round: draw, send, train, receive, check, probe, update the server, synchronise.

Shape suffixes: m participants, P elements of a model's row.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers.utils import logging

from ..weights import in_one_copy
from . import soundness
from .captured_passes import CapturedPasses
from .client_choice import CLIENT_CHOICES
from .contract import ServerStep, Track, Uploads, untracked
from .defence import UNDEFENDED, Defence
from .engines import EachItsOwn, Plan
from .participants import Reply
from .private_mean import PlainMean
from .randomness import Stream, fresh_seed, seed_of
from .refusals import reasons
from .screens import Screen, Updates, Verdict
from .server_step import take_step
from .uploads import SHARDED, Rows, UploadMemory


logger = logging.get_logger(__name__)


@dataclass
class RoundReport:
    """
    The record of a round.

    Args:
        clients (`list[int]`): Who took part.
        num_examples (`int`): Training examples of those whose upload was accepted.
        loss (`float`): Mean local training loss, weighted by examples; NaN where clients do not tell it.
        bytes_down (`int`), bytes_up (`int`): Communication with all participants.
        seconds (`dict[str, float]`): By stage: `clients`, `server`, `synchronise`.
        training_seconds (`float`): Of `clients`, what local training took in this process, without probes and files.
        metrics (`dict[str, float]`): What the strategy reports.
        refused (`dict[int, str]`): Clients whose training failed or whose upload was refused, and why.
    """

    clients: list[int]
    num_examples: int = 0
    loss: float = float("nan")
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass
class Federation:
    """
    Everything a round works on.

    Args:
        engine ([`EachItsOwn`] or another engine): Trains participants, whose server every round changes.
        num_clients (`int`): M.
        draw_seed (`int`, *optional*): Of the draw of clients, which nobody can repeat if it is `None`. Whatever else
            is random has the seed of `participants`.
        client_choice (`str`, *optional*, defaults to `"uniform"`): How participants are drawn, a name in
            `CLIENT_CHOICES`.
        sharded (`bool`, *optional*, defaults to `False`): Whether uploads stay in the processes that trained them, as
            sums if the method needs only these.
        track (`Callable`, *optional*): Watches the loops of the server's step, see [`ServerStep`].
        gate_fit ([`~strategies.GateFit`], *optional*): By what all processes train a gate together, if they do.
        computes_finite (`Callable`, *optional*): Tells of a model whether what it computes of rows that the server
            knows is finite; it is asked after each step.
        defence ([`Defence`], *optional*): Against hostile uploads; none if left out.
        mean ([`PlainMean`], *optional*): What becomes of uploads before the method sees them: nothing, or
            [`GaussianMean`].
        on_draw (`Callable`, *optional*): Called with the participants of a round before they train.
    """

    engine: EachItsOwn
    num_clients: int
    draw_seed: int | None
    client_choice: str = "uniform"
    sharded: bool = False
    track: Track = untracked
    gate_fit: Any = None
    computes_finite: Callable[[nn.Module], bool] = lambda model: True
    defence: Defence = UNDEFENDED
    mean: PlainMean = field(default_factory=PlainMean)
    on_draw: Callable[[list[int]], None] = lambda chosen: None

    def __post_init__(self) -> None:
        self.participants, self.processes = self.engine.participants, self.engine.processes
        self.server, self.strategy = self.participants.server, self.participants.strategy
        self.local_trainer, self.store = self.participants.local_trainer, self.participants.store
        self.collect = SHARDED[self.strategy.needs] if self.sharded else Rows
        self.memory = UploadMemory(self.server)
        self.captured: dict[nn.Module, CapturedPasses] | None = {} if self.local_trainer.captures else None
        # Whether the server, and what clients keep, are those of the last round that was counted: by whoever runs
        # rounds, since a signal may come when one has ended and is not counted yet.
        self.settled = True

    def draw(self, round_index: int, clients_per_round: int) -> list[int]:
        """Draws the participants of a round."""
        if self.draw_seed is None:
            seed = self.processes.on_main(fresh_seed)
        else:
            seed = seed_of(self.draw_seed, Stream.CLIENT_DRAW, round_index)
        return CLIENT_CHOICES[self.client_choice](self.num_clients, clients_per_round, np.random.default_rng(seed))

    def run_round(
        self, round_index: int, clients_per_round: int, on_client: Callable[[int], None] = lambda client: None
    ) -> RoundReport:
        """Runs round `round_index` (from 0); `on_client` is called after each client."""
        started, trained = time.perf_counter(), self.local_trainer.clock.spent
        drawn = self.draw(round_index, clients_per_round)
        chosen = soundness.participants_of(self.strategy, self.server, drawn, round_index, self.num_clients)
        self.on_draw(chosen)
        plan = self.engine.plan(chosen)
        beside = [soundness.tensors_due(self.strategy, self.server, client) for client in chosen]
        collected = self.collect(self.server, self.memory, self.processes, *plan[1:], self.strategy.needs, beside)
        replies, retained = self.engine.fit(plan, round_index, collected, on_client)
        screened = self.screen(collected, chosen, replies, round_index)
        report = self.report(chosen, replies, round_index)
        uploads = self.mean.uploads(self.close(collected, chosen, replies), round_index)
        report.seconds["clients"] = time.perf_counter() - started
        report.training_seconds = self.local_trainer.clock.spent - trained

        started, self.settled = time.perf_counter(), False
        report.metrics = screened | self.server_step(uploads, round_index)
        report.seconds["server"] = time.perf_counter() - started

        started = time.perf_counter()
        self.synchronise(uploads, plan, retained)
        self.engine.settle(uploads.clients, round_index)
        report.seconds["synchronise"] = time.perf_counter() - started
        return report

    def screen(self, collected: Rows, chosen: list[int], replies: list[Reply], round_index: int) -> dict[str, float]:
        """Has screens look at the sound uploads; refuses those that they drop, and returns what there is to log."""
        told: dict[str, float] = {}
        for screen in self.defence.screens:
            places = [place for place, reply in enumerate(replies) if reply.fault is None]
            if not places:
                break

            def look(screen: Screen = screen, places: list[int] = places) -> Verdict:
                return screen(self.updates(collected, {place: chosen[place] for place in places}, round_index))

            verdict = self.processes.on_main(look)
            for index, reason in verdict.dropped.items():
                replies[places[index]].fault = reason
            told |= verdict.told
        return told

    def updates(self, collected: Rows, clients: dict[int, int], round_index: int) -> Updates:
        """Returns the uploads at these places, of these clients, beside what each was sent."""
        layout = self.server.layout
        tasks = (self.participants.task(client, round_index, self.server.bank_SP[0]) for client in clients.values())
        received = [task.received_P for task in tasks]
        shared = self.strategy.shared(self.server, round_index)
        return Updates(
            layout, [collected.rows[place] for place in clients], received, layout.sizes if shared is None else shared
        )

    def report(self, chosen: list[int], replies: list[Reply], round_index: int) -> RoundReport:
        """Tells what the participants cost and who is refused; raises `RuntimeError` if nobody is left."""
        report = RoundReport(chosen)
        for client, reply in zip(chosen, replies, strict=True):
            links = self.strategy.links(self.server, client, chosen)
            report.bytes_down += links * reply.received_bytes
            report.bytes_up += links * reply.sent_bytes
            if reply.fault is not None:
                report.refused[client] = reply.fault
                if self.processes.index == 0:
                    name = self.participants.client_name(client)
                    logger.warning(f"Round {round_index + 1} goes on without {name}: {reply.fault}.")
        sound = [reply for reply in replies if reply.fault is None]
        if not sound and not self.mean.may_be_empty:
            why = reasons(report.refused, self.participants.client_name)
            raise RuntimeError(f"No client of round {round_index + 1} sent a sound model. {why}")
        examples = [reply.num_examples for reply in sound]
        report.num_examples = sum(examples)
        if sound:
            losses = [reply.metrics.get("loss", math.nan) for reply in sound]
            report.loss = float(np.average(losses, weights=examples))
        return report

    def close(self, collected: Rows, chosen: list[int], replies: list[Reply]) -> Uploads:
        """Returns the sound uploads as the method sees them."""
        places = [place for place, reply in enumerate(replies) if reply.fault is None]
        sound, device = [replies[place] for place in places], self.server.bank_SP.device
        soundness.check_probes(self.strategy, [reply.probed for reply in sound])
        uploads = collected.close(
            places,
            [chosen[place] for place in places],
            [in_one_copy(reply.integers, device) for reply in sound],
            torch.tensor([reply.num_examples for reply in sound], dtype=torch.float32, device=device),
            [reply.metrics for reply in sound],
            [reply.probed.to(device) for reply in sound if reply.probed is not None],
        )
        uploads.fuse_ = self.defence.fuse_
        return uploads

    def step(self, round_index: int) -> ServerStep:
        """Returns what the server's step of a round works with; of `rounds`, the last one's."""
        reserved, seed = self.participants.reserved, seed_of(self.participants.seed, Stream.SERVER, round_index)
        gate_fit = self.gate_fit if self.processes.count > 1 else None
        return ServerStep(self.server, reserved, round_index, seed, self.track, gate_fit, self.captured)

    def server_step(self, uploads: Uploads, round_index: int) -> dict[str, float]:
        """Takes the server's step of a round, in the main process with the help of the others."""

        def act(step: ServerStep) -> dict[str, float]:
            return soundness.sound_update(self.strategy, uploads, step, self.computes_finite)

        report = take_step(act, self.step(round_index), self.processes, uploads)
        # The bank is the model's own memory, but for these.
        if self.server.layout.integers:
            modules = self.strategy.server_models(self.server.model)
            for module, taken in zip(modules, self.server.integers, strict=True):
                self.server.layout.write_integers(taken, module)
        return report

    def finish(self, rounds: int) -> None:
        """Takes the step after the last of `rounds` rounds."""

        def act(step: ServerStep) -> None:
            soundness.sound_finish(self.strategy, step, self.computes_finite)

        take_step(act, self.step(rounds), self.processes)

    def synchronise(self, uploads: Uploads, plan: Plan, retained: dict[int, dict[str, Tensor]]) -> None:
        """
        Hands what the server has for participants to their processes, each of which writes what its own keep: behind
        what comes next if it is alone.
        """
        owners, rows = dict(zip(plan.chosen, plan.owners, strict=True)), {}

        def rows_to_keep() -> list[int]:
            rows.update(soundness.rows_to_keep(self.strategy, self.server, uploads))
            return list(rows)

        for client in self.processes.on_main(rows_to_keep):
            if self.processes.index == owners[client] and client not in rows:
                rows[client] = torch.empty_like(self.server.bank_SP[0])
            if client in rows:
                self.processes.move_(rows[client], 0, owners[client])

        def write() -> dict[int, str]:
            written = {}
            for client in uploads.clients:
                tensors = retained.get(client, {})
                if client in retained and client in rows:
                    tensors |= {"row_P": rows[client]}
                if tensors:
                    written[client] = self.store.put(client, tensors)
            if self.processes.count > 1:
                self.store.finish_writing()  # another one may train a client next, and reads its file
            return written

        for written in self.processes.gather(write):
            self.store.replace(written)

    def personal_model(self, client: int, data: Subset | None = None) -> nn.Module:
        """
        Returns the model that is evaluated for a client; what it trains for that is forgotten again. `data` are the
        examples of one that the federation does not know.
        """
        return self.participants.personal_model(client, data)
