"""ResNets for images of 32 pixels, such as CIFAR's: a 3x3 stem that keeps the size, and no max-pooling."""

from transformers import AutoConfig, AutoModelForImageClassification

from .configuration_small_image_resnet import SmallImageResNetConfig
from .modeling_small_image_resnet import SmallImageResNetForImageClassification


# `exist_ok`: the same classes may have been registered as remote code of a downloaded checkpoint before.
AutoConfig.register(SmallImageResNetConfig.model_type, SmallImageResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallImageResNetConfig, SmallImageResNetForImageClassification, exist_ok=True)
# Puts the source files beside saved weights, so that they load where this package is not installed.
SmallImageResNetConfig.register_for_auto_class()
SmallImageResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["SmallImageResNetConfig", "SmallImageResNetForImageClassification"]
