"""Narrower types, for type checkers: a method has made sure of them before its first round, and none fails later."""

from torch import nn
from transformers import PreTrainedModel

from ..data import ReservedSet
from ..federation import ServerStep
from ..models import FedMoEPreTrainedModel


def as_mixture(model: nn.Module) -> FedMoEPreTrainedModel:
    """Returns the model of a method whose `server_models` takes mixtures only."""
    assert isinstance(model, FedMoEPreTrainedModel)
    return model


def as_whole(model: nn.Module) -> PreTrainedModel:
    """Returns a client's model of a method whose `server_models` refuses adapters."""
    assert isinstance(model, PreTrainedModel)
    return model


def reserved_of(step: ServerStep) -> ReservedSet:
    """Returns the reserved set of a method that says that it needs one."""
    assert step.reserved is not None
    return step.reserved
