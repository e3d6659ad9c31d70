"""
Differences of clients, before anything is trained: how many of each class they have, and whether a class looks the
same at all of them.

Shape suffixes: M clients, C classes, d features.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import silhouette_score
from transformers import PreTrainedModel

from ..data import FederatedDataset
from ..data.labels import labels_for_collators
from ..strategies.client_groups import ClassSums, groups_of, input_distance, shifts, strays
from ..strategies.client_statistics import head_of, statistics_of
from ..strategies.fedmoe_groups import INPUTS_DIFFER
from .markdown import table


# Groups whose members are nearer to each other than to others by less are none.
CLEAR_GROUPS = 0.4
# As many standard deviations of chance are added to shifts: differences that chance makes are small beside them.
STRAYS = 6.0
# Proportions of classes that differ by more are worth a method that minds them.
SKEWED = 0.2
# Of fewer pairs of clients with a class in common nothing can be told of all.
COMPARABLE = 0.5
MOST_GROUPS = 8
# Clients of whom two groups of two can be made.
FEWEST = 4
# Rows of a client that are looked at: means need no more.
MOST_ROWS = 500


@dataclass
class ClientDifferences:
    """
    The differences of clients.

    Args:
        label_skew (`float`): Mean over clients of half the sum of absolute differences between their proportions of
            classes and those of all rows: 0 if they are the same, towards 1 if each has a class of its own.
        shift_MM (`np.ndarray` of shape `[M, M]`): How far the classes of two clients are apart, in squared standard
            deviations within classes; around 0 or below where they look the same, 0 where they have none in common.
        groups (`list[int]`): The group of each client; one for all where no groups are clear.
        clearness (`float`): Silhouette of the groups, -1 to 1; of the best division if none is clear.
        comparable (`float`, *optional*, defaults to 1): Share of the pairs of clients that have a class in common.
        input_distance (`float`, *optional*, defaults to 0): How far the inputs of groups are apart whatever their
            labels, in squared standard deviations within classes; around 0 where the same input means another label.
    """

    label_skew: float
    shift_MM: np.ndarray
    groups: list[int]
    clearness: float
    comparable: float = 1.0
    input_distance: float = 0.0

    @property
    def num_groups(self) -> int:
        return len(set(self.groups))

    @property
    def advice(self) -> str:
        """Says in a sentence what that suggests."""
        if len(self.groups) < FEWEST:
            proportions = "differ" if self.label_skew > SKEWED else "are alike"
            return (
                f"Proportions of classes {proportions}; whether classes look different in groups cannot be told of "
                f"fewer than {FEWEST} clients. Take FedAvg, tuned on the reserved set, and FedAvg+ beside it."
            )
        if self.num_groups > 1:
            why = (
                "inputs themselves differ" if self.input_distance > INPUTS_DIFFER else "like inputs mean other labels"
            )
            return (
                f"Classes look different in {self.num_groups} groups of clients, where {why}: no single compact model "
                "serves all. "
                f"Compare `fedmoe_groups` with {self.num_groups} routed experts; its controls are `ifca` and "
                "`fedavg_plus`."
            )
        if self.comparable < COMPARABLE:
            return (
                f"Proportions of classes differ, and only {self.comparable:.0%} of the pairs of clients have a class "
                "in common: whether classes look different in groups cannot be told. Take FedAvg, tuned on the "
                "reserved set, and FedAvg+ beside it."
            )
        if self.label_skew > SKEWED:
            return (
                "Clients differ in how many of each class they have, and a class looks the same at all: one model for "
                "all is right. Take FedAvg, tuned on the reserved set; a mixture has little to add."
            )
        return "Clients look alike: take FedAvg. A mixture has little to add."

    def __str__(self) -> str:
        same_MM = np.equal.outer(self.groups, self.groups)
        within, between = self.shift_MM[same_MM & ~np.eye(len(same_MM), dtype=bool)], self.shift_MM[~same_MM]
        rows: list[list[object]] = [
            ["clients", len(self.groups)],
            ["label skew, 0 to 1", f"{self.label_skew:.2f}"],
            ["groups", self.num_groups],
            ["clearness of groups, -1 to 1", f"{self.clearness:.2f}"],
            ["shift of classes within groups", f"{within.mean():.2f}"],
            ["shift of classes between groups", f"{between.mean():.2f}" if len(between) else "-"],
            ["distance of inputs between groups", f"{self.input_distance:.2f}" if len(between) else "-"],
        ]
        return f"{table(rows, ['', ''])}\n\n{self.advice}"


@torch.no_grad()
def diagnose(
    data: FederatedDataset, model: PreTrainedModel, data_collator: Callable, statistics_size: int = 64
) -> ClientDifferences:
    """
    Tells in what clients differ, from one pass of a model over some rows of each.

    Args:
        data ([`~data.FederatedDataset`]): Its clients, prepared as for training.
        model ([`~transformers.PreTrainedModel`]): A classifier with a linear head, of whose features statistics are;
            random weights tell groups too.
        data_collator (`Callable`): Makes batches of rows, of which it is given the columns that the model takes.
        statistics_size (`int`, *optional*, defaults to 64): d, the features, at most.

    Raises:
        ValueError: When there is one client, which differs from nobody, clients have too few rows, or the model cannot
            tell the classes.
    """
    if data.num_clients < 2:
        raise ValueError(f"`data` has {data.num_clients} client, which differs from nobody: give two or more.")
    if statistics_size < 1:
        raise ValueError(f"`statistics_size` is {statistics_size}: give at least 1.")
    if model.config.num_labels != data.num_labels:
        raise ValueError(
            f"`model` has {model.config.num_labels} classes, `data` has {data.num_labels}: load it with "
            f"num_labels={data.num_labels}."
        )
    counts_MC = data.label_counts()
    _check_enough_rows(counts_MC)
    taken = {*inspect.signature(model.forward).parameters, "label", "label_ids"}
    pool = labels_for_collators(data.pool, data.label_column)
    pool = pool.select_columns([name for name in pool.column_names if name in taken])
    clients = (pool.select(rows) for rows in data.client_indices)
    head, training = head_of(model), model.training
    model.eval()
    try:
        found = [statistics_of(model, head, _batches(rows, model, data_collator), statistics_size) for rows in clients]
    finally:
        model.train(training)
    sums = ClassSums.of(found)
    shift_MM = shifts(sums)
    groups, clearness = _clearest_groups(shift_MM, strays(sums), lambda count: groups_of(sums, count).tolist())
    shares_MC = counts_MC / counts_MC.sum(1, keepdims=True)
    skew = np.abs(shares_MC - counts_MC.sum(0) / counts_MC.sum()).sum(1).mean() / 2
    has_MC = (counts_MC > 0).astype(int)
    comparable = ((has_MC @ has_MC.T) > 0)[~np.eye(len(has_MC), dtype=bool)].mean()
    distance = input_distance(sums.of_groups(torch.tensor(groups)))
    return ClientDifferences(float(skew), shift_MM.numpy(), groups, clearness, float(comparable), distance)


def _check_enough_rows(counts_MC: np.ndarray) -> None:
    """Raises `ValueError` where nothing is known of how much a class varies, at a client or at all of them."""
    if counts_MC.sum(1).max() > 1 and counts_MC.sum(0).max() > 1:
        return
    most = "no class has two rows" if counts_MC.sum(1).max() > 1 else "none has more than one"
    raise ValueError(
        f"The {len(counts_MC)} clients of `data` have too few rows, {counts_MC.sum()} together, and {most}: how much "
        "rows of a class differ by chance is not known. Give each client 2 rows or more of each of its classes."
    )


def _batches(rows: Dataset, model: PreTrainedModel, collate: Callable) -> Iterator[dict[str, torch.Tensor]]:
    """Gives rows of a client in batches on the model's device: of many some of all parts, which may be sorted."""
    places = range(0, len(rows), math.ceil(len(rows) / MOST_ROWS))
    for start in range(0, len(places), 64):
        batch = collate([rows[place] for place in places[start : start + 64]])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def _clearest_groups(
    shift_MM: torch.Tensor, stray_MM: torch.Tensor, divided: Callable[[int], list[int]]
) -> tuple[list[int], float]:
    """
    Divides clients into as many groups as are clearest, and says how clear; all are one group if none is. `stray_MM`
    is by how much shifts stray by chance.
    """
    told = stray_MM[~torch.eye(len(stray_MM), dtype=torch.bool) & (stray_MM > 0)]
    # Of all pairs together: were each judged by its own, a client of few rows would hide or make groups.
    away = STRAYS * told.square().mean().sqrt().item() if len(told) else 1.0
    distance_MM = (shift_MM + away).clamp_min(0).fill_diagonal_(0).numpy()
    divisions = []
    for count in range(2, min(MOST_GROUPS, len(shift_MM) // 2) + 1):
        groups = divided(count)
        # A group of one tells nothing: any client is the nearest to itself.
        if min(map(groups.count, groups)) > 1:
            divisions.append((float(silhouette_score(distance_MM, groups, metric="precomputed")), groups))
    clearness, groups = max(divisions, default=(0.0, [0] * len(shift_MM)))
    return (groups if clearness > CLEAR_GROUPS else [0] * len(shift_MM)), clearness
