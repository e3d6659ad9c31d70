"""
The engine of clients elsewhere: tasks go out and uploads come in as messages.

Shape suffixes: M clients, P elements of a model's row.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..federation import (
    EachItsOwn,
    EngineArguments,
    Participants,
    Processes,
    Strategy,
    reasons,
    soundness,
)
from ..federation.engines import Plan
from ..federation.filters import Clip, Compress, Ranks
from ..federation.participants import Reply
from ..federation.uploads import Rows
from ..weights import Payload, keep_private_
from .link import Answer
from .messages import Message, MessageError
from .reading_uploads import Asked, read_upload
from .roster import PAUSES, Roster
from .travel import num_bytes, payload_tensors, tensor_digests
from .who_can_run import why_not


logger = logging.get_logger(__name__)

# In `server.tensors`, and so in checkpoints: the round of each client's last accepted upload, -1 for none.
ACCEPTED = "deployment.accepted_M"
# As much longer than `max_update_norm` may an update come.
ROUNDING = 1e-3


class MessageEngine(EachItsOwn):
    """
    Has each participant trained at its node.

    Args:
        participants ([`~federation.Participants`]): The server's half of them.
        processes ([`~federation.Processes`]): Of the launch, which is one.
        roster ([`Roster`]): The nodes.
        round_timeout (`float`): Seconds after which a round goes on without those who have not answered.
        min_clients (`int`): As many uploads a round waits for, however long.
        oldest_round (`Callable`): Gives the first round that may be asked for again.
    """

    def __init__(
        self,
        participants: Participants,
        processes: Processes,
        roster: Roster,
        round_timeout: float,
        min_clients: int,
        oldest_round: Callable[[], int],
    ):
        super().__init__(participants, processes)
        self.roster, self.round_timeout, self.min_clients = roster, round_timeout, min_clients
        self.oldest_round = oldest_round
        self.server, self.strategy = participants.server, participants.strategy
        self.ranks = next((filter for filter in participants.filters if isinstance(filter, Ranks)), None)
        compress = next((filter for filter in participants.filters if isinstance(filter, Compress)), None)
        self.codec = None if compress is None else compress.codec
        clip = next((filter for filter in participants.filters if isinstance(filter, Clip)), None)
        # A node has shortened its update itself, unless it is hostile; but for rounding it stays as it came.
        self.clip = None if clip is None else Clip(clip.layout, clip.max_norm * (1 + ROUNDING))

    @classmethod
    def refuse(cls, client_model: nn.Module, args: EngineArguments, strategy: Strategy) -> None:
        """Raises `ValueError` for what clients elsewhere cannot do, or not yet."""
        begin = "Clients are elsewhere, but"
        if reason := why_not(strategy):
            raise ValueError(f"{begin} {strategy.name!r} cannot run there: {reason}. Choose another method.")
        if args.world_size > 1:
            raise ValueError(f"{begin} {args.world_size} processes were launched: start the server as one.")
        settings: dict[str, Any] = vars(args)
        not_there = [("clients_at_once", 1), ("deepspeed", None)]
        not_there += [("example_noise_multiplier", None), ("example_target_epsilon", None)]
        for name, wanted in not_there:
            if settings[name] != wanted:
                raise ValueError(f"{begin} `{name}` is {settings[name]!r}, which is not done there: leave it out.")
        if args.client_parallelism == "data":
            raise ValueError(f"{begin} `client_parallelism` is 'data': leave it out, nodes train their own client.")

    # A round

    def fit(
        self, plan: Plan, round_index: int, uploads: Rows, on_client: Callable[[int], None]
    ) -> tuple[list[Reply], dict[int, dict]]:
        self.refresh_sizes()
        asked = [self.prepare(place, client, round_index) for place, client in enumerate(plan.chosen)]
        self.collect(asked, round_index, uploads, on_client)
        self.refresh_sizes()  # some may have come meanwhile
        self.check_enough(asked, round_index)
        return [each.reply for each in asked], {client: {} for client in plan.chosen}

    def settle(self, clients: list[int], round_index: int) -> None:
        self.accepted_M[clients] = round_index

    @property
    def accepted_M(self) -> Tensor:
        """The round of each client's last accepted upload, -1 for none."""
        tensors = self.server.tensors
        if ACCEPTED not in tensors:
            tensors[ACCEPTED] = torch.full((len(self.roster.sizes_M),), -1)
        return tensors[ACCEPTED]

    def refresh_sizes(self) -> None:
        """Takes note of clients that have come, or have other data than before."""
        self.participants.client_sizes = self.roster.sizes_M.tolist()
        self.server.num_examples = int(self.roster.sizes_M.sum())

    def prepare(self, place: int, client: int, round_index: int) -> Asked:
        """Makes what a participant of a round is asked for."""
        like_P = self.server.bank_SP[0]
        task = self.participants.task(client, round_index, like_P)
        rank = None if self.ranks is None else self.ranks.rank(client)
        shared = self.strategy.shared(self.server, round_index)
        every = {*(slot.name for slot in self.server.layout.slots), *self.server.layout.integers}
        due = soundness.tensors_due(self.strategy, self.server, client)
        return Asked(place, task, rank, frozenset(every if shared is None else shared), due, Reply())

    def message(self, asked: Asked) -> Message:
        """Makes the message to a participant whose node is here."""
        task, layout = asked.task, self.server.layout
        # Private tensors stay where they are, but for those with which a client of this node would begin otherwise.
        own = {slot.name for slot in layout.slots} - asked.names
        start = self.roster.starts[task.client]
        changed = {name for name, d in tensor_digests(task.received_P, layout, own).items() if start.get(name) != d}
        tensors = payload_tensors(task.received, layout, asked.names | changed, asked.rank)
        asked.reply.received_bytes = num_bytes(tensors)
        facts = {
            "run": self.roster.run,
            "settings": self.roster.settings,
            "client": task.client,
            "round": task.round_index,
            "seed": task.seed,
            "rank": asked.rank,
            "names": sorted(asked.names),
            "due": {
                name: [str(like.dtype).removeprefix("torch."), list(like.shape)] for name, like in asked.due.items()
            },
            "accepted": int(self.accepted_M[task.client]),
            "oldest": self.oldest_round(),
        }
        return Message("train", facts, tensors)

    def collect(self, asked: list[Asked], round_index: int, uploads: Rows, on_client: Callable[[int], None]) -> None:
        """Asks participants, and takes their uploads until all are there, or the time is up and there are enough."""
        waiting, deadline = deque(asked), time.monotonic() + self.round_timeout
        while waiting:
            self.read(waiting, uploads, on_client)
            missing = [each for each in waiting if each.answer is None and each.reply.fault is None]
            if missing and time.monotonic() > deadline:
                came = sum(each.answered for each in asked)
                if came >= min(self.min_clients, len(asked)):
                    for each in missing:
                        self.give_up(each)
                    continue
                logger.warning(
                    f"Round {round_index + 1} has {came} uploads after `round_timeout` = "
                    f"{self.round_timeout:g} s, waits for `min_clients` = {self.min_clients}, and asks again."
                )
                deadline = time.monotonic() + self.round_timeout
                for each in missing:  # its message may have been lost; whichever is answered first counts
                    each.node = None
            if missing and not self.exchange(missing, lambda: self.read(waiting, uploads, on_client)):
                time.sleep(self.link.pause)

    def read(self, waiting: deque[Asked], uploads: Rows, on_client: Callable[[int], None]) -> None:
        """Reads the uploads that have come, in the order of the draw, whoever was first: sums are rounded."""
        while waiting and (waiting[0].answer is not None or waiting[0].reply.fault is not None):
            each = waiting.popleft()
            self.receive(each, uploads)
            on_client(each.task.client)

    def exchange(self, missing: list[Asked], read: Callable[[], None]) -> int:
        """Asks those whose nodes are here, and takes the answers that have come; returns how many."""
        self.roster.welcome()
        for each in missing:
            self.ask(each)
        came = 0
        for answer in self.link.receive():
            came += 1
            self.take(answer, missing)
            del answer  # with its bytes, before the next one comes
            read()
        return came

    def take(self, answer: Answer, missing: list[Asked]) -> None:
        """Puts an answer where it belongs; one that nobody waits for, a second one say, belongs nowhere."""
        if self.roster.take(answer):
            return
        asked = next((each for each in missing if answer.message_id in each.message_ids and not each.answered), None)
        if asked is None:
            return
        if answer.packed is None and answer.lost:
            self.ask_later(asked, answer)
            return
        try:
            if answer.packed is None:
                raise MessageError(f"it sends no message: {answer.fault}")
            message = Message.unpack(answer.packed)
            if message.kind == "failed":
                raise MessageError(str(message.facts.get("fault")))
            asked.answer, asked.answered = message, True
        except MessageError as error:
            asked.reply.fault = str(error)
        self.forget(asked)

    def ask_later(self, asked: Asked, answer: Answer) -> None:
        """Has a participant asked again whose node was cut off, was killed, or whose message was lost."""
        last = answer.message_id == asked.message_ids[-1]
        asked.message_ids.remove(answer.message_id)
        if not last:  # it has been asked again already
            return
        fault = f"its node gives no answer: {answer.fault}"
        if asked.fault is None:
            logger.warning(f"{self.name(asked)} is asked again, {fault}.")
        asked.fault, asked.node = fault, None
        asked.not_before = time.monotonic() + PAUSES * self.link.pause

    @property
    def link(self) -> Any:
        """The transport."""
        return self.roster.link

    def ask(self, asked: Asked) -> None:
        """Sends a participant its task, if its node is here and has not got it."""
        node = self.roster.node_of(asked.task.client)
        if node is None:
            # If it was killed it has lost what it was asked, whether or not it comes back under the same number.
            asked.node = None
        if node is None or node == asked.node or time.monotonic() < asked.not_before:
            return
        try:
            asked.message_ids.append(self.link.send(node, "train", self.message(asked).pieces()))
            asked.node = node
        except ConnectionError as error:
            logger.warning(f"{self.name(asked)} cannot be asked: {error}.")

    def give_up(self, asked: Asked) -> None:
        """Goes on without a participant."""
        if asked.message_ids:
            asked.reply.fault = f"no answer in `round_timeout` = {self.round_timeout:g} s"
        else:
            asked.reply.fault = asked.fault or "no node of this client is connected"
        self.forget(asked)

    def forget(self, asked: Asked) -> None:
        """Waits for no further answers of a participant."""
        for message_id in asked.message_ids:
            self.link.forget(message_id)
        asked.message_ids.clear()

    def name(self, asked: Asked) -> str:
        """Calls a participant in messages."""
        return self.participants.client_name(asked.task.client)

    # What comes back

    def receive(self, asked: Asked, uploads: Rows) -> None:
        """Checks an upload as any other, and puts it where the method finds it."""
        message, asked.answer = asked.answer, None
        if message is None:
            return
        reply, row_P = asked.reply, uploads.row(asked.place)
        try:
            payload = read_upload(message, asked, self.server, self.codec, row_P)
            if self.ranks is not None:
                self.ranks.upload(payload, asked.task)
            known = Payload(self.server.bank_SP[0], self.server.integers[0])
            keep_private_(payload, known, self.server.layout, asked.names)
            if self.clip is not None:
                payload.weigh(self.server.layout, asked.names)
                self.clip.upload(payload, asked.task)
            size = int(self.roster.sizes_M[asked.task.client])
            reply.fault = soundness.upload_fault(self.strategy, self.server, asked.task, payload, size)
        except MessageError as error:
            reply.fault = str(error)
        if reply.fault is not None:
            return
        reply.sent_bytes, reply.integers = num_bytes(message.tensors), payload.integers
        reply.num_examples, reply.metrics = payload.num_examples, payload.metrics
        self.participants.probe(reply, row_P)
        if reply.fault is None:
            uploads.add(asked.place, reply.num_examples, payload.tensors)

    def check_enough(self, asked: list[Asked], round_index: int) -> None:
        """Raises `RuntimeError` unless `min_clients` uploads are sound, or all of fewer participants."""
        refused = {each.task.client: each.reply.fault for each in asked if each.reply.fault is not None}
        if len(asked) - len(refused) < min(self.min_clients, len(asked)):
            why = reasons(refused, self.participants.client_name)
            raise RuntimeError(
                f"Round {round_index + 1} has {len(asked) - len(refused)} sound uploads, and `min_clients` is "
                f"{self.min_clients}. {why} The run can be resumed from its last checkpoint."
            )
