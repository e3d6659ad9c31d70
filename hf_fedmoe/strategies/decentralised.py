"""Averaging with neighbours instead of a server, after local epochs.

Lian et al. 2017, "Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized
Parallel Stochastic Gradient Descent".

Shape suffixes: M clients, m participants, P elements of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from .mixing import mix_, move_global_
from .setting_kinds import check_setting_kinds


MAX_GRAPHS = 1000


@dataclass
class Decentralised(Strategy):
    """
    Each client trains a model of its own, and then averages with its neighbours: x_c <- sum_j W_cj x_j with a doubly
    stochastic W on an Erdős-Rényi graph of the clients, self-loops included.

    A round's graph is that of its participants: W has Metropolis weights, 1 / (1 + the larger degree) for neighbours.
    The server's model is the mean of the participants, which nobody computes but for evaluation. A client that never
    took part starts from the common start; evaluated, from that mean, after a round's training.

    Args:
        edge_probability (`float`, *optional*, defaults to 0.5): Of each pair of clients; 1 averages over all.
        graph_seed (`int`, *optional*, defaults to 0): Seed of the graph, drawn again until it is connected.
    """

    edge_probability: float = 0.5
    graph_seed: int = 0
    name = "decentralised"
    # Nobody knows the neighbour's last model, which an update would be measured from.
    compressible = False

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not 0 < self.edge_probability <= 1:
            raise ValueError(
                f"`edge_probability` is {self.edge_probability}: give a number in (0, 1], 1 links all clients."
            )

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["start_P"] = server.bank_SP[0].clone()
        linked_MM = connected_graph(num_clients, self.edge_probability, self.graph_seed)
        server.tensors["linked_MM"] = torch.from_numpy(linked_MM)

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        return server.tensors["start_P"] if kept_P is None else kept_P

    def links(self, server: Server, client: int, participants: list[int]) -> int:
        return int(server.tensors["linked_MM"][client, participants].sum())

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        move_global_(server, uploads, torch.full_like(uploads.weights_m, 1 / len(uploads.clients)))
        distance_m = (uploads.rows_mP - server.bank_SP[:1]).norm(dim=1)
        return {"disagreement": distance_m.mean().item()}

    def synchronise(self, server: Server, uploads: Uploads) -> dict[int, Tensor]:
        linked_mm = server.tensors["linked_MM"][uploads.clients][:, uploads.clients].cpu()
        weights_mm = metropolis_weights(linked_mm)
        own_m = weights_mm.diag()
        rows_mP = uploads.rows_mP.clone()
        mix_(server, rows_mP, uploads.rows_mP, weights_mm - own_m.diag(), own_m)
        return dict(zip(uploads.clients, rows_mP, strict=True))

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        if "row_P" in task.kept:
            return local.load(task.kept["row_P"], task.integers)
        local.train(task.dataset, task.received_P, task.integers, task.out_P, task.seed)
        return local.worker


def connected_graph(num_clients: int, edge_probability: float, seed: int) -> np.ndarray:
    """A connected Erdős-Rényi graph as a symmetric `bool` matrix `[M, M]` with an empty diagonal."""
    rng = np.random.default_rng(seed)
    for _ in range(MAX_GRAPHS):
        upper_MM = np.triu(rng.random((num_clients, num_clients)) < edge_probability, 1)
        linked_MM = upper_MM | upper_MM.T
        reached_M = np.arange(num_clients) == 0
        for _ in range(num_clients):
            reached_M = reached_M | linked_MM[reached_M].any(0)
        if reached_M.all():
            return linked_MM
    raise ValueError(
        f"`edge_probability` is {edge_probability}: none of {MAX_GRAPHS} graphs of {num_clients} clients was "
        "connected, raise it."
    )


def metropolis_weights(linked_mm: Tensor) -> Tensor:
    """The symmetric, doubly stochastic W of a graph, `[m, m]`; what neighbours leave of 1 is the self-loop."""
    linked_mm = linked_mm.double()
    degree_m = linked_mm.sum(1)
    weights_mm = linked_mm / (1 + torch.maximum(degree_m[:, None], degree_m[None]))
    return weights_mm + torch.diag(1 - weights_mm.sum(1))
