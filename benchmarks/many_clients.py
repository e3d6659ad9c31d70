"""
Shows whether memory grows with the number of clients: peaks of runs over 100, 1,000 and 10,000 clients, in processes.

Two methods at their extremes: FedAvg keeps nothing with clients, Local a whole model of each that took part, on disk.
Runs have equally many participants; those of the last column have 1 % of the clients instead.

Then whether it grows with the participants of a round, whose uploads are kept or added up as they come
(`client_parallelism`), with a larger model.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
from machine import benchmark_parser, pin_threads, print_table

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import LinearConfig, LinearForClassification
from hf_fedmoe.strategies import FedAvg, Local
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments


CLIENTS, PARTICIPANTS, SHARE, ROUNDS = (100, 1_000, 10_000), 20, 0.01, 5
ROWS_PER_CLIENT, FEATURES, LABELS = 10, 1_000, 100  # a model of 0.1M parameters
MANY, MANY_LABELS, MANY_ROUNDS = (10, 100, 400), 1_000, 2  # a model of 1M parameters, 4 MB
METHODS = {"FedAvg": FedAvg, "Local": Local}
MEGABYTE = 2**20


def make_data(num_clients: int, num_labels: int) -> FederatedDataset:
    """Clients whose rows are parts of one small pool: what is measured is the federation, not the data."""
    rng = np.random.default_rng(0)
    pool_size = 1_000
    features = datasets.Features(
        {
            "features": datasets.List(datasets.Value("float32"), length=FEATURES),
            "label": datasets.ClassLabel(num_classes=num_labels),
        }
    )
    pool = datasets.Dataset.from_dict(
        {
            "features": rng.standard_normal((pool_size, FEATURES)).astype(np.float32),
            "label": np.arange(pool_size) % num_labels,
        },
        features=features,
    )
    data = FederatedDataset(pool, np.split(np.arange(pool_size), pool_size // ROWS_PER_CLIENT))
    # A client of its own for each number, over and over the same rows, which `FederatedDataset` would refuse.
    data.client_indices = [data.client_indices[c % len(data.client_indices)] for c in range(num_clients)]
    return data


def measure(
    method: str, num_clients: int, participants: int, rounds: int, num_labels: int, parallelism: str, threads: int
) -> dict[str, float]:
    """Peak memory of this process, its growth in the rounds, and the bytes on disk."""
    pin_threads_quietly(threads)
    data = make_data(num_clients, num_labels)
    model = LinearForClassification(LinearConfig(num_features=FEATURES, num_labels=num_labels))
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedTrainingArguments(
            folder,
            rounds=rounds,
            clients_per_round=participants,
            client_parallelism=parallelism,
            optim="sgd",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = FederatedTrainer(model, args, data, strategy=METHODS[method]())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
        seconds = [report.seconds["clients"] + report.seconds["server"] for report in trainer.rounds]
        stored = sum(path.stat().st_size for path in Path(folder).rglob("client-*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak": peak * 1024 / MEGABYTE,
        "growth": (peak - before) * 1024 / MEGABYTE,
        "stored": stored / MEGABYTE,
        "milliseconds": 1000 * sum(seconds) / (len(seconds) * participants),
    }


def pin_threads_quietly(threads: int) -> None:
    """As `pin_threads`, in a process whose output is read."""
    import torch

    torch.set_num_threads(threads)


def main() -> None:
    parser = benchmark_parser(__doc__.strip().split("\n")[0])
    parser.add_argument("--child", nargs=6, help="The arguments of `measure`: one run, as JSON.")
    args = parser.parse_args()
    if args.child:
        method, *numbers, parallelism = args.child
        print(json.dumps(measure(method, *map(int, numbers), parallelism, args.threads)))
        return
    pin_threads(args)
    clients, rounds = (CLIENTS[:2], 2) if args.quick else (CLIENTS, ROUNDS)

    def run(
        method: str,
        num_clients: int,
        participants: int,
        rounds: int = rounds,
        num_labels: int = LABELS,
        parallelism: str = "clients",
    ) -> dict[str, float]:
        numbers = (num_clients, participants, rounds, num_labels)
        words = ["--child", method, *map(str, numbers), parallelism, "--threads", str(args.threads)]
        output = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True).stdout
        return json.loads(output.strip().split("\n")[-1])

    for method in METHODS:
        runs = {number: run(method, number, PARTICIPANTS) for number in clients}
        least = runs[clients[0]]["peak"]
        rows = []
        for number, found in runs.items():
            participants = max(1, round(SHARE * number))
            share = run(method, number, participants)
            rows.append(
                [
                    f"{number:,}",
                    f"{found['peak']:.0f}",
                    f"{found['peak'] / least:.3f}",
                    f"{found['growth']:.1f}",
                    f"{found['stored']:.1f}",
                    f"{found['milliseconds']:.1f}",
                    f"{participants}: {share['peak']:.0f}, {share['growth']:.1f}",
                ]
            )
        print_table(
            f"{method}, {rounds} rounds of {PARTICIPANTS} clients, {FEATURES * LABELS + LABELS:,} parameters",
            ["M", "peak, MB", "of the first", "grown in rounds", "on disk, MB", "ms a client", "1 %: m, peak, grown"],
            rows,
        )
    rows = []
    for participants in MANY[:2] if args.quick else MANY:
        common = ("FedAvg", 1_000, participants, MANY_ROUNDS, MANY_LABELS)
        found = [run(*common, parallelism) for parallelism in ("clients", "sums")]
        rows.append([str(participants), *(f"{one[name]:.0f}" for one in found for name in ("peak", "growth"))])
    print_table(
        f"FedAvg, {MANY_ROUNDS} rounds, 1,000 clients, {FEATURES * MANY_LABELS + MANY_LABELS:,} parameters",
        ["m", '"clients": peak, MB', "grown in rounds", '"sums": peak, MB', "grown in rounds"],
        rows,
    )


if __name__ == "__main__":
    main()
