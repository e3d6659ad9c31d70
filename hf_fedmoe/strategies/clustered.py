"""Clustered federated learning: Sattler, Müller and Samek 2020, "Clustered Federated Learning: Model-Agnostic
Distributed Multitask Optimization Under Privacy Constraints", Algorithms 1 and 2.

Shape suffixes: K clusters, M clients, m participants, P elements of a row, U those of its parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from .mixing import mix_, parameter_rows
from .setting_kinds import check_setting_kinds


@dataclass
class ClusteredFL(Strategy):
    """
    FedAvg within clusters of clients, of which there is one at first. A cluster near a stationary point at which its
    clients still pull apart, norm(mean update) < eps1 and max norm(update) > eps2, is split in two by the cosine
    similarity of their updates.

    A split knows only the updates of a round's participants; clients that were not drawn stay with the larger part.
    The server's model is the mean over all participants; an unseen client uses the cluster that has the lowest loss on
    its training examples.

    Args:
        eps1 (`float`, *optional*, defaults to 0.4): Norm of the mean update below which a cluster may be split; 0
            never splits and is FedAvg.
        eps2 (`float`, *optional*, defaults to 1.6): Norm that the largest update must exceed.
        min_size (`int`, *optional*, defaults to 2): A cluster is split only with more participants than this.
    """

    eps1: float = 0.4
    eps2: float = 1.6
    min_size: int = 2
    name = "clustered"
    compressible = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        for name in ("eps1", "eps2"):
            if vars(self)[name] < 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}: norms are compared with it, give 0 or more.")
        if self.min_size < 1:
            raise ValueError(f"`min_size` is {self.min_size}: one client cannot be split, give at least 1.")

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["clusters_KP"] = server.bank_SP[:1].clone()
        server.tensors["cluster_M"] = torch.zeros(num_clients, dtype=torch.int64)

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        return server.tensors["clusters_KP"][server.tensors["cluster_M"][client]]

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        cluster_M = server.tensors["cluster_M"]
        cluster_m = cluster_M[uploads.clients].clone()
        for cluster in cluster_m.unique().tolist():
            places = (cluster_m == cluster).nonzero()[:, 0].tolist()
            part = self._splits_off(server, uploads, cluster, places)
            if part:
                new = len(server.tensors["clusters_KP"])
                server.tensors["clusters_KP"] = torch.cat(
                    [server.tensors["clusters_KP"], server.tensors["clusters_KP"][cluster, None]]
                )
                cluster_M[[uploads.clients[place] for place in part]] = new
                self._average(server, uploads, new, part)
            self._average(server, uploads, cluster, [place for place in places if place not in part])
        uploads.average_into_(server)
        return {"clusters": float(len(server.tensors["clusters_KP"]))}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        clusters_KP, cluster_M = server.tensors["clusters_KP"], server.tensors["cluster_M"]
        if task.client < len(cluster_M):
            return local.load(clusters_KP[cluster_M[task.client]], task.integers)
        found = local.least_loss(task.dataset, clusters_KP, task.integers, task.seed)
        return local.load(clusters_KP[found], task.integers)

    def _splits_off(self, server: Server, uploads: Uploads, cluster: int, places: list[int]) -> list[int]:
        """The participants, by their places, that leave the cluster; none if it stays whole."""
        if len(places) <= self.min_size:
            return []
        center_1U = parameter_rows(server, server.tensors["clusters_KP"][cluster, None])
        updates_mU = parameter_rows(server, uploads.rows_mP[places]) - center_1U
        weights_m = uploads.num_examples_m[places] / uploads.num_examples_m[places].sum()
        mean_norm = (weights_m.to(updates_mU) @ updates_mU).norm()
        if mean_norm >= self.eps1 or updates_mU.norm(dim=1).max() <= self.eps2:
            return []
        normal_mU = normalize(updates_mU, dim=1)
        return [places[i] for i in smaller_part(normal_mU @ normal_mU.T)]

    def _average(self, server: Server, uploads: Uploads, cluster: int, places: list[int]) -> None:
        weights_m = uploads.num_examples_m[places] / uploads.num_examples_m[places].sum()
        keep_1 = torch.zeros(1)
        mix_(server, server.tensors["clusters_KP"][cluster, None], uploads.rows_mP[places], weights_m[None], keep_1)


def smaller_part(similarity_mm: Tensor) -> list[int]:
    """
    The smaller part of the division in two whose highest similarity across is the lowest: the most similar pairs are
    joined until two groups are left (Algorithm 1).
    """
    size = len(similarity_mm)
    group = list(range(size))
    first, second = torch.triu_indices(size, size, offset=1)
    order = similarity_mm.cpu()[first, second].argsort(descending=True, stable=True)
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if len(set(group)) == 2:
            break
        group = [group[i] if member == group[j] else member for member in group]
    parts = [[i for i in range(size) if group[i] == name] for name in sorted(set(group))]
    return min(parts, key=len)
