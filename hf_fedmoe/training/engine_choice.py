"""The engine that arguments ask for, and what trains a mixture's gate beside it."""

from torch import nn

from ..federation import (
    EachItsOwn,
    Participants,
    Processes,
    SomeAtOnce,
    StackedTraining,
    Together,
    TogetherByZero,
    ZeroTraining,
)
from ..models import FedMoEPreTrainedModel
from ..strategies import GateFit, ZeroGateFit
from .deepspeed_config import engine_config
from .federated_arguments import FederatedTrainingArguments


def engine_kind(args: FederatedTrainingArguments) -> type[EachItsOwn]:
    """Returns the class of the engine that trains clients."""
    if args.clients_at_once > 1:
        return SomeAtOnce
    if args.deepspeed:
        return TogetherByZero
    return Together if args.client_parallelism == "data" else EachItsOwn


def make_engine(args: FederatedTrainingArguments, participants: Participants, processes: Processes) -> EachItsOwn:
    """Returns the engine, at work on these participants."""
    kind, local = engine_kind(args), participants.local_trainer
    if issubclass(kind, SomeAtOnce):
        constant_rate = args.lr_scheduler_type == "constant" or args.lr_scheduler_scope == "run"
        return kind(participants, processes, StackedTraining(local, args.clients_at_once, constant_rate))
    if issubclass(kind, TogetherByZero):
        assert isinstance(args.deepspeed, dict)  # they have read it
        config = engine_config(args.deepspeed, args, local.accelerator.mixed_precision)
        return kind(participants, processes, ZeroTraining(local, config))
    return kind(participants, processes)


def make_gate_fit(
    args: FederatedTrainingArguments, model: nn.Module, processes: Processes, mixed_precision: str
) -> GateFit | None:
    """Returns by what all processes train a mixture's gate together, `None` if they do not."""
    if args.client_parallelism != "data" or not isinstance(model, FedMoEPreTrainedModel):
        return None
    if isinstance(args.deepspeed, dict) and model.config.gate == "model":
        return ZeroGateFit(model, processes, engine_config(args.deepspeed, args, mixed_precision))
    return GateFit(model, processes)
