"""Statistics of made-up clients, whose class means are those of their group."""

import torch

from hf_fedmoe.strategies.client_groups import ClassSums
from hf_fedmoe.strategies.client_statistics import ClientStatistics


C, D = 3, 5
SCALES_d = torch.tensor([0.1, 1.0, 10.0, 1.0, 3.0])


def means_of_groups(num_groups: int, size: float, num_classes: int = C) -> torch.Tensor:
    return size * torch.randn(num_groups, num_classes, D, generator=torch.Generator().manual_seed(1))


def clients_of_groups(
    groups: list[int], means_gCd: torch.Tensor, classes: list[list[int]], rows: int = 200
) -> list[ClientStatistics]:
    """Makes a client of each of `groups`, with rows of its own `classes`."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for group, own in zip(groups, classes, strict=True):
        labels_N = torch.tensor(own)[torch.randint(len(own), (rows,), generator=generator)]
        noise_Nd = torch.randn(rows, D, generator=generator)
        features_Nd = (means_gCd[group][labels_N] + noise_Nd) * SCALES_d
        found.append(ClientStatistics.of(features_Nd, labels_N, means_gCd.shape[1]))
    return found


def in_common(clients: list[ClientStatistics]) -> ClassSums:
    """Returns what is known of clients, in units of the covariance within classes of all."""
    return ClassSums.of(clients)
