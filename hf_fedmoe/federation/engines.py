"""Engines, by which the processes of a launch train a round's participants: each its own, or all together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import soundness
from .participants import Participants, Reply
from .processes import Processes, balance
from .uploads import Rows


class Plan(NamedTuple):
    """
    The division of a round's participants among processes.

    Args:
        chosen (`list[int]`): The participants.
        owners (`list[int]`): The process that trains each.
        groups (`list[list[int]]`): The places in `chosen` of those that this process trains, those together that it
            trains at once.
    """

    chosen: list[int]
    owners: list[int]
    groups: list[list[int]]


class EachItsOwn:
    """
    Each process trains clients of its own, the largest first to whoever has the least to do.

    Args:
        participants ([`Participants`]): At work in this process.
        processes ([`Processes`]): Of the launch.
    """

    def __init__(self, participants: Participants, processes: Processes):
        self.participants, self.processes = participants, processes

    def plan(self, chosen: list[int]) -> Plan:
        """Shares a round's participants out."""
        sizes = [self.participants.client_sizes[client] for client in chosen]
        owners = balance(sizes, self.processes.count)
        own = [place for place, owner in enumerate(owners) if owner == self.processes.index]
        groups = self.participants.local_trainer.groups([sizes[place] for place in own])
        return Plan(chosen, owners, [[own[index] for index in group] for group in groups])

    def fit(
        self, plan: Plan, round_index: int, uploads: Rows, on_client: Callable[[int], None]
    ) -> tuple[list[Reply], dict[int, dict]]:
        """
        Has the participants trained, and their sound uploads brought to where they are needed. All processes get all
        replies; what stays with a client is returned by its owner only.
        """
        chosen, owners, groups = plan
        stays: dict[int, dict] = {}

        def train_own() -> dict[int, Reply]:
            replies = {}
            self.participants.read_ahead([[chosen[place] for place in places] for places in groups], round_index)
            for places in groups:
                rows = {place: uploads.row(place) for place in places}
                by_client = {chosen[place]: row_P for place, row_P in rows.items()}
                trained = self.participants.train_at_once(by_client, round_index)
                for place, row_P in rows.items():
                    client = chosen[place]
                    reply, stays[client] = self.participants.train(client, round_index, row_P, trained.get(client))
                    self.participants.probe(reply, row_P)
                    if reply.fault is None:
                        uploads.add(place, reply.num_examples, reply.tensors)
                    reply.tensors = {}  # not for the other processes
                    replies[place] = reply
                    on_client(client)
            return replies

        gathered = self.processes.gather(train_own)
        replies = [gathered[owner][place] for place, owner in enumerate(owners)]
        for place, owner in enumerate(owners):
            if replies[place].fault is None:
                uploads.bring(place)
            if owner != self.processes.index:
                on_client(chosen[place])
        return replies, stays


class Together(EachItsOwn):
    """
    All processes train each participant together, each on its share of every batch. All end with the same row, reply
    and what stays; those of the main process count. They take turns to probe.
    """

    def plan(self, chosen: list[int]) -> Plan:
        places = [[place] for place in range(len(chosen))]
        return Plan(chosen, [0] * len(chosen), places if self.processes.index == 0 else [])

    def fit(
        self, plan: Plan, round_index: int, uploads: Rows, on_client: Callable[[int], None]
    ) -> tuple[list[Reply], dict[int, dict]]:
        participants, team = self.participants, self.participants.local_trainer.team
        stays: dict[int, dict] = {}
        replies: list[Reply] = []
        errors: list[Exception] = []
        marks: list[tuple[float, float] | None] = []
        with team.together():
            participants.read_ahead([[client] for client in plan.chosen], round_index)
        for place, client in enumerate(plan.chosen):
            row_P = uploads.row(place)
            with team.together():
                try:
                    reply, kept = participants.train(client, round_index, row_P)
                except soundness.BrokenPromiseError as error:
                    errors.append(error)
                    reply, kept = Reply(fault=str(error)), {}
            replies.append(reply)
            marks.append(soundness.mark_of(row_P) if reply.fault is None else None)
            if self.processes.index == 0:
                stays[client] = kept
                uploads.add(place, reply.num_examples, reply.tensors)
            reply.tensors = {}
            if place % self.processes.count == self.processes.index:
                try:
                    participants.probe(reply, row_P)
                except Exception as error:  # raised below, where nobody waits for this process
                    errors.append(error)
            on_client(client)

        def own_replies() -> tuple[list[Reply], Sequence[tuple[float, float] | None]]:
            if errors:
                raise errors[0]
            return replies, marks

        gathered, marks = zip(*self.processes.gather(own_replies), strict=True)
        soundness.check_alike(participants.strategy, plan.chosen, marks)
        replies = gathered[0]
        for place, reply in enumerate(replies):
            reply.fault = next((told[place].fault for told in gathered if told[place].fault is not None), None)
            reply.probed = gathered[place % self.processes.count][place].probed
        return replies, stays


ENGINES = {"clients": EachItsOwn, "sums": EachItsOwn, "data": Together}
