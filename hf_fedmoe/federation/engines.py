"""
Engines, by which the processes of a launch train a round's participants: each its own, one by one or some at once, or
all together, by themselves or by DeepSpeed.

Shape suffix: P elements of a model's row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..models import FedMoEPreTrainedModel
from ..weights import Payload
from . import soundness
from .contract import ClientTask, Strategy, has_plain_clients
from .local_training import Reading
from .participants import Participants, Reply
from .processes import Processes, balance
from .stacked_training import StackedTraining
from .uploads import Rows
from .zero_training import ZeroTraining


# Optimizers that can train several models as one, `clients_at_once`.
WEIGHT_BY_WEIGHT = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


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


class EngineArguments(TrainingArguments):
    """The training arguments that engines read: those of transformers, and these."""

    clients_at_once: int
    client_parallelism: str | None
    keep_client_optimizer: bool


class EachItsOwn:
    """
    Has each process train clients of its own, the largest first to whoever has the least to do, one by one.

    Args:
        participants ([`Participants`]): At work in this process.
        processes ([`Processes`]): Of the launch.
    """

    def __init__(self, participants: Participants, processes: Processes):
        self.participants, self.processes = participants, processes

    @classmethod
    def refuse(cls, client_model: nn.Module, args: EngineArguments, strategy: Strategy) -> None:
        """Raises `ValueError` for what this engine is known not to train; nothing."""

    def plan(self, chosen: list[int]) -> Plan:
        """Shares a round's participants out."""
        sizes = [self.participants.client_sizes[client] for client in chosen]
        owners = balance(sizes, self.processes.count)
        own = [place for place, owner in enumerate(owners) if owner == self.processes.index]
        groups = self.groups([sizes[place] for place in own])
        return Plan(chosen, owners, [[own[index] for index in group] for group in groups])

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """Returns the places in `sizes` (examples of clients) of those that are trained at once: each by itself."""
        return [[place] for place in range(len(sizes))]

    def reading(self, clients: Sequence[tuple[Subset, int]]) -> Reading:
        """Gives what is read to train a group, each client a dataset and a seed."""
        return self.participants.local_trainer.reading(clients)

    def train_group(self, rows: dict[int, Tensor], round_index: int) -> dict[int, tuple[ClientTask, Payload]]:
        """Trains the participants of a group together, whose rows are given; here nobody."""
        return {}

    def try_out(self, dataset: Subset) -> None:
        """Raises `ValueError` if the model cannot be trained in this way, which is tried on a client's examples."""

    def fit(
        self, plan: Plan, round_index: int, uploads: Rows, on_client: Callable[[int], None]
    ) -> tuple[list[Reply], dict[int, dict]]:
        """
        Has the participants trained, and their sound uploads brought to where they are needed. All processes get all
        replies; what stays with a client is returned by its owner only.
        """
        chosen, owners, groups = plan
        retained: dict[int, dict] = {}

        def train_own() -> dict[int, Reply]:
            replies = {}
            clients = [[chosen[place] for place in places] for places in groups]
            self.participants.read_ahead(clients, round_index, self.reading)
            for places in groups:
                rows = {place: uploads.row(place) for place in places}
                by_client = {chosen[place]: row_P for place, row_P in rows.items()}
                trained = self.train_group(by_client, round_index)
                for place, row_P in rows.items():
                    client = chosen[place]
                    reply, retained[client] = self.participants.train(client, round_index, row_P, trained.get(client))
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
        return replies, retained


class SomeAtOnce(EachItsOwn):
    """
    Has each process train clients of its own, several at once as one model of stacked weights.

    Args:
        participants ([`Participants`]), processes ([`Processes`]): As in [`EachItsOwn`].
        stacked ([`StackedTraining`]): Trains them.
    """

    def __init__(self, participants: Participants, processes: Processes, stacked: StackedTraining):
        super().__init__(participants, processes)
        self.stacked = stacked

    @classmethod
    def refuse(cls, client_model: nn.Module, args: EngineArguments, strategy: Strategy) -> None:
        begin, remedy = f"`clients_at_once` is {args.clients_at_once}, but", "set it to 1."
        if not has_plain_clients(strategy):
            raise ValueError(
                f"{begin} clients of {strategy.name!r} do more than train one model by its own loss: {remedy}"
            )
        if args.client_parallelism == "data":
            raise ValueError(f"{begin} `client_parallelism` is 'data', where all processes train one client: {remedy}")
        for name in ("keep_client_optimizer", "torch_compile"):
            if vars(args)[name]:
                raise ValueError(
                    f"{begin} `{name}` is True, which is for clients one by one: leave it out, or {remedy}"
                )
        optimizer = OptimizerNames(args.optim)
        if optimizer not in WEIGHT_BY_WEIGHT:
            raise ValueError(
                f"{begin} `optim` is {optimizer.value!r}, and only optimizers that treat each weight by itself can "
                f"train several models as one: choose one of {', '.join(WEIGHT_BY_WEIGHT)}, or {remedy}"
            )

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        return self.stacked.groups(sizes)

    def reading(self, clients: Sequence[tuple[Subset, int]]) -> Reading:
        return self.stacked.reading(clients)

    def train_group(self, rows: dict[int, Tensor], round_index: int) -> dict[int, tuple[ClientTask, Payload]]:
        return self.participants.train_at_once(rows, round_index, self.stacked.train) if len(rows) > 1 else {}

    def try_out(self, dataset: Subset) -> None:
        self.stacked.try_out(dataset)


