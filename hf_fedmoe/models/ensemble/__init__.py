"""Several classifiers and one weight for each, as FedEM trains them."""

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from .configuration_ensemble import EnsembleConfig
from .modeling_ensemble import (
    EnsembleForImageClassification,
    EnsembleForSequenceClassification,
    EnsembleOutput,
    EnsemblePreTrainedModel,
)


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModelForImageClassification.register(EnsembleConfig, EnsembleForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(EnsembleConfig, EnsembleForSequenceClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
EnsembleConfig.register_for_auto_class()
EnsembleForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EnsembleForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "EnsembleConfig",
    "EnsembleForImageClassification",
    "EnsembleForSequenceClassification",
    "EnsembleOutput",
    "EnsemblePreTrainedModel",
]
