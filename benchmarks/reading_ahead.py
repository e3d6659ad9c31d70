"""
Rounds on images with worker processes that read clients' batches ahead (`dataloader_num_workers`), against rounds
that read them themselves: whole runs in turns. Wall clock, on a machine with an idle core for each process.

Images are those of `image_round.py`, decoded once, or as PNG in every epoch.
"""

import argparse
import tempfile

import datasets
import torch
from image_round import SHAPES, as_files, image_clients
from machine import add_device, pin_threads, print_table, ratios, spread
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from hf_fedmoe.data import AUGMENTATIONS, FederatedDataset, ImageCollator
from hf_fedmoe.models import SmallImageProcessor
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments


CLIENTS = 10


def clients_of(name: str, files: bool, examples: int) -> tuple[FederatedDataset, ImageCollator]:
    shape = SHAPES[name]
    processor = SmallImageProcessor(num_channels=shape.config.num_channels, size=shape.image_size)
    collate = ImageCollator(processor, AUGMENTATIONS[shape.augmentation])
    data = image_clients(CLIENTS, examples, processor)
    if files:
        data = FederatedDataset(as_files(data.pool, collate, processor), data.client_indices, num_labels=10)
    return data, collate


def run(
    name: str, data: FederatedDataset, collate: ImageCollator, workers: int, rounds: int, device: str
) -> list[float]:
    """Seconds of the clients' part of each round but the first, in which workers start."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedTrainingArguments(
            output_dir=folder,
            rounds=rounds + 1,
            clients_per_round=CLIENTS,
            per_device_train_batch_size=SHAPES[name].batch_size,
            dataloader_num_workers=workers,
            remove_unused_columns=False,  # files are decoded from a column that the model does not know
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        model = AutoModelForImageClassification.from_config(SHAPES[name].config)
        trainer = FederatedTrainer(model, args, data, data_collator=collate)
        trainer.train()
    return [report.seconds["clients"] for report in trainer.rounds[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__)
    add_device(parser)
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="Numbers of worker processes.")
    parser.add_argument("--repetitions", type=int, default=3, help="Runs of each kind.")
    parser.add_argument("--rounds", type=int, default=3, help="Of a run, after one that does not count.")
    parser.add_argument("--quick", action="store_true", help="Small sizes and few repetitions: does it run at all?")
    args = parser.parse_args()
    examples = 20 if args.quick else 100
    if args.quick:
        args.repetitions, args.rounds = 1, 2
    pin_threads(argparse.Namespace(threads=1, clock="wall"), args.device)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = []
    for name in SHAPES:
        for kind, files in {"bytes, decoded once": False, "PNG, decoded in every epoch": True}.items():
            data, collate = clients_of(name, files, examples)
            seconds: dict[int, list[float]] = {workers: [] for workers in (0, *args.workers)}
            for _ in range(args.repetitions):
                for workers, values in seconds.items():
                    values += run(name, data, collate, workers, args.rounds, args.device)
            for workers in args.workers:
                gain = spread(ratios(seconds[0], seconds[workers]))
                rows.append(
                    [name, kind, str(workers), *(spread(seconds[key], 1e3 / CLIENTS, 0) for key in (0, workers)), gain]
                )
    print_table(
        f"A round of {CLIENTS} clients of {examples} images",
        ["", "images", "workers", "none, ms a client", "workers, ms a client", "none / workers"],
        rows,
    )


if __name__ == "__main__":
    main()