class Together(EachItsOwn):
    """
    Has all processes train each participant together, each on its share of every batch. All end with the same row,
    reply and what stays; those of the main process count. They take turns to probe.
    """

    @classmethod
    def refuse(cls, client_model: nn.Module, args: EngineArguments, strategy: Strategy) -> None:
        """Raises `ValueError` where the gradient of a batch is not the mean of those of its rows."""
        begin = "`client_parallelism` is 'data', but"
        remedy = 'choose "clients".'
        if not strategy.shares_batches:
            raise ValueError(
                f"{begin} clients of {strategy.name!r} have other architectures, or a loss of whole batches: {remedy} "
                "(One of your own whose clients train by `local.steps` and `local.step` says so by `shares_batches`.)"
            )
        for name, _ in client_model.named_buffers():
            if name.endswith("running_mean"):
                raise ValueError(f"{begin} `{name}` of the model is a statistic of whole batches: {remedy}")
        if isinstance(client_model, FedMoEPreTrainedModel) and client_model.config.balance_weight:
            raise ValueError(
                f"{begin} the `balance_weight` {client_model.config.balance_weight} of the mixture is that of a loss "
                f"of whole batches: set it to 0 in the mixture's configuration, or {remedy}"
            )

    def train(self, client: int, round_index: int, row_P: Tensor) -> tuple[Reply, dict[str, Tensor]]:
        """Trains a participant; see [`Participants.train`]."""
        return self.participants.train(client, round_index, row_P)

    def plan(self, chosen: list[int]) -> Plan:
        places = [[place] for place in range(len(chosen))]
        return Plan(chosen, [0] * len(chosen), places if self.processes.index == 0 else [])

    def fit(
        self, plan: Plan, round_index: int, uploads: Rows, on_client: Callable[[int], None]
    ) -> tuple[list[Reply], dict[int, dict]]:
        participants, process_group = self.participants, self.participants.local_trainer.process_group
        retained: dict[int, dict] = {}
        replies: list[Reply] = []
        errors: list[Exception] = []
        marks: list[tuple[float, float] | None] = []
        with process_group.together():
            participants.read_ahead([[client] for client in plan.chosen], round_index, self.reading)
        for place, client in enumerate(plan.chosen):
            row_P = uploads.row(place)
            with process_group.together():
                try:
                    reply, kept = self.train(client, round_index, row_P)
                except soundness.BrokenPromiseError as error:
                    errors.append(error)
                    reply, kept = Reply(fault=str(error)), {}
            replies.append(reply)
            marks.append(soundness.mark_of(row_P) if reply.fault is None else None)
            if self.processes.index == 0:
                retained[client] = kept
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

        gathered, all_marks = zip(*self.processes.gather(own_replies), strict=True)
        soundness.check_alike(participants.strategy, plan.chosen, all_marks)
        replies = gathered[0]
        for place, reply in enumerate(replies):
            reply.fault = next((told[place].fault for told in gathered if told[place].fault is not None), None)
            reply.probed = gathered[place % self.processes.count][place].probed
        return replies, retained


class TogetherByZero(Together):
    """
    Has all processes train each participant together by DeepSpeed.

    Args:
        participants ([`Participants`]), processes ([`Processes`]): As in [`EachItsOwn`].
        zero ([`ZeroTraining`]): Trains one.
    """

    def __init__(self, participants: Participants, processes: Processes, zero: ZeroTraining):
        super().__init__(participants, processes)
        self.zero = zero

    @classmethod
    def refuse(cls, client_model: nn.Module, args: EngineArguments, strategy: Strategy) -> None:
        begin, remedy = "The clients are to be trained by DeepSpeed, but", "leave DeepSpeed out."
        if not has_plain_clients(strategy):
            raise ValueError(
                f"{begin} those of {strategy.name!r} do more than train one model by its own loss: {remedy}"
            )
        if isinstance(client_model, FedMoEPreTrainedModel):
            raise ValueError(
                f"{begin} those of {strategy.name!r} train a whole mixture, which was never tried: {remedy}"
            )
        if args.torch_compile:
            raise ValueError(
                f"{begin} `torch_compile` is True, which would compile a model that its engine does not use: {remedy}"
            )
        if args.keep_client_optimizer:
            raise ValueError(
                f"{begin} `keep_client_optimizer` is True, and each process has a part of its state: {remedy}"
            )
        super().refuse(client_model, args, strategy)

    def train(self, client: int, round_index: int, row_P: Tensor) -> tuple[Reply, dict[str, Tensor]]:
        return self.participants.train(client, round_index, row_P, fit=self.zero.fit)
