"""`FederatedTrainer` for Fed-MoE."""

import dataclasses
from typing import Any

from ..models import FedMoEForCausalLM, FedMoEPreTrainedModel
from ..strategies import FedMoE, FedMoESettings
from .federated_trainer import FederatedTrainer
from .fedmoe_arguments import FedMoETrainingArguments


class FedMoETrainer(FederatedTrainer):
    """
    Trains a server-side Mixture-of-Experts from clients' models (Fed-MoE, IJCAI 2025), with the settings of `args`.

    Args:
        model ([`~models.FedMoEForSequenceClassification`]): The mixture; all experts from one initialisation.
        args ([`FedMoETrainingArguments`]): With Fed-MoE's own settings.
        kwargs: As in [`FederatedTrainer`], without `strategy`.
    """

    def __init__(self, model: FedMoEPreTrainedModel, args: FedMoETrainingArguments, **kwargs: Any):
        if "strategy" in kwargs:
            raise ValueError(
                f"`strategy` is {kwargs['strategy']!r}, but a `FedMoETrainer` trains by Fed-MoE: leave it out, or "
                "take a `FederatedTrainer`."
            )
        if isinstance(model, FedMoEForCausalLM):
            raise ValueError(
                "`model` is a FedMoEForCausalLM, whose router is found in closed form and not by Fed-MoE: take a "
                "`FederatedTrainer(model, args, data, strategy=Owners.by_name(model, data))`."
            )
        if not isinstance(args, FedMoETrainingArguments):
            raise ValueError(
                f"`args` is a {type(args).__name__}, which has no settings of Fed-MoE: make it a "
                "`FedMoETrainingArguments`, which takes the same arguments and those."
            )
        settings = FedMoESettings(
            **{field.name: vars(args)[field.name] for field in dataclasses.fields(FedMoESettings)}
        )
        super().__init__(model, args, strategy=FedMoE(settings), **kwargs)
