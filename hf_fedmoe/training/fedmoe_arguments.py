"""Settings of a run of Fed-MoE: those of any federated run, and the method's own."""

from dataclasses import dataclass

from ..strategies import FedMoESettings
from .federated_arguments import FederatedTrainingArguments


@dataclass
class FedMoETrainingArguments(FedMoESettings, FederatedTrainingArguments):
    """
    [`FederatedTrainingArguments`] of a [`FedMoETrainer`], with the settings of [`FedMoESettings`] besides.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolve_preset()
