"""
Measures which clients are put together, by whom, and when: the adjusted Rand index of each rule's groups with the true
ones after some rounds, of the clients that have taken part (1 is perfect, 0 chance), and in how many groups they are.

- *statistics*: Fed-MoE of groups, by sums of features that a client sends once;
- *loss*: IFCA, where a client takes the model with the least loss on its examples, each time;
- *updates*: Clustered FL, which splits clusters whose clients' updates disagree, with its paper's thresholds;
- *relevance*: Fed-MoE, where a client belongs to the routed expert of which it has the largest share.

`HF_FEDMOE_DATA=<folder> python benchmarks/assignments.py recipes/groups/rotations.yaml` trains all four.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import print_table
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from who_asks import GROUPS, QUICK

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings
from hf_fedmoe.experiments.yaml_files import read_yaml
from hf_fedmoe.federation import Server, ServerStep, Uploads


# Of a client that has not taken part.
NOBODY = -1


def by_statistics(server: Server, uploads: Uploads, last_M: Tensor) -> Tensor:
    return server.tensors["group_M"]


def by_loss(server: Server, uploads: Uploads, last_M: Tensor) -> Tensor:
    last_M[uploads.clients] = torch.stack([tensors["cluster"] for tensors in uploads.tensors])
    return last_M


def by_updates(server: Server, uploads: Uploads, last_M: Tensor) -> Tensor:
    last_M[uploads.clients] = server.tensors["cluster_M"][uploads.clients]
    # A split moves those who did not take part too.
    return torch.where(last_M == NOBODY, NOBODY, server.tensors["cluster_M"])


def by_relevance(server: Server, uploads: Uploads, last_M: Tensor) -> Tensor:
    share_KM = server.tensors["contribution_SM"][1:]
    return torch.where(share_KM.any(0), share_KM.argmax(0), NOBODY)


RULES: dict[str, tuple[str, Callable[[Server, Uploads, Tensor], Tensor]]] = {
    "statistics": ("fedmoe_groups", by_statistics),
    "loss": ("ifca", by_loss),
    "updates": ("clustered", by_updates),
    "relevance": ("fedmoe", by_relevance),
}


def indices(
    told: dict[str, object], rule: str, rounds: list[int], data: FederatedDataset, processor: object
) -> list[str]:
    """Trains the method of a rule, and tells the index and the number of groups after each of `rounds`."""
    method, assigned = RULES[rule]
    experiment, args = parse_settings(ImageExperiment, told)
    truth_M = np.array([data.client(client)[0]["domain"] for client in range(data.num_clients)])
    trainer = make_trainer(method, experiment, args, data, processor)
    update, last_M, found = trainer.strategy.update, torch.full((data.num_clients,), NOBODY), []

    def noting(server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        report = update(server, uploads, step)
        group_M = assigned(server, uploads, last_M).numpy()
        if step.round_index + 1 in rounds:
            known = group_M != NOBODY
            index = adjusted_rand_score(truth_M[known], group_M[known])
            found.append(f"{index:.2f} ({len(set(group_M[known].tolist()))})")
        return report

    trainer.strategy.update = noting
    trainer.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=GROUPS / "labels.yaml", help="A YAML of recipes/groups.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3, 5, 10, 20, 40], help="After which to look.")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--quick", action="store_true", help="Digits and three rounds: does it run at all?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = [1, 3] if options.quick else sorted(options.rounds)
    told = read_yaml(options.file)["settings"] | (QUICK if options.quick else {})
    told |= {"seed": options.seed, "rounds": rounds[-1], "save_strategy": "no", "disable_tqdm": True}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        experiment, _ = parse_settings(ImageExperiment, told | {"output_dir": folder})
        processor = experiment.load_processor()
        _, data = experiment.load_data(processor, options.seed)
        for rule in options.rules:
            own = told | {"output_dir": f"{folder}/{rule}"}
            table.append([rule, *indices(own, rule, rounds, data, processor)])
    title = f"{options.file.name}, seed {options.seed}: adjusted Rand index (groups) after so many rounds"
    print_table(title, ["rule", *map(str, rounds)], table)


if __name__ == "__main__":
    main()
