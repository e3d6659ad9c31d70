"""
Measures what the gate of Fed-MoE of groups is worth beside an oracle that knows of which group a test row is: how
often the gate's first choice is that group's expert, and the accuracy of its first choice, of all experts by its
weights, and of the oracle; besides how often two experts disagree, and whether an expert is never asked.

`HF_FEDMOE_DATA=<folder> python benchmarks/gate_against_oracle.py recipes/groups/pictures.yaml` trains once a seed.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from machine import print_table
from torch import Tensor
from who_asks import GROUPS, QUICK

from hf_fedmoe import FederatedTrainer
from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings
from hf_fedmoe.experiments.yaml_files import read_yaml
from hf_fedmoe.federation import Server, ServerStep
from hf_fedmoe.strategies.fedmoe_groups import NOBODY


MEASURES = (
    "gate chooses the row's own group",
    "accuracy of the gate's first choice",
    "accuracy of all experts by the gate",
    "accuracy of the group's expert (oracle)",
    "accuracy of all experts alike",
    "two experts disagree",
    "rows of the expert that is asked least",
)


def trained(told: dict[str, object]) -> tuple[FederatedTrainer, FederatedDataset, Tensor]:
    """Trains Fed-MoE of groups, and returns the group `[M]` of each client with it."""
    experiment, args = parse_settings(ImageExperiment, told)
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, args.seed)
    trainer = make_trainer("fedmoe_groups", experiment, args, data, processor)
    finish, groups = trainer.strategy.finish, []

    def noting(server: Server, step: ServerStep) -> None:
        groups.append(server.tensors["group_M"].clone())
        finish(server, step)

    trainer.strategy.finish = noting
    trainer.train()
    return trainer, data, groups[-1]


def expert_of_domains(data: FederatedDataset, group_M: Tensor) -> dict[object, int]:
    """Returns for each domain the group in which most of its clients are, of those that took part."""
    found: dict[object, Counter[int]] = {}
    for client in (group_M != NOBODY).nonzero()[:, 0].tolist():
        found.setdefault(data.client(client)[0]["domain"], Counter())[int(group_M[client])] += 1
    return {domain: counts.most_common(1)[0][0] for domain, counts in found.items()}


@torch.no_grad()
def outputs(trainer: FederatedTrainer, rows: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what the mixture says with one expert and with all `[N, C]`, its experts, its gate, and the labels."""
    model, found = trainer.model.eval(), []
    for start in range(0, len(rows), 256):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + 256, len(rows)))])
        labels_B = batch.pop("labels")
        one, dense = model(**batch), model(**batch, dense=True, output_expert_logits=True)
        found.append((one.logits, dense.logits, dense.expert_logits, dense.gate_probs, labels_B))
    first, every, experts, gates, labels = (torch.cat(each) for each in zip(*found, strict=True))
    return first, every, experts, gates, labels


def measures(trainer: FederatedTrainer, data: FederatedDataset, group_M: Tensor) -> list[float]:
    """Returns one seed's [`MEASURES`], in per cent of the test rows of which clients took part."""
    experts = expert_of_domains(data, group_M)
    rows = data.test.select([row for row, domain in enumerate(data.test["domain"]) if domain in experts])
    one_NC, every_NC, experts_NSC, gate_NK, labels_N = outputs(trainer, rows)
    own_N = torch.tensor([experts[domain] for domain in rows["domain"]])
    answers_NK = experts_NSC[:, 1:].argmax(-1)
    asked_N = gate_NK.argmax(-1)
    first, second = torch.triu_indices(*[answers_NK.shape[1]] * 2, offset=1)
    shares = [
        asked_N == own_N,
        one_NC.argmax(-1) == labels_N,
        every_NC.argmax(-1) == labels_N,
        answers_NK.gather(1, own_N[:, None])[:, 0] == labels_N,
        experts_NSC.softmax(-1).mean(1).argmax(-1) == labels_N,
        answers_NK[:, first] != answers_NK[:, second],
    ]
    least = torch.bincount(asked_N, minlength=answers_NK.shape[1]).min().item() / len(asked_N)
    return [100 * share.double().mean().item() for share in shares] + [100 * least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", type=Path, nargs="?", default=GROUPS / "rotations.yaml", help="A YAML of recipes/groups."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="By default those of the YAML.")
    parser.add_argument("--quick", action="store_true", help="Digits and few rounds: does it run at all?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    told = read_yaml(options.file)["settings"] | (QUICK if options.quick else {})
    told |= {"save_strategy": "no", "disable_tqdm": True} | ({"rounds": options.rounds} if options.rounds else {})
    columns = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            columns.append(measures(*trained(told | {"seed": seed, "output_dir": folder})))
    by_measure = np.array(columns).T
    table = [
        [name, f"{row.mean():.1f}", *(f"{value:.1f}" for value in row)]
        for name, row in zip(MEASURES, by_measure, strict=True)
    ]
    print_table(
        f"{options.file.name}, per cent of the test rows", ["", "mean", *(f"seed {s}" for s in options.seeds)], table
    )


if __name__ == "__main__":
    main()
