"""Ways to draw the participants of a round."""

from collections.abc import Callable

import numpy as np


def uniform(num_clients: int, clients_per_round: int, rng: np.random.Generator) -> list[int]:
    """m of M clients, without replacement."""
    return sorted(rng.choice(num_clients, size=clients_per_round, replace=False).tolist())


def stratified(num_clients: int, clients_per_round: int, rng: np.random.Generator) -> list[int]:
    """
    One client of each residue class of client numbers modulo m, as the public code of Fed-MoE draws them: where
    neighbouring numbers have alike data (a predominant class c mod C), no round misses a kind of client.
    """
    return [
        int(rng.choice(np.arange(residue, num_clients, clients_per_round))) for residue in range(clients_per_round)
    ]


def poisson(num_clients: int, clients_per_round: int, rng: np.random.Generator) -> list[int]:
    """Each client with probability m / M, independently of the others: m on average, perhaps nobody."""
    return np.flatnonzero(rng.random(num_clients) < clients_per_round / num_clients).tolist()


CLIENT_CHOICES: dict[str, Callable[[int, int, np.random.Generator], list[int]]] = {
    "uniform": uniform,
    "stratified": stratified,
    "poisson": poisson,
}
