"""The character LSTM of the federated literature (Shakespeare) as a Hugging Face model."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_char_lstm import CharLSTMConfig
from .modeling_char_lstm import CharLSTMForSequenceClassification, CharLSTMModel, CharLSTMPreTrainedModel


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(CharLSTMConfig.model_type, CharLSTMConfig, exist_ok=True)
AutoModel.register(CharLSTMConfig, CharLSTMModel, exist_ok=True)
AutoModelForSequenceClassification.register(CharLSTMConfig, CharLSTMForSequenceClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
CharLSTMConfig.register_for_auto_class()
CharLSTMModel.register_for_auto_class("AutoModel")
CharLSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["CharLSTMConfig", "CharLSTMForSequenceClassification", "CharLSTMModel", "CharLSTMPreTrainedModel"]
