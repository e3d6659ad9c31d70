"""
The precision in which a start is stored, and how much it matters: accuracies from float32, bf16 and fp16.

Reviews (the shipped GPT-2) and scikit-learn's digits (a small CNN; for adapters a ViT that was trained on a third of
the digits), whole models and LoRA adapters, Fed-MoE and FedAvg tuned on the same reserved set.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import benchmark_parser, pin_threads, print_table, spread
from peft import LoraConfig
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fedmoe.data import FederatedDataset, ImageCollator, decode_images, load_source, predominant
from hf_fedmoe.models import (
    FedMoEForImageClassification,
    FedMoEForSequenceClassification,
    SmallCNNConfig,
    SmallCNNForImageClassification,
    SmallImageProcessor,
)
from hf_fedmoe.strategies import FedAvgReserved, FedMoE
from hf_fedmoe.training import FederatedTrainer, FedMoETrainingArguments


START = "hf_fedmoe/assets/gpt2-reviews"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = {"Fed-MoE": FedMoE, "FedAvg, tuned": FedAvgReserved}


@dataclass
class Task:
    """
    Clients' data and what starts on it.

    Args:
        data (`FederatedDataset`): With a reserved set and a test.
        start (`Callable`): From whether experts are adapters to the classifier that is stored.
        mixture (`type`): The class of the mixture.
        auto (`type`): The class that loads the stored classifier.
        adapter (`LoraConfig`): Of its adapters.
        settings (`dict`): Further arguments of the trainer.
        learning_rate (`float`): Of whole models, and ten times as much of adapters.
    """

    data: FederatedDataset
    start: Callable[[bool], PreTrainedModel]
    mixture: type
    auto: type
    adapter: LoraConfig
    settings: dict
    learning_rate: float


def reviews(seed: int, size: int) -> Task:
    source, tokenizer = load_source("reviews"), AutoTokenizer.from_pretrained(START)
    data = FederatedDataset.split(
        source["train"],
        lambda rows: predominant(rows["label"], num_clients=6, examples_per_client=size, seed=seed),
        reserved_size=2 * size,
        test=source["test"],
        seed=seed,
    ).map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=32), batched=True)
    return Task(
        data,
        lambda adapters: AutoModelForSequenceClassification.from_pretrained(START, num_labels=5, dtype="float32"),
        FedMoEForSequenceClassification,
        AutoModelForSequenceClassification,
        LoraConfig(r=8, fan_in_fan_out=True),
        {"processing_class": tokenizer},
        6e-4,
    )


def digits(seed: int, size: int) -> Task:
    source, processor = load_source("digits"), SmallImageProcessor(num_channels=1, size={"height": 8, "width": 8})

    def decode(data: FederatedDataset) -> FederatedDataset:
        return data.map(
            lambda rows: decode_images(rows, image_processor=processor), batched=True, remove_columns=["image"]
        )

    rows = source["train"].shuffle(seed=seed)
    third = len(rows) // 3
    data = decode(
        FederatedDataset.split(
            rows.select(range(third, len(rows))),
            lambda rows: predominant(rows["label"], num_clients=6, examples_per_client=size, seed=seed),
            reserved_size=size,
            test=source["test"],
            seed=seed,
        )
    )
    settings = {"processing_class": processor, "data_collator": ImageCollator(processor)}

    def start(adapters: bool) -> PreTrainedModel:
        if not adapters:
            return SmallCNNForImageClassification(
                SmallCNNConfig(
                    image_size=8, num_channels=1, channels=[16, 32], kernel_size=3, padding=1, num_labels=10
                )
            )
        shape = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96)
        config = ViTConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_labels=10)
        central = decode(FederatedDataset(rows.select(range(third)), [np.arange(third)], num_labels=10))
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(folder, seed, rounds=1, clients_per_round=1, num_train_epochs=20, learning_rate=3e-3)
            trainer = FederatedTrainer(ViTForImageClassification(config), args, central, **settings)
            trainer.train()
        return trainer.model

    return Task(
        data,
        start,
        FedMoEForImageClassification,
        AutoModelForImageClassification,
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        settings,
        1e-3,
    )


def arguments(folder: str, seed: int, **changes: object) -> FedMoETrainingArguments:
    return FedMoETrainingArguments(
        folder,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **changes,
    )


def accuracy(task: Task, method: str, adapters: bool, folder: Path, seed: int, rounds: int) -> float:
    """Returns the accuracy on the test, in percent, of a run from the checkpoint in `folder` as it is stored there."""
    torch.manual_seed(seed)
    peft_config = task.adapter if adapters else None
    if method == "Fed-MoE":
        model = task.mixture.from_expert(
            folder if adapters else task.auto.from_pretrained(folder),
            num_routed_experts=3,
            **({"peft_config": peft_config} if adapters else {}),
        )
        settings = task.settings
    else:
        model = task.auto.from_pretrained(folder)
        settings = task.settings | {"peft_config": peft_config}
    learning_rate = task.learning_rate * (10 if adapters else 1)
    with tempfile.TemporaryDirectory() as output:
        args = arguments(output, seed, rounds=rounds, clients_per_round=3, learning_rate=learning_rate)
        trainer = FederatedTrainer(model, args, task.data, METHODS[method](), **settings)
        trainer.train()
        if any(report.refused for report in trainer.rounds):
            raise RuntimeError(f"{method}: a client was refused.")
        return 100 * trainer.evaluate(task.data.test)["eval_accuracy"]


def main() -> None:
    parser = benchmark_parser("Accuracies by the precision in which the start is stored.")
    parser.add_argument("--seeds", type=int, default=3, help="How many.")
    parser.add_argument("--rounds", type=int, default=8, help="Of each run.")
    parser.add_argument("--examples", type=int, default=60, help="Of each of 6 clients.")
    parser.add_argument("--tasks", nargs="+", choices=("reviews", "digits"), default=["digits", "reviews"])
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rounds, args.examples = 1, 1, 20
    pin_threads(args)
    rows = []
    for make in ({"reviews": reviews, "digits": digits}[name] for name in args.tasks):
        found: dict[tuple[str, bool, str], list[float]] = {}
        for seed in range(args.seeds):
            task = make(seed, args.examples)
            for adapters in (False, True):
                torch.manual_seed(seed)
                start = task.start(adapters)
                for name, dtype in DTYPES.items():
                    with tempfile.TemporaryDirectory() as folder:
                        copy.deepcopy(start).to(dtype).save_pretrained(folder)
                        for method in METHODS:
                            value = accuracy(task, method, adapters, Path(folder), seed, args.rounds)
                            found.setdefault((method, adapters, name), []).append(value)
        for method in METHODS:
            for adapters in (False, True):
                whole = found[method, adapters, "float32"]
                cells = [make.__name__, method, "LoRA" if adapters else "whole", spread(whole, digits=1)]
                for name in ("bf16", "fp16"):
                    apart = [value - base for value, base in zip(found[method, adapters, name], whole, strict=True)]
                    cells.append(f"{statistics.mean(apart):+.1f} ({min(apart):+.1f} to {max(apart):+.1f})")
                rows.append(cells)
    print_table(
        f"Accuracy in percent from a start in float32, {args.seeds} seeds, and how far the others are from it",
        ["task", "method", "experts", "float32", "bf16", "fp16"],
        rows,
    )


if __name__ == "__main__":
    main()
