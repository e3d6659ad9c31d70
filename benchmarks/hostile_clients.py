"""
Accuracy and backdoor success of FedAvg and Fed-MoE with hostile clients, beside none, with each defence.

The data are scikit-learn's digits, or with `--data characters` those by writer in $HF_FEDMOE_DATA. Of ten clients, who
all take part in each round, three are hostile:

- `sign`: they send the start less ten times their update; `noise`: the start and ten times as much noise as they have
  moved.
- `labels`: they train on labels from behind, 9 for 0; `backdoor`: half of their examples have a bright patch and the
  label 0, and so has every example of another class of which the success is measured.

Both halves of an attack are what a client does by itself, before anything that its upload goes through.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
from machine import benchmark_parser, pin_threads, print_table
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset, decode_images, dirichlet, load_source
from hf_fedmoe.federation import ClientTask, Federation, Filter
from hf_fedmoe.models import FedMoEForImageClassification, SmallImageProcessor
from hf_fedmoe.strategies import FedAvg, FedMoE, FedMoESettings
from hf_fedmoe.training import FederatedTrainer, FedMoETrainingArguments
from hf_fedmoe.weights import Payload, StateLayout


ATTACKS = ("none", "sign", "noise", "labels", "backdoor")
NUM_CLIENTS, NUM_HOSTILE, TARGET, TIMES = 10, 3, 0, 10.0
SHARE = NUM_HOSTILE / NUM_CLIENTS
DEFENCES = {
    "none": {},
    "norm ratio 1": {"max_update_norm_ratio": 1.0},
    "median": {"robust_fusion": "median"},
    "geometric median": {"robust_fusion": "geometric_median"},
    "multi-Krum": {"robust_fusion": "multi_krum"},
}
# Measured with one method only, which saves time.
OF_METHOD = {
    "FedAvg": {"trimmed mean": {"robust_fusion": "trimmed_mean"}, "Krum": {"robust_fusion": "krum"}},
    "Fed-MoE": {
        "floor 0.5": {"reserved_floor": 0.5},
        "floor 1": {"reserved_floor": 1.0},
        "cap 0.2": {"max_expert_share": 0.2},
        "floor 0.5, norm ratio 1": {"reserved_floor": 0.5, "max_update_norm_ratio": 1.0},
    },
}


@dataclass
class Hostile(Filter):
    """Sends something else than what was trained, if the client is hostile."""

    layout: StateLayout
    attack: str
    seed: int

    @torch.no_grad()
    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        if task.client < NUM_HOSTILE and self.attack in ("sign", "noise"):
            moved_P = sent.row_P - task.received_P
            if self.attack == "noise":
                generator = torch.Generator().manual_seed(1000 * self.seed + 10 * task.round_index + task.client)
                noise_P = torch.randn(moved_P.shape, generator=generator)
                moved_P = -noise_P * moved_P.norm() / noise_P.norm()
            new_P = task.received_P - TIMES * moved_P
            for name, view in self.layout.views(sent.row_P).items():
                view.copy_(self.layout.views(new_P)[name])
        return {}


class AttackedTrainer(FederatedTrainer):
    """A trainer some of whose clients are hostile."""

    attack = "none"

    def _federation(self) -> Federation:
        federation = super()._federation()
        filters = federation.participants.filters
        filters.insert(0, Hostile(federation.server.layout, self.attack, self.args.seed))
        return federation


def stamp(pixels: bytes, size: int) -> bytes:
    """An image with a bright patch in its corner, a quarter of its width."""
    image_YX, patch = np.frombuffer(pixels, np.uint8).reshape(size, size).copy(), size // 4
    image_YX[:patch, :patch] = 255
    return image_YX.tobytes()


def with_rows(rows: datasets.Dataset, pixels: list[bytes], labels: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"pixel_values": pixels, "label": labels}, features=rows.features)


def poisoned(data: FederatedDataset, attack: str, size: int) -> FederatedDataset:
    """The data as its hostile clients have it."""
    pixels, labels = list(data.pool["pixel_values"]), list(data.pool["label"])
    for rows in data.client_indices[:NUM_HOSTILE]:
        for count, row in enumerate(rows.tolist()):
            if attack == "labels":
                labels[row] = data.num_labels - 1 - labels[row]
            if attack == "backdoor" and count % 2:
                pixels[row], labels[row] = stamp(pixels[row], size), TARGET
    pool = with_rows(data.pool, pixels, labels)
    return FederatedDataset(pool, data.client_indices, **data.split_indices)


def triggered(rows: datasets.Dataset, size: int) -> datasets.Dataset:
    """The rows of other classes with the trigger, called by the class that they are to be taken for."""
    others = rows.filter(lambda row: row["label"] != TARGET)
    return with_rows(others, [stamp(each, size) for each in others["pixel_values"]], [TARGET] * len(others))


@dataclass
class Task:
    """Data, processor, the model's shape and how long training takes."""

    data: FederatedDataset
    test: datasets.Dataset
    processor: SmallImageProcessor
    shape: dict
    settings: dict


