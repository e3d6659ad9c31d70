"""pFedMM: a mixture of experts under a mixture of data distributions, with one backbone and M heads."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..models import MultiHeadPreTrainedModel
from .fedem import FedEM


@dataclass
class PFedMM(FedEM):
    """
    [`FedEM`] with one backbone under M heads: each client mixes the heads by weights pi of its own.

    A round of a client is that of FedEM, but the heads learn at the learning rate of the arguments and the backbone at
    M times it (FedEM trains the same model with one rate). The server averages all M + 1 modules over
    the participants.

    Args:
        num_em_steps (`int`, *optional*, defaults to 1): Updates of q and pi before each local training, and from the
            uniform pi before a client that keeps none is evaluated.
        include_absent (`bool`, *optional*, defaults to `False`): Whether clients that did not take part have their
            part in the average all the same, with the modules of before the round. Weights are then n_c / n over all
            clients.
    """

    name = "pfedmm"
    trains = "heads"

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        if not isinstance(model, MultiHeadPreTrainedModel):
            raise ValueError(
                f"pFedMM trains one backbone with several heads, `model` is a {type(model).__name__}: give it heads "
                "with `MultiHeadForSequenceClassification.from_classifier(model, num_heads=3)`."
            )
        return [model]

    def learning_rate_factors(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, MultiHeadPreTrainedModel)
        backbone = (name for name, _ in model.named_parameters() if name.startswith("backbone."))
        return dict.fromkeys(backbone, float(len(model.models)))
