"""
Accuracy and time of FedAvg whose clients hide their examples: plain, with clipping alone, and at each epsilon.

Rows (digits, unless HF_FEDMOE_DATA has characters) and model are those of privacy_cost.py, but few clients have many
rows each, and all take part in each round. The time of a round is in units of that of the plain run of the same seed.
"""

import statistics
import tempfile
import time
from typing import Any

import numpy as np
from machine import benchmark_parser, pin_threads, print_table
from privacy_cost import linear_trainer, make_data

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.training import FederatedTrainingArguments
from hf_fedmoe.training.example_budget import ExampleBudget


def arguments(folder: str, **args: Any) -> FederatedTrainingArguments:
    """Arguments of a run that saves and says nothing."""
    quiet: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    plain: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "seed": 0}
    return FederatedTrainingArguments(
        folder, logging_strategy="no", per_device_eval_batch_size=1000, **quiet | plain | args
    )


def few_rows(data: FederatedDataset, count: int) -> FederatedDataset:
    """Returns the clients with no more than so many rows each."""
    clients = [rows[:count] for rows in data.client_indices]
    return FederatedDataset(data.pool, clients, test=data.test)


def train(data: FederatedDataset, args: dict[str, Any]) -> tuple[float, float]:
    """Trains on the clients; returns the accuracy on the test rows and the median seconds of clients in a round."""
    assert data.test is not None
    with tempfile.TemporaryDirectory() as folder:
        trainer = linear_trainer(data, arguments(folder, **args))
        trainer.train()
        seconds = statistics.median(report.seconds["clients"] for report in trainer.rounds)
        return trainer.evaluate(data.test)["eval_accuracy"], seconds


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2000, help="Of a client, at most.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--clipping_norm", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 4.0, 2.0])
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.seeds, given.epsilons = 2, 1, [8.0]
    pin_threads(given)
    run: dict[str, Any] = {"rounds": given.rounds, "clients_per_round": given.clients}
    run |= {"learning_rate": given.learning_rate, "per_device_train_batch_size": given.batch_size}
    clipped = {"example_clipping_norm": given.clipping_norm, "example_delta": given.delta, "noise_source": "seed"}
    bounded = {"example_noise_multiplier": 0.0, **clipped}
    settings: dict[str, dict[str, Any]] = {"no privacy": {}, "clipping alone": bounded}
    sizes = few_rows(make_data(given.clients, 0), given.rows).client_sizes.tolist()
    for epsilon in given.epsilons:
        began = time.perf_counter()
        target = {"example_target_epsilon": epsilon, **clipped}
        noise = ExampleBudget(arguments("", **run, **target), sizes).find_noise()
        print(f"epsilon {epsilon:g}: noise multiplier {noise:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
        settings[f"epsilon {epsilon:g}"] = {"example_noise_multiplier": noise, **clipped}
    scores: dict[str, list[float]] = {name: [] for name in settings}
    ratios: dict[str, list[float]] = {name: [] for name in settings}
    for seed in range(given.seeds):
        data = few_rows(make_data(given.clients, seed), given.rows)
        plain = 0.0
        for name, own in settings.items():
            score, seconds = train(data, run | own | {"seed": seed})
            plain = plain or seconds
            scores[name].append(score)
            ratios[name].append(seconds / plain)
            print(f"seed {seed}, {name}: {100 * score:.1f} %, {seconds:.2f} s a round", flush=True)
    rows = [
        [
            name,
            f"{settings[name]['example_noise_multiplier']:.3f}" if settings[name] else "none",
            *(f"{100 * score:.1f}" for score in found),
            f"{100 * np.mean(found):.1f}",
            f"{statistics.median(ratios[name]):.1f}",
        ]
        for name, found in scores.items()
    ]
    header = ["", "noise multiplier", *(f"seed {seed}" for seed in range(given.seeds)), "mean", "time of a round"]
    title = f"{given.clients} clients of {sizes[0]} rows, {given.rounds} rounds, accuracy in per cent"
    print_table(title, header, rows)


if __name__ == "__main__":
    main()