def digits_task(seed: int, args: argparse.Namespace) -> Task:
    source, processor = load_source("digits"), SmallImageProcessor(num_channels=1, size={"height": 8, "width": 8})
    decoded = source.map(partial(decode_images, image_processor=processor), batched=True, remove_columns=["image"])
    data = FederatedDataset.split(
        decoded["train"],
        lambda rows: dirichlet(rows["label"], num_clients=NUM_CLIENTS, alpha=args.alpha, seed=seed),
        reserved_size=60,
        validation_size=20,
        seed=seed,
    )
    shape = dict(image_size=8, channels=[8, 16], kernel_size=3, padding=1, hidden_size=64)
    settings = dict(rounds=args.rounds, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=5e-3)
    return Task(data, decoded["test"], processor, shape, settings)


def characters_task(seed: int, args: argparse.Namespace) -> Task:
    source = load_source("unipen_chars62_by_writer")
    processor = SmallImageProcessor(num_channels=1, size={"height": 28, "width": 28})
    rng = np.random.default_rng(seed)
    rows = source["train"]
    names, counts = np.unique(rows["writer_id"], return_counts=True)
    chosen = rng.choice(names[counts >= 200], NUM_CLIENTS, replace=False)
    own = [np.flatnonzero(np.array(rows["writer_id"]) == name) for name in chosen]
    rest = rng.permutation(np.flatnonzero(~np.isin(rows["writer_id"], chosen)))[: 620 + 100 + 2000]
    keep = rows.select(np.concatenate([*own, rest]))
    decoded = keep.map(partial(decode_images, image_processor=processor), batched=True, remove_columns=["image"])
    ends = np.cumsum([0, *map(len, own)])
    clients = [np.arange(start, stop) for start, stop in pairwise(ends)]
    after = np.arange(ends[-1], len(decoded))
    decoded = decoded.select_columns(["pixel_values", "label"])
    data = FederatedDataset(decoded, clients, reserved=after[:620], validation=after[620:720])
    shape = dict(image_size=28, channels=[8, 16], kernel_size=3, padding=1, hidden_size=64)
    settings = dict(rounds=args.rounds, num_train_epochs=2, per_device_train_batch_size=32, learning_rate=2e-3)
    return Task(data, decoded.select(after[720:]), processor, shape, settings)


TASKS = {"digits": digits_task, "characters": characters_task}


