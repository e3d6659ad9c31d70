"""Image classifiers, batches and federations small enough for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import datasets
import numpy as np
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import (
    SmallCNNConfig,
    SmallCNNForImageClassification,
    SmallImageProcessor,
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


def tiny_stock_resnet(num_labels: int = 4) -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    return _classifier(ResNetForImageClassification, config, num_labels)


def tiny_mobilenet(num_labels: int = 4) -> MobileNetV2ForImageClassification:
    config = MobileNetV2Config(depth_multiplier=0.25, min_depth=4, depth_divisible_by=4)
    return _classifier(MobileNetV2ForImageClassification, config, num_labels)


def tiny_vit(num_labels: int = 4) -> ViTForImageClassification:
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    config = ViTConfig(**sizes, image_size=IMAGE_SIZE, patch_size=4, hidden_dropout_prob=0.0)
    return _classifier(ViTForImageClassification, config, num_labels)


def tiny_convnext(num_labels: int = 4) -> ConvNextForImageClassification:
    config = ConvNextConfig(patch_size=2, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, image_size=IMAGE_SIZE)
    return _classifier(ConvNextForImageClassification, config, num_labels)


def _classifier(kind: type[PreTrainedModel], config: PreTrainedConfig, num_labels: int) -> PreTrainedModel:
    config.num_labels = num_labels
    return kind(config).eval()


IMAGE_FAMILIES = {
    "small_cnn": tiny_cnn,
    "small_image_resnet": tiny_resnet,
    "resnet": tiny_stock_resnet,
    "mobilenet_v2": tiny_mobilenet,
    "vit": tiny_vit,
    "convnext": tiny_convnext,
}


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


@contextmanager
def runs_at_risk() -> Iterator[list[tuple[int, ...]]]:
    """Collects the shapes of maps whose convolution may write beyond its memory in the backward."""
    conv2d, found = torch.nn.functional.conv2d, []

    def recorded(maps, weight, bias=None, stride=1, padding=0, *rest):
        narrow = weight.shape[1] < 16 and weight.shape[-2:] == (1, 1) and tuple(padding) == (0, 0)
        if narrow and max(stride) > 1 and all(size % s == 0 for size, s in zip(maps.shape[-2:], stride, strict=True)):
            found.append(tuple(maps.shape))
        return conv2d(maps, weight, bias, stride, padding, *rest)

    with mock.patch("torch.nn.functional.conv2d", recorded):
        yield found


def image_batch(size: int = 8, num_channels: int = 3, image_size: int = IMAGE_SIZE, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, num_channels, image_size, image_size, generator=generator)}


def tiny_processor(num_channels: int = 3) -> SmallImageProcessor:
    return SmallImageProcessor(num_channels=num_channels, size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def tiny_image_federation(
    num_clients: int = 4, client_size: int = 12, reserved_size: int = 24, num_labels: int = 4
) -> FederatedDataset:
    """Decoded colour images, brighter in one quarter, which is their class; a reserved set and 20 validation rows."""
    rng = np.random.default_rng(0)
    num_rows = num_clients * client_size + reserved_size + 20
    labels = rng.integers(num_labels, size=num_rows)
    pixels = rng.integers(0, 160, (num_rows, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    half = IMAGE_SIZE // 2
    for image_NYX, label in zip(pixels, labels, strict=True):
        row, column = half * (label // 2), half * (label % 2)
        image_NYX[:, row : row + half, column : column + half] += 90
    pool = datasets.Dataset.from_dict(
        {"pixel_values": [image.tobytes() for image in pixels], "label": labels},
        features=datasets.Features(
            {"pixel_values": datasets.Value("binary"), "label": datasets.ClassLabel(num_labels)}
        ),
    )
    clients = np.split(np.arange(num_clients * client_size), num_clients)
    rest = np.arange(num_clients * client_size, num_rows)
    return FederatedDataset(pool, clients, reserved=rest[:reserved_size], validation=rest[reserved_size:])
