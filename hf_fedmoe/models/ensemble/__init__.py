"""Several classifiers, or heads of one backbone, and one weight for each, as FedEM and pFedMM train them."""

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from .configuration_ensemble import EnsembleConfig
from .configuration_multi_head import MultiHeadConfig
from .modeling_ensemble import (
    EnsembleForImageClassification,
    EnsembleForSequenceClassification,
    EnsembleOutput,
    EnsemblePreTrainedModel,
)
from .modeling_multi_head import (
    MultiHeadForImageClassification,
    MultiHeadForSequenceClassification,
    MultiHeadPreTrainedModel,
)


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModelForImageClassification.register(EnsembleConfig, EnsembleForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(EnsembleConfig, EnsembleForSequenceClassification, exist_ok=True)
AutoConfig.register(MultiHeadConfig.model_type, MultiHeadConfig, exist_ok=True)
AutoModelForImageClassification.register(MultiHeadConfig, MultiHeadForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(MultiHeadConfig, MultiHeadForSequenceClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
EnsembleConfig.register_for_auto_class()
EnsembleForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EnsembleForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MultiHeadConfig.register_for_auto_class()
MultiHeadForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MultiHeadForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "EnsembleConfig",
    "EnsembleForImageClassification",
    "EnsembleForSequenceClassification",
    "EnsembleOutput",
    "EnsemblePreTrainedModel",
    "MultiHeadConfig",
    "MultiHeadForImageClassification",
    "MultiHeadForSequenceClassification",
    "MultiHeadPreTrainedModel",
]
