"""
Rounds whose clients are trained one by one, and at once (`clients_at_once`); on a GPU also one by one without CUDA
graphs. Whole runs of `FederatedTrainer` in turns, of which the clients' part of each round counts. Without dropout all
end with the same weights but for rounding.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from compiled import gpt2
from image_round import image_clients
from machine import add_device, benchmark_parser, pin_threads, print_table, ratios, spread
from peft import LoraConfig
from round import random_clients
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset, ImageCollator
from hf_fedmoe.models import (
    LinearConfig,
    LinearForClassification,
    SmallCNNConfig,
    SmallCNNForImageClassification,
    SmallImageProcessor,
    SmallImageResNetConfig,
    SmallImageResNetForImageClassification,
)
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments


BATCH = 10


@dataclass
class Kind:
    """Says what a row of the table is about: a model, and from (clients, examples of each) to its data."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[int, int], FederatedDataset]
    settings: dict[str, Any]


def features(num_clients: int, num_examples: int) -> FederatedDataset:
    rng, count = np.random.default_rng(0), num_clients * num_examples
    columns = {"features": rng.normal(size=(count, 60)).astype(np.float32), "label": rng.integers(0, 10, count)}
    # As arrays: to make tensors of lists of numbers would take most of a round.
    pool = datasets.Dataset.from_dict(columns).with_format("numpy")
    return FederatedDataset(pool, np.split(np.arange(count), num_clients), num_labels=10)


def digits(size: int, channels: int) -> dict[str, Any]:
    processor = SmallImageProcessor(num_channels=channels, size={"height": size, "width": size})
    return {
        "data": lambda *numbers: image_clients(*numbers, processor),
        "settings": {"data_collator": ImageCollator(processor)},
    }


def bert() -> nn.Module:
    shape = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(**shape, **quiet, vocab_size=2000, num_labels=4))


def small_resnet() -> nn.Module:
    shape = dict(embedding_size=16, hidden_sizes=(16, 32, 64, 128))
    return SmallImageResNetForImageClassification(SmallImageResNetConfig(**shape, num_labels=10))


KINDS = {
    "linear": Kind(
        "linear model of 60 features",
        lambda: LinearForClassification(LinearConfig(num_features=60, num_labels=10)),
        features,
        {},
    ),
    "cnn": Kind(
        "CNN of 6.6M, grey images of 28x28",
        lambda: SmallCNNForImageClassification(SmallCNNConfig(num_labels=62)),
        **digits(28, 1),
    ),
    "resnet": Kind("ResNet of 0.7M, images of 32x32", small_resnet, **digits(32, 3)),
    "gpt2": Kind("GPT-2, 2 layers of 128, 32 tokens", gpt2, random_clients, {}),
    "lora": Kind(
        "LoRA of rank 8 on a BERT of 6 layers of 256, 32 tokens",
        bert,
        random_clients,
        {"peft_config": LoraConfig(r=8)},
    ),
}


def with_unequal_clients(data: FederatedDataset) -> FederatedDataset:
    """Divides the rows into clients of a tenth to nearly twice as many."""
    count = len(data.pool)
    shares = np.random.default_rng(1).uniform(0.1, 1.9, data.num_clients)
    ends = np.round(np.cumsum(shares) / shares.sum() * count).astype(int)
    return FederatedDataset(data.pool, np.split(np.arange(count), ends[:-1]), num_labels=data.num_labels)


def run(
    kind: Kind, data: FederatedDataset, way: dict[str, Any], rounds: int, device: str
) -> tuple[list[float], list[Tensor]]:
    """Seconds of the clients' part of each round but the first, and the weights in the end."""
    torch.manual_seed(0)
    model = kind.model()
    if device == "cpu" and model.main_input_name == "input_ids":
        model.set_attn_implementation("eager")  # a few percent faster there than the math kernel of those at once
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedTrainingArguments(
            output_dir=folder,
            rounds=rounds + 1,
            clients_per_round=data.num_clients,
            **way,
            per_device_train_batch_size=BATCH,
            learning_rate=0.01,
            optim="sgd",
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        trainer = FederatedTrainer(model, args, data, **kind.settings)
        trainer.train()
    weights = [tensor.detach().float().cpu() for tensor in trainer.model.state_dict().values()]
    return [report.seconds["clients"] for report in trainer.rounds[1:]], weights


def main() -> None:
    parser = benchmark_parser("Rounds whose clients are trained one by one, and at once.")
    add_device(parser)
    parser.add_argument("--at_once", type=int, default=10, help="Clients that are trained at once.")
    parser.add_argument("--clients", type=int, default=20, help="Of a round.")
    parser.add_argument("--examples", type=int, default=50, help="Of a client.")
    parser.add_argument("--unequal", action="store_true", help="Clients of different sizes, as many on average.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Rows of the table.")
    parser.add_argument("--rounds", type=int, default=2, help="Of a run, after one that does not count.")
    parser.add_argument("--repetitions", type=int, default=3, help="Runs of each kind.")
    args = parser.parse_args()
    if args.quick:
        args.at_once, args.clients, args.examples, args.repetitions = 2, 2, 20, 1
    pin_threads(args, args.device)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    ways: dict[str, dict[str, Any]] = {"one by one": {}, f"{args.at_once} at once": {"clients_at_once": args.at_once}}
    if args.device == "cuda":
        ways = {"no graphs": {"cuda_graphs": False}, **ways}
    rows = []
    for kind in (KINDS[name] for name in args.kinds):
        data = kind.data(args.clients, args.examples)
        if args.unequal:
            data = with_unequal_clients(data)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repetitions):
            ends = []
            for name, values in seconds.items():
                found, weights = run(kind, data, ways[name], args.rounds, args.device)
                values += found
                ends.append(weights)
        gap = max((a - b).abs().max().item() for own in ends for a, b in zip(own, ends[0], strict=True))
        first, *others = seconds.values()
        milliseconds = [spread(values, 1e3 / args.clients, 1) for values in seconds.values()]
        rows.append([kind.title, *milliseconds, *(spread(ratios(first, other)) for other in others), f"{gap:.0e}"])
    first, *others = ways
    header = ["", *(f"{name}, ms a client" for name in ways), *(f"{first} / {name}" for name in others), "gap"]
    examples = f"{args.examples} examples" + (" on average" if args.unequal else "")
    print_table(f"A round of {args.clients} clients of {examples}, batches of {BATCH}", header, rows)


if __name__ == "__main__":
    main()
