"""One dataset divided: the server's splits held out by a seed, and the rest among clients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .client_names import names_and_parts
from .common_features import check_dataset
from .label_maps import with_one_label_map
from .server_splits import hold_out_splits
from .split_checks import check_indices


# Rows of each client, by its name if it has one.
Partition = Sequence[np.ndarray] | Mapping[str, np.ndarray]


def divide(
    dataset: Dataset,
    partition: Callable[[Dataset], Partition],
    sizes: Mapping[str, int | float],
    test: Dataset | int | float | None,
    seed: int,
    label_column: str,
    num_labels: int | None,
    stratify: bool,
    reserved_share: float | None,
    read_labels: Callable,
    resolve_classes: Callable,
) -> dict[str, Any]:
    """
    Divides rows as [`FederatedDataset.split`] says.

    Args:
        dataset, partition, test, seed, label_column, num_labels, stratify, reserved_share: Those of
            [`FederatedDataset.split`].
        sizes (`Mapping[str, int | float]`): Of the reserved set and the validation set, by their names.
        read_labels, resolve_classes (`Callable`): How rows of this kind tell their classes, see [`read_labels`] and
            [`resolve_classes`] in `labels`.

    Returns:
        `dict[str, Any]`: Arguments of [`FederatedDataset`].
    """
    check_dataset(dataset, "dataset")
    if not callable(partition):
        raise ValueError(
            f"partition is {partition!r}: give a function of the rows that divides them, lambda rows: "
            "iid(len(rows), num_clients=10)."
        )
    own_test = {"test": test} if isinstance(test, Dataset) else {}
    labelled = with_one_label_map({"dataset": dataset}, own_test, label_column)
    dataset = labelled["dataset"]
    labels = {name: read_labels(labelled[name], label_column, name) for name in labelled}
    # Of all rows, those included that the partition will give to nobody.
    num_labels, _ = resolve_classes(dataset.features[label_column], labels, num_labels, label_column)
    if not own_test and test is not None:
        sizes = {**sizes, "test": test}
    held, remaining = hold_out_splits(labels["dataset"], sizes, seed, stratify, reserved_share)
    returned = partition(dataset.select(remaining))
    names, parts = names_and_parts(returned)
    named = {f"client {name}": rows for name, rows in zip(names, parts, strict=True)}
    clients = [remaining[rows] for rows in check_indices(named, len(remaining)).values()]
    if not clients:
        raise ValueError(
            "partition returned no clients. It must return a list with one array of rows for each client."
        )

    # Rows that nobody has leave the pool, so that map() does not tokenise them.
    used = np.sort(np.concatenate([*clients, *held.values()]))
    if len(used) < len(dataset):
        dataset = dataset.select(used)
        clients = [np.searchsorted(used, rows) for rows in clients]
        held = {name: np.searchsorted(used, rows) for name, rows in held.items()}
    divided: Partition = dict(zip(names, clients, strict=True)) if isinstance(returned, Mapping) else clients
    return {
        "pool": dataset,
        "client_indices": divided,
        "reserved": held.get("reserved"),
        "validation": held.get("validation"),
        "test": labelled["test"] if own_test else held.get("test"),
        "num_labels": num_labels,
    }
