"""Checks of splits that run before any training: sizes, rows, overlap, classes."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from datasets import Dataset, Value

from .row_hashes import row_hashes


MAX_ROWS_COMPARED = 200_000


def check_indices(splits: Mapping[str, Sequence[int] | np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
    """
    Checks that splits, given as rows of one pool, are not empty, lie inside the pool and do not overlap.

    Args:
        splits (`Mapping[str, Sequence[int]]`): Row indices by name of the split.
        num_rows (`int`): Rows in the pool.

    Returns:
        `dict[str, np.ndarray]`: The same indices as int64 arrays, in the order given.

    Raises:
        ValueError: Names the split, or the two splits that overlap, and the first row at fault.
    """
    names = list(splits)
    owner_N = np.full(num_rows, -1)
    arrays = {}
    for number, (name, indices) in enumerate(splits.items()):
        if isinstance(indices, Dataset):
            raise ValueError(
                f"{name} is a datasets.Dataset, but must be rows of the pool: FederatedDataset.from_clients takes "
                "datasets."
            )
        rows = np.asarray(indices)
        if rows.size == 0:
            raise ValueError(
                f"{name} has no rows. Leave it out, or lower the number of clients or min_size of the partition."
            )
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"{name} must be a flat array of integer row indices, got shape {rows.shape} and type {rows.dtype}. "
                "Of a mask of booleans, np.flatnonzero(mask) gives them."
            )
        if rows.min() < 0 or rows.max() >= num_rows:
            wrong = rows.min() if rows.min() < 0 else rows.max()
            raise ValueError(
                f"{name} has row {wrong}, but the pool has rows 0 to {num_rows - 1}. Indices must refer to the pool."
            )
        taken = np.flatnonzero(owner_N[rows] >= 0)
        if taken.size:
            row = rows[taken[0]]
            raise ValueError(
                f"{names[owner_N[row]]} and {name} overlap: row {row} of the pool is in both ({taken.size} rows in "
                "all). What is trained on must not be scored on, nor held twice: give every row to one split."
            )
        unique, first = np.unique(rows, return_index=True)
        if len(unique) < len(rows):
            row = np.delete(rows, first)[0]
            raise ValueError(f"{name} has row {row} more than once. Use np.unique, or draw without replacement.")
        owner_N[rows] = number
        arrays[name] = rows.astype(np.int64)
    return arrays


def warn_equal_rows(splits: Mapping[str, Dataset], label_column: str, against: str | None = None) -> None:
    """
    Warns when splits that came as separate datasets have rows of equal content, i.e. when training data is scored on.

    Rows are compared by a 64-bit hash of the columns that all splits have, the label aside: the same text with another
    label is a leak too. Nothing is compared when the splits have more than `MAX_ROWS_COMPARED` rows together.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Datasets by name.
        label_column (`str`): Column of the labels.
        against (`str`, *optional*): Compare only with this split. By default every pair is compared.
    """
    shared = sorted(set.intersection(*(set(dataset.column_names) for dataset in splits.values())) - {label_column})
    if not shared or sum(len(dataset) for dataset in splits.values()) > MAX_ROWS_COMPARED:
        return
    hashes = {name: row_hashes(dataset, shared) for name, dataset in splits.items()}
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if against not in (None, first, second):
                continue
            count = int(np.isin(hashes[second], hashes[first]).sum())
            if count:
                warnings.warn(
                    f"{count} of {len(splits[second])} rows of {second} are also in {first} (equal "
                    f"{', '.join(shared)}). Scores will look better than they are: keep one row of each.",
                    stacklevel=4,
                )


def warn_classes(client_labels: np.ndarray, splits: Mapping[str, np.ndarray], label_names: Sequence[str]) -> None:
    """
    Warns when the reserved set lacks a class, and when validation or test have one that nobody trains on.

    Args:
        client_labels (`np.ndarray`): Labels of all clients' rows.
        splits (`Mapping[str, np.ndarray]`): Labels of `reserved`, `validation` and `test`, as far as there are any.
        label_names (`Sequence[str]`): C names of classes.
    """
    reserved = splits.get("reserved")
    if reserved is not None and len(missing := np.setdiff1d(np.arange(len(label_names)), reserved)):
        names = ", ".join(label_names[label] for label in missing)
        warnings.warn(
            f"The reserved set of {len(reserved)} rows has no example of {len(missing)} of {len(label_names)} "
            f"classes: {names}. The gate cannot learn whom to trust on them. Raise reserved_size, keep "
            "stratify=True, or add examples of these classes.",
            stacklevel=3,
        )
    trained = client_labels if reserved is None else np.concatenate([client_labels, reserved])
    for split in ("validation", "test"):
        if split in splits and len(untrained := np.setdiff1d(splits[split], trained)):
            rows = int(np.isin(splits[split], untrained).sum())
            names = ", ".join(label_names[label] for label in untrained)
            warnings.warn(
                f"{rows} of {len(splits[split])} rows of {split} have classes of which no client has a row: {names}. "
                "They cannot be learned; remove them from it, or give clients examples of them.",
                stacklevel=3,
            )


@contextmanager
def naming_missing_texts(dataset: Dataset, name: str) -> Iterator[None]:
    """
    Names the texts that are missing where a function that reads rows fails, as tokenizers do with words of their own.

    Args:
        dataset (`datasets.Dataset`): The rows.
        name (`str`): Their name in the message.

    Raises:
        ValueError: In the place of whatever is raised within, when a column of strings has rows without one.
    """
    try:
        yield
    except Exception as error:
        for column, kind in dataset.features.items():
            if kind not in (Value("string"), Value("large_string")):
                continue
            rows = [row for row, text in enumerate(dataset[column]) if text is None]
            if rows:
                raise ValueError(
                    f"map failed on {name}, where {column!r} is missing in {len(rows)} of {len(dataset)} rows, row "
                    f"{rows[0]} first. Before the clients are made, remove them, dataset.filter(lambda row: "
                    f"row[{column!r}] is not None). It says: {type(error).__name__}: {error}"
                ) from error
        raise
