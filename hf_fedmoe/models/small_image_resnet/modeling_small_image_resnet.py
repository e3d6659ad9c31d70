"""A ResNet for small images. Flat: the file travels to the Hub as it is."""

from torch import nn
from transformers import ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from .configuration_small_image_resnet import SmallImageResNetConfig


class SmallImageResNetForImageClassification(ResNetForImageClassification):
    """
    `ResNetForImageClassification` with a 3x3 stem of stride 1 and no max-pooling: the usual 7x7 stem of stride 2 with
    pooling would leave 8x8 pixels of an image of 32x32 before the first residual layer.

    Args:
        config ([`SmallImageResNetConfig`]):
            The configuration. Weights are random.
    """

    config_class = SmallImageResNetConfig

    def __init__(self, config: SmallImageResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        stem.pooler = nn.Identity()  # type: ignore[assignment]  # any module will do
        self.post_init()
