"""The server Mixture-of-Experts as an ordinary Hugging Face model that is saved, pushed and loaded."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .adapters_fedmoe import AdapterExpert, as_expert
from .adapters_fedmoe_causal import base_sha256
from .char_lstm import CharLSTMConfig, CharLSTMForSequenceClassification, CharLSTMModel
from .classification_head import classification_head
from .configuration_adapted import AdaptedConfig
from .configuration_fedmoe import FedMoEConfig
from .configuration_fedmoe_causal import FedMoECausalConfig
from .configuration_paired_experts import PairedExpertsConfig
from .ensemble import (
    EnsembleConfig,
    EnsembleForImageClassification,
    EnsembleForSequenceClassification,
    EnsemblePreTrainedModel,
    MultiHeadConfig,
    MultiHeadForImageClassification,
    MultiHeadForSequenceClassification,
    MultiHeadPreTrainedModel,
)
from .image_processing_small_image import SmallImageProcessor
from .linear import LinearConfig, LinearForClassification
from .mixture_fedmoe import FedMoEOutput, client_prior, dense_mixture, gating_entropy, load_imbalance, select_experts
from .modeling_adapted import AdaptedClassifier, AdaptedForImageClassification, AdaptedForSequenceClassification
from .modeling_fedmoe import FedMoEForSequenceClassification, FedMoEPreTrainedModel
from .modeling_fedmoe_causal import FedMoEForCausalLM
from .modeling_fedmoe_vision import FedMoEForImageClassification
from .modeling_paired_experts import (
    PairedExpertsForImageClassification,
    PairedExpertsForSequenceClassification,
    PairedExpertsPreTrainedModel,
)
from .narrow_convolutions import guard_narrow_convolutions
from .router_fedmoe_causal import TextStatistics, ridge_router, text_statistics
from .small_cnn import SmallCNNConfig, SmallCNNForImageClassification, SmallCNNModel
from .small_image_resnet import SmallImageResNetConfig, SmallImageResNetForImageClassification


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
AutoModelForImageClassification.register(AdaptedConfig, AdaptedForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(AdaptedConfig, AdaptedForSequenceClassification, exist_ok=True)
AutoConfig.register(FedMoEConfig.model_type, FedMoEConfig, exist_ok=True)
AutoModelForImageClassification.register(FedMoEConfig, FedMoEForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(FedMoEConfig, FedMoEForSequenceClassification, exist_ok=True)
AutoConfig.register(FedMoECausalConfig.model_type, FedMoECausalConfig, exist_ok=True)
AutoModelForCausalLM.register(FedMoECausalConfig, FedMoEForCausalLM, exist_ok=True)
AutoConfig.register(PairedExpertsConfig.model_type, PairedExpertsConfig, exist_ok=True)
AutoModelForImageClassification.register(PairedExpertsConfig, PairedExpertsForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(PairedExpertsConfig, PairedExpertsForSequenceClassification, exist_ok=True)
# Found by its name, whatever model lies beside it.
AutoImageProcessor.register(SmallCNNConfig, image_processor_classes={"pil": SmallImageProcessor}, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
AdaptedConfig.register_for_auto_class()
AdaptedForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AdaptedForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FedMoEConfig.register_for_auto_class()
FedMoEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
FedMoEForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FedMoECausalConfig.register_for_auto_class()
FedMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
PairedExpertsConfig.register_for_auto_class()
PairedExpertsForImageClassification.register_for_auto_class("AutoModelForImageClassification")
PairedExpertsForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
SmallImageProcessor.register_for_auto_class()

__all__ = [
    "AdaptedClassifier",
    "AdaptedConfig",
    "AdaptedForImageClassification",
    "AdaptedForSequenceClassification",
    "AdapterExpert",
    "CharLSTMConfig",
    "CharLSTMForSequenceClassification",
    "CharLSTMModel",
    "EnsembleConfig",
    "EnsembleForImageClassification",
    "EnsembleForSequenceClassification",
    "EnsemblePreTrainedModel",
    "FedMoECausalConfig",
    "FedMoEConfig",
    "FedMoEForCausalLM",
    "FedMoEForImageClassification",
    "FedMoEForSequenceClassification",
    "FedMoEOutput",
    "FedMoEPreTrainedModel",
    "LinearConfig",
    "LinearForClassification",
    "MultiHeadConfig",
    "MultiHeadForImageClassification",
    "MultiHeadForSequenceClassification",
    "MultiHeadPreTrainedModel",
    "PairedExpertsConfig",
    "PairedExpertsForImageClassification",
    "PairedExpertsForSequenceClassification",
    "PairedExpertsPreTrainedModel",
    "SmallCNNConfig",
    "SmallCNNForImageClassification",
    "SmallCNNModel",
    "SmallImageProcessor",
    "SmallImageResNetConfig",
    "SmallImageResNetForImageClassification",
    "TextStatistics",
    "as_expert",
    "base_sha256",
    "classification_head",
    "client_prior",
    "dense_mixture",
    "gating_entropy",
    "guard_narrow_convolutions",
    "load_imbalance",
    "ridge_router",
    "select_experts",
    "text_statistics",
]
