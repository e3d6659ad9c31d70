"""
Measures how much a mixture of groups gains from a few labelled rows of who asks it: the accuracy on the clients' own
test rows of the downloaded model alone, with a [`~hf_fedmoe.client_prior`] from some of their rows, and of the expert
with which the federation serves them: that of their group, or for clients that took part in no round that of least
loss on all of their rows.

`HF_FEDMOE_DATA=<folder> python benchmarks/who_asks.py recipes/groups/rotations.yaml` trains the YAML's Fed-MoE of
groups first.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from machine import print_table
from torch import Tensor, nn

from hf_fedmoe import FederatedTrainer, client_prior
from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings
from hf_fedmoe.experiments.yaml_files import read_yaml


GROUPS = Path(__file__).parents[1] / "recipes" / "groups"
QUICK = {
    "dataset": ["digits"],
    "image_size": 8,
    "model_config": {"channels": [4, 8], "kernel_size": 3, "padding": 1, "hidden_size": 32},
    "num_clients": 8,
    "examples_per_client": 80,
    "clients_per_round": 4,
    "reserved_size": 60,
    "validation_size": 60,
    "max_test_examples": 100,
    "rounds": 3,
}


@torch.no_grad()
def right(trainer: FederatedTrainer, model: nn.Module, rows: Dataset, **options: object) -> float:
    """Counts the rows of which a model names the class."""
    count = 0
    for start in range(0, len(rows), 256):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + 256, len(rows)))])
        labels_B = batch.pop("labels")
        count += int((model.eval()(**batch, **options).logits.argmax(-1) == labels_B).sum())
    return count


@torch.no_grad()
def prior_of(trainer: FederatedTrainer, rows: Dataset, count: int) -> Tensor | None:
    """Finds a client's prior from its first rows; `None` from no rows."""
    if count == 0:
        return None
    batch = trainer.data_collator([rows[i] for i in range(min(count, len(rows)))])
    labels_B = batch.pop("labels")
    return client_prior(trainer.model.eval()(**batch, output_expert_logits=True), labels_B)


def columns_of(trainer: FederatedTrainer, clients: Sequence[int], counts: list[int]) -> list[list[str]]:
    """Accuracies on the test rows of some clients: a row for each number of labelled rows, one for the federation."""
    data = trainer.federated_dataset
    assert data is not None
    tests = {client: data.client_test(client) for client in clients}
    total = sum(map(len, tests.values())) / 100
    columns = []
    for count in counts:
        priors = {client: prior_of(trainer, data.client(client), count) for client in clients}
        found = [
            sum(
                right(trainer, trainer.model, rows, client_prior=priors[client], dense=dense)
                for client, rows in tests.items()
            )
            for dense in (False, True)
        ]
        columns.append([f"{each / total:.1f}" for each in found])
    own = sum(right(trainer, trainer.personalize(client), rows) for client, rows in tests.items())
    return [*columns, [f"{own / total:.1f}", ""]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", type=Path, nargs="?", default=GROUPS / "rotations.yaml", help="A YAML of recipes/groups."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 5, 10, 20, 50], help="Labelled rows of who asks.")
    parser.add_argument("--unseen", type=int, default=8, help="Further clients, who take part in no round.")
    parser.add_argument("--quick", action="store_true", help="Digits and few rounds: does it run at all?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = read_yaml(options.file)["settings"] | (QUICK if options.quick else {"rounds": options.rounds})
        told |= {"seed": options.seed, "output_dir": folder, "save_strategy": "no"}
        if options.unseen:
            told["num_clients"] += options.unseen
            told["unseen_share"] = options.unseen / told["num_clients"]
        experiment, args = parse_settings(ImageExperiment, told)
        processor = experiment.load_processor()
        _, data = experiment.load_data(processor, args.seed)
        trainer = make_trainer("fedmoe_groups", experiment, args, data, processor)
        trainer.train()
        seen, unseen = range(data.num_clients), range(data.num_clients, data.num_clients + options.unseen)
        head, table = ["labelled rows of who asks"], [[f"{count} rows"] for count in options.rows]
        table.append(["expert that the federation takes"])
        for name, clients in (("clients", seen), ("unseen clients", unseen)):
            if clients:
                head += [f"{name}: top-1", "dense"]
                for row, found in zip(table, columns_of(trainer, clients, options.rows), strict=True):
                    row += found
    print_table(f"{options.file.name}, seed {options.seed}", head, table)


if __name__ == "__main__":
    main()