def run(task: Task, method: str, attack: str, defence: dict, seed: int, folder: str) -> dict[str, float]:
    """Accuracy on test rows, and the share of triggered ones that are taken for the target, in per cent."""
    size = task.shape["image_size"]
    set_seed(seed)
    names = dict(enumerate(task.data.label_names))
    config = AutoConfig.for_model("small_cnn", id2label=names, num_channels=1, **task.shape)
    model = AutoModelForImageClassification.from_config(config)
    args = FedMoETrainingArguments(
        folder,
        clients_per_round=NUM_CLIENTS,
        clients_at_once=NUM_CLIENTS,
        expected_attackers=SHARE,
        per_device_eval_batch_size=512,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
        **task.settings,
        **defence,
    )
    strategy = FedAvg()
    if method == "Fed-MoE":
        model = FedMoEForImageClassification.from_expert(model, num_routed_experts=3)
        own = {name: defence[name] for name in ("reserved_floor", "max_expert_share") if name in defence}
        strategy = FedMoE(FedMoESettings(expert_learning_rate=5e-4, **own))
    data = poisoned(task.data, attack, size)
    trainer = AttackedTrainer(model, args, data, strategy, processing_class=task.processor)
    trainer.attack = attack
    try:
        trainer.train()
    except RuntimeError as error:  # a server that is not sound ends the run
        print(f"{method}, {attack}, {defence}, seed {seed}: {error}", flush=True)
        return {"accuracy": 100 / task.data.num_labels, "backdoor": 0.0, "refused": float("nan")}
    accuracy = trainer.evaluate(task.test)["eval_accuracy"]
    success = trainer.evaluate(triggered(task.test, size))["eval_accuracy"]
    refused = sum(client < NUM_HOSTILE for report in trainer.rounds for client in report.refused)
    return {"accuracy": 100 * accuracy, "backdoor": 100 * success, "refused": refused / len(trainer.rounds)}


def cell(found: list[dict[str, float]], what: str) -> str:
    values = [each[what] for each in found]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = benchmark_parser(__doc__.strip().split("\n")[0])
    parser.add_argument("--data", choices=TASKS, default="digits", help="What clients have.")
    parser.add_argument("--rounds", type=int, default=12, help="Rounds of a run.")
    parser.add_argument("--alpha", type=float, default=0.5, help="Of the Dirichlet distribution of classes (digits).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of data, start and training.")
    parser.add_argument("--methods", nargs="+", default=["FedAvg", "Fed-MoE"], help="Which methods.")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="Which attacks.")
    parser.add_argument("--defences", nargs="+", help="Which defences; all if left out.")
    parser.add_argument("--out", help="A file of JSON lines, whose runs are not run again.")
    args = parser.parse_args()
    pin_threads(args)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.quick:
        args.rounds, args.seeds, args.attacks, args.defences = 1, [0], ["none", "sign"], ["none", "median"]
    known: dict[str, dict[str, float]] = {}
    if args.out and Path(args.out).exists():
        known = {entry["key"]: entry["found"] for entry in map(json.loads, Path(args.out).read_text().splitlines())}
    tasks = {seed: TASKS[args.data](seed, args) for seed in args.seeds}
    for method in args.methods:
        defences = DEFENCES | OF_METHOD[method]
        table = {}
        for name in args.defences or defences:
            if name not in defences:
                continue
            for attack in args.attacks:
                table[name, attack] = []
                for seed in args.seeds:
                    key = json.dumps([args.data, args.rounds, args.alpha, method, name, attack, seed])
                    if key not in known:
                        with tempfile.TemporaryDirectory() as folder:
                            known[key] = run(tasks[seed], method, attack, defences[name], seed, folder)
                        if args.out:
                            with Path(args.out).open("a") as file:
                                file.write(json.dumps({"key": key, "found": known[key]}) + "\n")
                    table[name, attack].append(known[key])
        rows = [
            [name, *(cell(table[name, attack], "accuracy") for attack in args.attacks)]
            + ([cell(table[name, "backdoor"], "backdoor")] if "backdoor" in args.attacks else [])
            for name in dict.fromkeys(name for name, _ in table)
        ]
        heads = [f"accuracy: {attack}" for attack in args.attacks]
        heads += ["backdoor success"] if "backdoor" in args.attacks else []
        print_table(f"{method} on {args.data}, {args.rounds} rounds, seeds {args.seeds}", ["defence", *heads], rows)


if __name__ == "__main__":
    main()
