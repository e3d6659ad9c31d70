"""A linear classifier of a vector of numbers, for synthetic experiments, as a Hugging Face model."""

from transformers import AutoConfig, AutoModel

from .configuration_linear import LinearConfig
from .modeling_linear import LinearForClassification


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(LinearConfig.model_type, LinearConfig, exist_ok=True)
# transformers has no Auto class for classifiers of plain vectors.
AutoModel.register(LinearConfig, LinearForClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
LinearConfig.register_for_auto_class()
LinearForClassification.register_for_auto_class("AutoModel")

__all__ = ["LinearConfig", "LinearForClassification"]
