"""
Measures what it saves that [`ImageCollator`] makes batches with channels last in memory: local steps on such a batch
and on one with channels first, in turns.
"""

import torch
from compiled import Steps, images
from machine import add_device, alternate, benchmark_parser, pin_threads, print_table, ratios, spread
from torch import Tensor
from transformers import AutoModelForImageClassification, MobileNetV2Config
from transformers.utils import logging

from hf_fedmoe.models import SmallCNNConfig, SmallImageResNetConfig


NARROW = dict(embedding_size=16, hidden_sizes=(16, 32, 64, 128))
MODELS = {
    "CNN of 6.6M, 64 grey images of 28x28": (SmallCNNConfig(num_labels=62), images(64, 1, 28, 62)),
    "CNN, 32 images of 32x32 in colour": (
        SmallCNNConfig(num_labels=10, num_channels=3, image_size=32),
        images(32, 3, 32, 10),
    ),
    "ResNet-18 of 0.7M, 32 images of 32x32": (SmallImageResNetConfig(num_labels=10, **NARROW), images(32, 3, 32, 10)),
    "MobileNetV2, a third as wide, 32 images of 32x32": (
        MobileNetV2Config(num_labels=10, depth_multiplier=0.35, image_size=32, finegrained_output=False),
        images(32, 3, 32, 10),
    ),
}


def channels_last(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = batch["pixel_values"]
    # `contiguous` leaves grey images as they are, for which both orders are one.
    return batch | {"pixel_values": torch.empty_like(pixels, memory_format=torch.channels_last).copy_(pixels)}


def main() -> None:
    parser = benchmark_parser("A local step on images with channels last in memory against channels first.")
    add_device(parser)
    parser.add_argument("--steps", type=int, default=5, help="Steps of a turn.")
    parser.add_argument("--repetitions", type=int, default=9, help="Turns that count, after one that does not.")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repetitions = 1, 2
    clock = pin_threads(args, args.device)
    logging.set_verbosity_error()
    rows = []
    for name, (config, first) in MODELS.items():
        candidates = {}
        for order, batch in {"first": first, "last": channels_last(first)}.items():
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(config)
            candidates[order] = Steps(model, batch, args.steps, args.device)
        seconds = alternate(candidates, args.repetitions, clock)
        milliseconds = [spread(seconds[order], 1e3 / args.steps, 1) for order in candidates]
        rows.append([name, *milliseconds, spread(ratios(seconds["first"], seconds["last"]))])
    print_table("A local step", ["", "first, ms", "last, ms", "first / last"], rows)


if __name__ == "__main__":
    main()
