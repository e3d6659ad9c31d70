"""
Measures how well groups of clients are found from their statistics: the adjusted Rand index with the true groups (1 is
perfect, 0 chance), of all clients and of random parts of them, one to six clients a group. Beside it average linkage
of [`shifts`](../hf_fedmoe/strategies/client_groups.py), which compares clients two by two.

`HF_FEDMOE_DATA=<folder> python benchmarks/found_groups.py recipes/groups/labels.yaml` trains nothing.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import print_table
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from who_asks import GROUPS, QUICK

from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings
from hf_fedmoe.experiments.yaml_files import read_yaml
from hf_fedmoe.strategies.client_groups import ClassSums, groups_of, shifts
from hf_fedmoe.strategies.client_statistics import ClientStatistics, head_of, statistics_of


MOST_OF_A_GROUP = 6


@torch.no_grad()
def statistics(told: dict[str, object]) -> tuple[np.ndarray, list[ClientStatistics]]:
    """Returns the true group of each client, and its statistics in the features of the start."""
    experiment, args = parse_settings(ImageExperiment, told)
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, args.seed)
    trainer = make_trainer("fedmoe_groups", experiment, args, data, processor)
    model, collate = trainer.model.experts[0].eval(), trainer.data_collator
    groups, found = [], []
    for client in range(data.num_clients):
        rows = data.client(client)
        groups.append(rows[0]["domain"])
        batches = (collate([rows[i] for i in range(s, min(s + 256, len(rows)))]) for s in range(0, len(rows), 256))
        found.append(statistics_of(model, head_of(model), batches, 256))
    return np.array(groups), found


def indices(groups: np.ndarray, found: list[ClientStatistics]) -> tuple[float, float]:
    """Returns the adjusted Rand index of average linkage of shifts, and of the package's groups."""
    white = ClassSums.of(found)
    num_groups = len(set(groups.tolist()))
    shift_MM: Tensor = shifts(white)
    linkage = AgglomerativeClustering(num_groups, metric="precomputed", linkage="average")
    linked = linkage.fit_predict((shift_MM - shift_MM.min()).fill_diagonal_(0).numpy())
    return adjusted_rand_score(groups, linked), adjusted_rand_score(groups, groups_of(white, num_groups).tolist())


def part_of(groups: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Draws how many clients of each group there are, and which."""
    drawn: list[int] = []
    for group in np.unique(groups):
        members = generator.permutation(np.flatnonzero(groups == group))
        drawn += members[: generator.integers(1, MOST_OF_A_GROUP + 1)].tolist()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=GROUPS / "labels.yaml", help="A YAML of recipes/groups.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unseen", type=int, default=8, help="Clients left out, which makes groups unequal.")
    parser.add_argument("--parts", type=int, default=20, help="Random parts of the clients.")
    parser.add_argument("--quick", action="store_true", help="Digits: does it run at all?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for seed in options.seeds:
        told = read_yaml(options.file)["settings"] | (QUICK if options.quick else {}) | {"seed": seed}
        told["num_clients"] += options.unseen
        told["unseen_share"] = options.unseen / told["num_clients"]
        with tempfile.TemporaryDirectory() as folder:
            groups, found = statistics(told | {"output_dir": folder, "save_strategy": "no"})
        generator = np.random.default_rng(seed)
        parts = [part_of(groups, generator) for _ in range(options.parts)]
        of_parts = np.array([indices(groups[part], [found[client] for client in part]) for part in parts])
        for name, whole, own in zip(("average linkage", "here"), indices(groups, found), of_parts.T, strict=True):
            table.append([str(seed), name, f"{whole:.2f}", f"{own.mean():.2f}", f"{own.min():.2f}"])
    sizes = f"{options.file.name}, adjusted Rand index with the true groups"
    print_table(sizes, ["seed", "groups by", "all clients", f"{options.parts} parts, mean", "least"], table)


if __name__ == "__main__":
    main()
