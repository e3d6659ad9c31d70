"""
Rounds whose clients keep a model each, with files that are written behind the next round, as they are, against files
that are waited for: whole runs in turns, by the wall clock. Without checkpoints, which wait for the files.
"""

import tempfile
import time
from unittest.mock import patch

import datasets
import numpy as np
import torch
from machine import add_device, benchmark_parser, pin_threads, print_table, ratios, spread
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.federation import Federation
from hf_fedmoe.models import LinearConfig, LinearForClassification
from hf_fedmoe.strategies import Local
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments


CLIENTS, FEATURES, BATCH_SIZE = 2, 1_000, 10
MEGABYTE = 2**20


def make_data(num_labels: int, steps: int) -> FederatedDataset:
    rng = np.random.default_rng(0)
    rows = CLIENTS * BATCH_SIZE * steps
    features = datasets.Features(
        {
            "features": datasets.List(datasets.Value("float32"), length=FEATURES),
            "label": datasets.ClassLabel(num_classes=num_labels),
        }
    )
    inputs = rng.standard_normal((rows, FEATURES)).astype(np.float32)
    pool = datasets.Dataset.from_dict({"features": inputs, "label": np.arange(rows) % num_labels}, features=features)
    return FederatedDataset(pool, np.split(np.arange(rows), CLIENTS))


def run(data: FederatedDataset, num_labels: int, rounds: int, device: str) -> tuple[list[float], float]:
    """Seconds of `synchronise` in each round but the first, and of the whole run for each round."""
    torch.manual_seed(0)
    model = LinearForClassification(LinearConfig(num_features=FEATURES, num_labels=num_labels))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        args = FederatedTrainingArguments(
            folder,
            rounds=rounds,
            clients_per_round=CLIENTS,
            per_device_train_batch_size=BATCH_SIZE,
            optim="sgd",
            use_cpu=device == "cpu",
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = FederatedTrainer(model, args, data, strategy=Local())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return [report.seconds["synchronise"] for report in trainer.rounds[1:]], seconds / rounds


def main() -> None:
    parser = benchmark_parser(__doc__.strip().split(":")[0])
    add_device(parser)
    parser.add_argument("--megabytes", type=int, default=200, help="What each client keeps.")
    parser.add_argument("--steps", type=int, default=2, help="Of each client in a round.")
    parser.add_argument("--rounds", type=int, default=4, help="Of a run, the first of which does not count.")
    parser.add_argument("--repetitions", type=int, default=2, help="Runs of each kind.")
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.rounds, args.repetitions = 20, 2, 1
    pin_threads(args, args.device)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    num_labels = args.megabytes * MEGABYTE // (4 * FEATURES)
    data = make_data(num_labels, args.steps)
    synchronise = Federation.synchronise

    def waited_for(self, *arguments) -> None:
        synchronise(self, *arguments)
        self.store.finish_writing()

    found = {"waited for": ([], []), "behind": ([], [])}
    for _ in range(args.repetitions):
        for kind, function in {"waited for": waited_for, "behind": synchronise}.items():
            with patch.object(Federation, "synchronise", function):
                in_synchronise, in_round = run(data, num_labels, args.rounds, args.device)
            found[kind][0].extend(in_synchronise)
            found[kind][1].append(in_round)
    rows = []
    for place, what in enumerate(("synchronise", "a round of the whole run")):
        waited, behind = (values[place] for values in found.values())
        rows.append([what, spread(waited), spread(behind), spread(ratios(waited, behind))])
    print_table(
        f"{CLIENTS} clients that keep {args.megabytes} MB each",
        ["seconds of", "waited for", "behind", "waited for / behind"],
        rows,
    )


if __name__ == "__main__":
    main()
