"""
Small convolutional networks as Hugging Face models. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, N channels of the image, Y height, X width, F filters, H hidden.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .configuration_small_cnn import SmallCNNConfig


class SmallCNNPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: SmallCNNConfig
    config_class = SmallCNNConfig
    base_model_prefix = "small_cnn"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As torch does by itself, and so the papers: a normal distribution of 0.02 starts these networks too small.
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)


class SmallCNNModel(SmallCNNPreTrainedModel):
    """
    Convolutions and fully connected layers without a head: the shared part of methods with personal heads.

    Args:
        config ([`SmallCNNConfig`]):
            The configuration. Weights are random.
    """

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__(config)
        widths = (config.num_channels, *config.channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(wide_in, wide_out, config.kernel_size, padding=config.padding)
            for wide_in, wide_out in itertools.pairwise(widths)
        )
        sizes = (config.flat_size, *config.hidden_sizes)
        self.hidden = nn.ModuleList(nn.Linear(size_in, size_out) for size_in, size_out in itertools.pairwise(sizes))
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Computes the features of a batch of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, image_size, image_size)`):
                The images.

        Returns:
            `BaseModelOutputWithPoolingAndNoAttention`: `last_hidden_state`, the last feature map, and
            `pooler_output` of shape `(B, H)`, the last hidden layer.

        Raises:
            `ValueError`: If the images have another shape.
        """
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}, but `num_channels` = "
                f"{config.num_channels} and `image_size` = {config.image_size} ask for (batch, "
                f"{', '.join(map(str, expected))}): convert and resize the images with an image processor, or build "
                "the model with their `num_channels` and `image_size`."
            )
        maps_BFYX = pixel_values
        for convolution in self.convolutions:
            maps_BFYX = nn.functional.max_pool2d(convolution(maps_BFYX).relu(), 2)
        features_BH = maps_BFYX.flatten(1)
        for layer in self.hidden:
            features_BH = layer(features_BH).relu()
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=maps_BFYX, pooler_output=features_BH)


class SmallCNNForImageClassification(SmallCNNPreTrainedModel):
    """
    A [`SmallCNNModel`] with a linear head.

    Args:
        config ([`SmallCNNConfig`]):
            The configuration. Weights are random.
    """

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__(config)
        self.small_cnn = SmallCNNModel(config)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """
        Classifies a batch of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, image_size, image_size)`):
                The images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            `ImageClassifierOutputWithNoAttention`: `loss` and `logits` of shape `(B, C)`.
        """
        logits_BC = self.classifier(self.small_cnn(pixel_values).pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits_BC, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits_BC)
