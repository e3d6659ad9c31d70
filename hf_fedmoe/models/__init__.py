"""What is saved, pushed and loaded: the server Mixture-of-Experts as an ordinary Hugging Face model."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .adapters_fedmoe import AdapterExpert, as_expert
from .char_lstm import CharLSTMConfig, CharLSTMForSequenceClassification, CharLSTMModel
from .classification_head import classification_head
from .configuration_adapted import AdaptedConfig
from .configuration_fedmoe import FedMoEConfig
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
from .mixture_fedmoe import FedMoEOutput, dense_mixture, gating_entropy, load_imbalance, select_experts
from .modeling_adapted import AdaptedClassifier, AdaptedForImageClassification, AdaptedForSequenceClassification
from .modeling_fedmoe import FedMoEForSequenceClassification, FedMoEPreTrainedModel
from .modeling_fedmoe_vision import FedMoEForImageClassification
from .modeling_paired_experts import (
    PairedExpertsForImageClassification,
    PairedExpertsForSequenceClassification,
    PairedExpertsPreTrainedModel,
)
from .narrow_convolutions import guard_narrow_convolutions
from .small_cnn import SmallCNNConfig, SmallCNNForImageClassification, SmallCNNModel
from .small_image_resnet import SmallImageResNetConfig, SmallImageResNetForImageClassification


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
AutoModelForImageClassification.register(AdaptedConfig, AdaptedForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(AdaptedConfig, AdaptedForSequenceClassification, exist_ok=True)
AutoConfig.register(FedMoEConfig.model_type, FedMoEConfig, exist_ok=True)
AutoModelForImageClassification.register(FedMoEConfig, FedMoEForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(FedMoEConfig, FedMoEForSequenceClassification, exist_ok=True)
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
    "FedMoEConfig",
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
    "as_expert",
    "classification_head",
    "dense_mixture",
    "gating_entropy",
    "guard_narrow_convolutions",
    "load_imbalance",
    "select_experts",
]
