"""What is saved, pushed and loaded: the server Mixture-of-Experts as an ordinary Hugging Face model."""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .configuration_fedmoe import FedMoEConfig
from .mixture_fedmoe import FedMoEOutput, dense_mixture, gating_entropy, load_imbalance, select_experts
from .modeling_fedmoe import FedMoEForSequenceClassification, FedMoEPreTrainedModel


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(FedMoEConfig.model_type, FedMoEConfig, exist_ok=True)
AutoModelForSequenceClassification.register(FedMoEConfig, FedMoEForSequenceClassification, exist_ok=True)
# Puts the two source files beside saved weights, so that they load where this package is not installed.
FedMoEConfig.register_for_auto_class()
FedMoEForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "FedMoEConfig",
    "FedMoEForSequenceClassification",
    "FedMoEOutput",
    "FedMoEPreTrainedModel",
    "dense_mixture",
    "gating_entropy",
    "load_imbalance",
    "select_experts",
]
