"""
One backbone, several heads and one weight for each, as pFedMM trains them. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, M heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_ensemble import EnsembleConfig
from .configuration_multi_head import MultiHeadConfig
from .modeling_ensemble import (
    EnsembleForImageClassification,
    EnsembleForSequenceClassification,
    EnsembleOutput,
    EnsemblePreTrainedModel,
)


class SharedBackbone(nn.Module):
    """Stands in each head where its backbone was. The first head that asks runs the shared one, all get its output."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.shared = (backbone,)  # in a tuple: its weights belong to the model, not to each head
        self.kept: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is None:
            self.kept = self.shared[0](*args, **kwargs)
        return self.kept


class MultiHeadPreTrainedModel(EnsemblePreTrainedModel):
    """
    An ensemble whose classifiers share their backbone, which runs once for a batch. The head is everything that lies
    outside of the backbone (`base_model_prefix`), dropout included: `models` are the M heads.
    """

    config: MultiHeadConfig
    config_class: type[MultiHeadConfig] = MultiHeadConfig

    def _make_models(self, config: EnsembleConfig) -> nn.ModuleList:
        heads = super()._make_models(config)
        first = heads[0]
        assert isinstance(first, PreTrainedModel)
        prefix = first.base_model_prefix
        if not prefix or not isinstance(getattr(first, prefix, None), nn.Module):
            raise ValueError(
                f"`expert_config` is that of {type(first).__name__}, which has no backbone of its own, so that "
                "nothing tells where its head begins: take a classifier with a `base_model_prefix`, or train whole "
                "models in an ensemble."
            )
        self.backbone = getattr(first, prefix)
        features = SharedBackbone(self.backbone)
        for head in heads:
            setattr(head, prefix, features)
        return heads

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the backbone."""
        return self.backbone.get_input_embeddings()

    def _classify(self, batch: dict[str, Tensor | None], labels: Tensor | None) -> EnsembleOutput:
        features = getattr(self._first, self._first.base_model_prefix)
        features.kept = None
        try:
            return super()._classify(batch, labels)
        finally:
            features.kept = None  # the graph of a batch must not outlive it

    @classmethod
    @torch.no_grad()
    def from_classifier(
        cls, classifier: PreTrainedModel, num_heads: int = 3, seed: int = 0
    ) -> "MultiHeadPreTrainedModel":
        """
        Gives a classifier more heads: all but the first are drawn anew, with the spread of its weights. Equal heads
        would stay equal.

        Args:
            classifier (`PreTrainedModel`):
                The classifier, which is copied.
            num_heads (`int`, *optional*, defaults to 3):
                Number M of heads.
            seed (`int`, *optional*, defaults to 0):
                Seed of the heads.

        Returns:
            The model, in evaluation mode.

        Raises:
            `ValueError`: If `classifier` is not what the Auto class builds, or its head cannot be told apart.
        """
        model = super().from_classifier(classifier, num_heads, seed)
        model.backbone.load_state_dict(classifier.base_model.state_dict())
        return model


class MultiHeadForSequenceClassification(MultiHeadPreTrainedModel, EnsembleForSequenceClassification):
    """
    A text classifier with several heads, whose probabilities are mixed with the weights `mixture_M`.

    Args:
        config ([`MultiHeadConfig`]):
            The configuration. Weights are random, those of the mixture equal.
    """


class MultiHeadForImageClassification(MultiHeadPreTrainedModel, EnsembleForImageClassification):
    """
    An image classifier with several heads, whose probabilities are mixed with the weights `mixture_M`.

    Args:
        config ([`MultiHeadConfig`]):
            The configuration. Weights are random, those of the mixture equal.
    """
