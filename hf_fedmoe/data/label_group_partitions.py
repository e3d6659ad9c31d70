"""Partitions of data with labels of two levels, as CIFAR-100 has them: coarse ones, each with fine ones of its own."""

from collections.abc import Sequence

import numpy as np

from .partitions import as_labels, check_num_clients


# Stands for a share too small for a float, so that what is left can still be drawn once all else is exhausted.
SMALLEST_SHARE = 1e-100


def pachinko(
    coarse_labels: Sequence[int] | np.ndarray,
    fine_labels: Sequence[int] | np.ndarray,
    num_clients: int,
    examples_per_client: int,
    coarse_alpha: float = 0.4,
    fine_alpha: float = 10.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """
    Label skew in two stages: a client prefers some coarse labels, and under each of them some fine ones.

    Each client has its own shares of the coarse labels from Dir(coarse_alpha), and under every coarse label its own
    shares of the fine labels from Dir(fine_alpha). One client after the other draws its examples one by one, without
    replacement: a coarse label, under it a fine label, and a row of that. A label without rows left is removed, and
    the shares of its siblings are normalised again. This is the Pachinko allocation of Reddi et al. (2021), with which
    FedEM and pFedMM divide CIFAR-100 into 100 clients of 600.

    Args:
        coarse_labels (`Sequence[int]`, shape `[N]`): Coarse label of each row.
        fine_labels (`Sequence[int]`, shape `[N]`): Fine label of each row; it belongs to one coarse label only.
        num_clients (`int`): Number of clients M.
        examples_per_client (`int`): Rows for each client; rows that are not needed go to nobody.
        coarse_alpha (`float`, *optional*, defaults to 0.4): Concentration over coarse labels, above 0.
        fine_alpha (`float`, *optional*, defaults to 10.0): Concentration over the fine labels of one coarse label,
            above 0.
        seed (`int`, *optional*, defaults to 0): Seed of the shares and of the draws.

    Returns:
        `list[np.ndarray]`: M sorted index arrays of `examples_per_client` rows.

    Raises:
        ValueError: When a fine label is under two coarse ones, there are too few rows, or a concentration is not
            positive.
    """
    coarse_N, fine_N = as_labels(coarse_labels), as_labels(fine_labels)
    check_num_clients(num_clients)
    for name, alpha in (("coarse_alpha", coarse_alpha), ("fine_alpha", fine_alpha)):
        if not alpha > 0:
            raise ValueError(f"{name} is {alpha}, but a Dirichlet concentration must be above 0.")
    if examples_per_client < 1:
        raise ValueError(f"examples_per_client is {examples_per_client}, but every client needs at least one row.")
    if len(coarse_N) != len(fine_N):
        raise ValueError(
            f"coarse_labels has {len(coarse_N)} rows and fine_labels {len(fine_N)}. Give both labels of the same rows."
        )
    needed = num_clients * examples_per_client
    if len(fine_N) < needed:
        raise ValueError(
            f"{num_clients} clients of examples_per_client = {examples_per_client} need {needed} rows, but there are "
            f"{len(fine_N)}. Lower one of the two."
        )
    fine_names, first_F, fine_N, left_F = np.unique(fine_N, return_index=True, return_inverse=True, return_counts=True)
    elsewhere = np.flatnonzero(coarse_N != coarse_N[first_F][fine_N])
    if elsewhere.size:
        row = elsewhere[0]
        raise ValueError(
            f"Fine label {fine_names[fine_N[row]]} is under the coarse labels {coarse_N[first_F[fine_N[row]]]} and "
            f"{coarse_N[row]} (row {row}), but must be under one. Check that coarse_labels and fine_labels are not "
            "exchanged and are of the same rows."
        )
    parent_F = np.unique(coarse_N[first_F], return_inverse=True)[1]

    rng = np.random.default_rng(seed)
    siblings_G = np.bincount(parent_F)
    coarse_MG = rng.dirichlet(np.full(len(siblings_G), float(coarse_alpha)), size=num_clients)
    fine_MF = np.empty((num_clients, len(fine_names)))
    for parent, siblings in enumerate(siblings_G):
        fine_MF[:, parent_F == parent] = rng.dirichlet(np.full(siblings, float(fine_alpha)), size=num_clients)
    counts_MF = np.zeros((num_clients, len(fine_names)), dtype=np.int64)
    for counts_F, coarse_G, fine_F in zip(
        counts_MF, np.maximum(coarse_MG, SMALLEST_SHARE), np.maximum(fine_MF, SMALLEST_SHARE), strict=True
    ):
        while missing := examples_per_client - counts_F.sum():
            drawn_F = _draw_until_one_is_exhausted(left_F, coarse_G, fine_F, parent_F, missing, rng)
            counts_F += drawn_F
            left_F = left_F - drawn_F

    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for fine in range(len(fine_names)):
        rows = rng.permutation(np.flatnonzero(fine_N == fine))
        for part, chunk in zip(parts, np.split(rows, np.cumsum(counts_MF[:, fine]))[:-1], strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def _draw_until_one_is_exhausted(
    left_F: np.ndarray,
    coarse_G: np.ndarray,
    fine_F: np.ndarray,
    parent_F: np.ndarray,
    most: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """
    Draws how many rows of each fine label a client gets before one of them runs out, `most` at most.

    Until then all draws have the same probabilities, so they are made at once; those after it are thrown away.
    """
    shares_F = np.where(left_F > 0, fine_F, 0.0)
    total_F = np.bincount(parent_F, weights=shares_F)[parent_F]
    # A coarse label keeps its share as long as one of its fine labels has rows.
    shares_F *= coarse_G[parent_F] / np.where(total_F > 0, total_F, 1.0)
    drawn = rng.choice(len(left_F), size=most, p=shares_F / shares_F.sum())
    counts_F = np.bincount(drawn, minlength=len(left_F))
    last = most
    for fine in np.flatnonzero((left_F > 0) & (counts_F >= left_F)):
        last = min(last, np.flatnonzero(drawn == fine)[left_F[fine] - 1] + 1)
    return np.bincount(drawn[:last], minlength=len(left_F))
