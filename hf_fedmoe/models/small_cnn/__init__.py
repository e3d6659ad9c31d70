"""The small convolutional networks of the federated literature (FEMNIST, EMNIST, CIFAR) as Hugging Face models."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_small_cnn import SmallCNNConfig
from .modeling_small_cnn import SmallCNNForImageClassification, SmallCNNModel, SmallCNNPreTrainedModel


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(SmallCNNConfig.model_type, SmallCNNConfig, exist_ok=True)
AutoModel.register(SmallCNNConfig, SmallCNNModel, exist_ok=True)
AutoModelForImageClassification.register(SmallCNNConfig, SmallCNNForImageClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
SmallCNNConfig.register_for_auto_class()
SmallCNNModel.register_for_auto_class("AutoModel")
SmallCNNForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["SmallCNNConfig", "SmallCNNForImageClassification", "SmallCNNModel", "SmallCNNPreTrainedModel"]
