"""
`round.py` for images: what a federated round costs beyond its training, and which share of it the images take.

The trainer reads bytes from a column of a dataset, which [`decode_images`] filled once, and collates them with
[`ImageCollator`]. The bare loop has all images as tensors in memory, slices its batches from them and calls the same
augmentations; it averages running statistics of BatchNorm by the same rule, so that it ends with the same weights.
Images are scikit-learn's digits, repeated where they do not suffice and resized.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, spread
from round import BareLoop, Turns, print_turns, take_turns
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, ResNetForImageClassification
from transformers.utils import logging

from hf_fedmoe.data import AUGMENTATIONS, FederatedDataset, ImageCollator, decode_images, iid, load_source
from hf_fedmoe.models import (
    SmallCNNConfig,
    SmallCNNForImageClassification,
    SmallImageProcessor,
    SmallImageResNetConfig,
)


@dataclass(frozen=True)
class Shape:
    config: PreTrainedConfig
    image_size: int
    augmentation: str
    batch_size: int
    clients: int
    examples: int


SHAPES = {
    "cnn": Shape(SmallCNNConfig(num_labels=62), 28, "characters", batch_size=64, clients=10, examples=200),
    "resnet": Shape(
        SmallImageResNetConfig(embedding_size=16, hidden_sizes=(16, 32, 64, 128), num_labels=10),
        *(32, "photographs"),
        batch_size=32,
        clients=4,
        examples=100,
    ),
}


class Augment:
    """All augmentations as one, on a class: there [`StageClock`] can wrap it."""

    def __init__(self, name: str):
        self.functions = AUGMENTATIONS[name]

    def __call__(self, pixels: Tensor) -> Tensor:
        for function in self.functions:
            pixels = function(pixels)
        return pixels


class ImageLoop(BareLoop):
    """Federated averaging on images that lie in memory, a tensor of bytes for each client."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        (self.augment,) = self.collate.augmentations
        self.images = [self.as_tensor(rows["pixel_values"]) for rows in self.clients]
        self.labels = [torch.tensor(rows["label"]) for rows in self.clients]

    def as_tensor(self, images: Iterable[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8).view(-1, *self.collate.shape)

    def load(self, client: int, order: list[list[int]]) -> Iterable[dict[str, Tensor]]:
        torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws a seed for its workers
        for rows in order:
            pixels, labels = self.read(client, rows)
            yield {"pixel_values": self.normalise(self.augment(pixels)), "labels": labels}

    def read(self, client: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[client][rows], self.labels[client][rows]

    def normalise(self, pixels: Tensor) -> Tensor:
        # [-1, 1], as the processor by default; channels last, as the collator makes them
        normalised = torch.empty(pixels.shape, memory_format=torch.channels_last)
        return torch.mul(pixels, 2 / 255, out=normalised).sub_(1)

    def average(self, states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
        # The variance of all clients together: their means differ, which adds to the mean of their variances.
        means = {f"{name.removesuffix('mean')}var": name for name in states[0] if name.endswith("running_mean")}
        moments = [state | {var: state[var] + state[mean].square() for var, mean in means.items()} for state in states]
        result = super().average(moments, sizes)
        return result | {var: result[var] - result[mean].square() for var, mean in means.items()}


PIPELINE = ("data loader", "read rows", "augment", "join, normalise")
STAGES = [
    *((ImageLoop, "read", "read rows"), (Augment, "__call__", "augment")),
    *((ImageCollator, "__call__", "join, normalise"), (ImageLoop, "normalise", "join, normalise")),
    *((SmallCNNForImageClassification, "forward", "forward"), (ResNetForImageClassification, "forward", "forward")),
]


def image_clients(num_clients: int, num_examples: int, processor: SmallImageProcessor) -> FederatedDataset:
    digits, count = load_source("digits")["train"], num_clients * num_examples
    rows = digits.select(np.resize(np.arange(len(digits)), count))
    return FederatedDataset(rows, iid(count, num_clients)).map(
        partial(decode_images, image_processor=processor), batched=True, remove_columns=["image"]
    )


def as_files(data: datasets.Dataset, collate: ImageCollator, processor: SmallImageProcessor) -> datasets.Dataset:
    """Stores the images as PNG, decoded whenever they are read."""
    pixels = np.frombuffer(b"".join(data["pixel_values"]), dtype=np.uint8).reshape(-1, *collate.shape)
    images = [image.squeeze() for image in pixels.transpose(0, 2, 3, 1)]
    features = datasets.Features({"image": datasets.Image(), "label": data.features["label"]})
    files = datasets.Dataset.from_dict({"image": images, "label": data["label"]}, features=features)
    return files.with_transform(lambda rows: decode_images(rows, processor) | {"label": rows["label"]})


def print_pipeline(turns: Turns, processor: SmallImageProcessor) -> None:
    bare, ours = turns.bare, turns.stages["trainer"].seconds
    stored, order = bare.clients[0], bare.order(0, 0)
    kinds = {"bytes, decoded once": stored, "PNG, decoded in every epoch": as_files(stored, bare.collate, processor)}

    def read(rows: datasets.Dataset) -> None:
        for batch in order:
            rows.__getitems__(batch)

    seconds = alternate({kind: partial(read, rows) for kind, rows in kinds.items()}, turns.repetitions, turns.clock)
    pipeline, table = sum(ours[stage] for stage in PIPELINE), []
    usual = statistics.median(seconds["bytes, decoded once"])
    for kind, values in seconds.items():
        more = (statistics.median(values) - usual) * len(bare.clients)
        share = (pipeline + more) / (ours.total() + more)
        table.append([kind, spread(values, 1e6 / len(stored), 1), f"{100 * share:.1f}"])
    print_table(
        f"Data pipeline of the trainer: {'; '.join(PIPELINE)}",
        ["", "microseconds to read an image", "share of a round, %"],
        table,
    )


def main() -> None:
    parser = benchmark_parser("A round of FederatedTrainer on images against a bare PyTorch loop.")
    add_device(parser)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="Which to measure.")
    parser.add_argument("--repetitions", type=int, default=5, help="Rounds that count, after one that does not.")
    args = parser.parse_args()
    if args.quick:
        args.repetitions = 2
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in args.models:
        shape = SHAPES[name]
        clients, examples = (2, shape.examples // 2) if args.quick else (shape.clients, shape.examples)
        processor = SmallImageProcessor(num_channels=shape.config.num_channels, size=shape.image_size)
        collate = ImageCollator(processor, [Augment(shape.augmentation)])
        data = image_clients(clients, examples, processor)
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(shape.config)
        turns = take_turns(model, data, collate, shape.batch_size, args, clock, ImageLoop, STAGES)
        size = f"{model.num_parameters() / 1e6:.2f}M parameters"
        print_turns(turns, f"{name}: a round of {clients} clients of {examples} images, {size}")
        print_pipeline(turns, processor)


if __name__ == "__main__":
    main()
