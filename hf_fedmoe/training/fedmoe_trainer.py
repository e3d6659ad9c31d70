"""`FederatedTrainer` for Fed-MoE."""

import dataclasses
from typing import Any

from ..models import FedMoEPreTrainedModel
from ..strategies import FedMoE, FedMoESettings
from .checks import check_parts
from .federated_arguments import FederatedTrainingArguments
from .federated_trainer import FederatedTrainer


class FedMoETrainer(FederatedTrainer):
    """
    Trains a server-side Mixture-of-Experts from clients' models (Fed-MoE, IJCAI 2025), with the settings of `args`.

    Args:
        model ([`~models.FedMoEForSequenceClassification`]): The mixture; all experts from one initialisation.
        args ([`FederatedTrainingArguments`]): Including Fed-MoE's own settings.
        kwargs: As in [`FederatedTrainer`], without `strategy`.
    """

    def __init__(self, model: FedMoEPreTrainedModel, args: FederatedTrainingArguments, **kwargs: Any):
        if "strategy" in kwargs:
            raise ValueError(
                f"`strategy` is {kwargs['strategy']!r}, but a `FedMoETrainer` trains by Fed-MoE: leave it out, or "
                "take a `FederatedTrainer`."
            )
        check_parts(model, args, FedMoE())  # before settings are read of `args`
        settings = FedMoESettings(
            **{field.name: vars(args)[field.name] for field in dataclasses.fields(FedMoESettings)}
        )
        super().__init__(model, args, strategy=FedMoE(settings), **kwargs)
