"""
Accuracy of private FedAvg over many clients: without privacy, with clipping alone, and at each epsilon.

Characters of writers (`unipen_chars62_by_writer` of HF_FEDMOE_DATA, 62 classes), or the digits of scikit-learn where
these are not there. A client has a writer's rows, or some of them; the model is linear, on images of 14 x 14 numbers.
"""

import tempfile
from typing import Any

import datasets
import numpy as np
from machine import benchmark_parser, pin_threads, print_table

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.data.sources import load_rows
from hf_fedmoe.models import LinearConfig, LinearForClassification
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments
from hf_fedmoe.training.privacy_budget import PrivacyBudget


CHARACTERS = "unipen_chars62_by_writer"


def read_rows(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns numbers and classes of all rows, those of a writer beside one another, and the count of classes."""
    try:
        rows = load_rows(CHARACTERS)
    except ValueError:
        rows = load_rows("digits")
    writers = np.asarray(rows["writer_id"]) if "writer_id" in rows.column_names else np.zeros(len(rows))
    order = np.lexsort((np.random.default_rng(seed).permutation(len(rows)), writers))
    images = np.stack([np.asarray(image.convert("L"), np.float32) / 255 for image in rows["image"]])[order]
    n, side, _ = images.shape
    if side == 28:
        images = images.reshape(n, 14, 2, 14, 2).mean((2, 4))
    return images.reshape(n, -1), np.asarray(rows["label"])[order], rows.features["label"].num_classes


def make_data(num_clients: int, seed: int) -> FederatedDataset:
    """Cuts the rows into clients of equal size and a test set."""
    features, labels, num_classes = read_rows(seed)
    held_out = np.random.default_rng(seed).random(len(labels)) < 0.1
    kinds = datasets.Features(
        {
            "features": datasets.List(datasets.Value("float32"), length=features.shape[1]),
            "label": datasets.ClassLabel(num_classes=num_classes),
        }
    )
    pool, test = (
        datasets.Dataset.from_dict({"features": features[part], "label": labels[part]}, features=kinds)
        for part in (~held_out, held_out)
    )
    size = len(pool) // num_clients
    clients = [np.arange(client * size, (client + 1) * size) for client in range(num_clients)]
    return FederatedDataset(pool.select(range(num_clients * size)), clients, test=test)


def arguments(folder: str, **args: Any) -> FederatedTrainingArguments:
    """Arguments of a run that saves and says nothing."""
    return FederatedTrainingArguments(
        folder,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        per_device_train_batch_size=10,
        clients_at_once=50,
        per_device_eval_batch_size=1000,
        **args,
    )


def linear_trainer(data: FederatedDataset, args: FederatedTrainingArguments) -> FederatedTrainer:
    """Makes a trainer of a linear model that begins with zeros."""
    config = LinearConfig(num_features=len(data.pool[0]["features"]), num_labels=data.num_labels)
    model = LinearForClassification(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    return FederatedTrainer(model, args, data)


def accuracy(data: FederatedDataset, args: dict[str, Any], seed: int) -> float:
    """Trains on the clients; returns the accuracy on the test rows."""
    assert data.test is not None
    with tempfile.TemporaryDirectory() as folder:
        trainer = linear_trainer(data, arguments(folder, seed=seed, **args))
        trainer.train()
        return trainer.evaluate(data.test)["eval_accuracy"]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per_round", type=int, default=100, help="Participants of a round, on average.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=3.0)
    parser.add_argument("--local_epochs", type=float, default=1.0)
    parser.add_argument("--clipping_norm", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 4.0, 2.0])
    given = parser.parse_args()
    if given.quick:
        given.clients, given.per_round, given.rounds, given.seeds, given.epsilons = 30, 5, 2, 1, [8.0]
    pin_threads(given)
    clipped = {"clipping_norm": given.clipping_norm, "client_choice": "poisson", "noise_source": "seed"}
    run: dict[str, Any] = {"rounds": given.rounds, "clients_per_round": given.per_round}
    run |= {"learning_rate": given.learning_rate, "num_train_epochs": given.local_epochs}
    settings: dict[str, dict[str, Any]] = {"no privacy": {}, "clipping alone": {"noise_multiplier": 0.0, **clipped}}
    for epsilon in given.epsilons:
        target = {"target_epsilon": epsilon, "privacy_accountant": "pld"}
        noise = PrivacyBudget(arguments("", delta=given.delta, **run, **clipped, **target), given.clients).find_noise()
        print(f"epsilon {epsilon:g}: noise multiplier {noise:.3f}", flush=True)
        settings[f"epsilon {epsilon:g}"] = {"noise_multiplier": noise, "delta": given.delta, **clipped}
    found: dict[str, list[float]] = {name: [] for name in settings}
    for seed in range(given.seeds):
        data = make_data(given.clients, seed)
        for name, own in settings.items():
            found[name].append(accuracy(data, run | own, seed))
            print(f"seed {seed}, {name}: {100 * found[name][-1]:.1f} %", flush=True)
    rows = [
        [
            name,
            f"{settings[name].get('noise_multiplier', 0):.2f}",
            f"{100 * np.mean(scores):.1f}",
            f"{100 * min(scores):.1f} to {100 * max(scores):.1f}",
        ]
        for name, scores in found.items()
    ]
    header = ["", "noise multiplier", f"accuracy %, mean of {given.seeds} seeds", "least to most"]
    print_table(f"{given.clients} clients, {given.per_round} in each of {given.rounds} rounds", header, rows)


if __name__ == "__main__":
    main()
