"""Image classifiers and batches small enough for tests."""

import torch
from transformers import PreTrainedModel

from hf_fedmoe.models import (
    SmallCNNConfig,
    SmallCNNForImageClassification,
    SmallImageResNetConfig,
    SmallImageResNetForImageClassification,
)


IMAGE_SIZE = 8


def tiny_cnn(num_labels: int = 4, **config) -> SmallCNNForImageClassification:
    defaults = {"image_size": IMAGE_SIZE, "num_channels": 3, "channels": (3, 4), "kernel_size": 3, "padding": 1}
    defaults |= {"hidden_size": 6, "num_labels": num_labels}
    return SmallCNNForImageClassification(SmallCNNConfig(**defaults | config)).eval()


def tiny_resnet(num_labels: int = 4, **config) -> SmallImageResNetForImageClassification:
    defaults = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "num_labels": num_labels}
    return SmallImageResNetForImageClassification(SmallImageResNetConfig(**defaults | config)).eval()


IMAGE_FAMILIES = {"small_cnn": tiny_cnn, "small_image_resnet": tiny_resnet}


@torch.no_grad()
def make_statistics_different(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random running means and variances in place, as after training on different data."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def image_batch(size: int = 8, num_channels: int = 3, image_size: int = IMAGE_SIZE, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, num_channels, image_size, image_size, generator=generator)}
