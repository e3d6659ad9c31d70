"""Checks of a federated dataset that run before any training: labels, overlap between splits, features."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset


MAX_ROWS_COMPARED = 200_000


def column_as_numpy(dataset: Dataset, column: str) -> np.ndarray:
    """One column as an array, without decoding the others."""
    return np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])


def check_label_column(dataset: Dataset, label_column: str, split: str) -> None:
    """Raises a `ValueError` when `dataset` has no such column; `split` is its name in the message."""
    if label_column not in dataset.column_names:
        raise ValueError(
            f"label_column is {label_column!r}, but {split} has only the columns {dataset.column_names}. Give "
            "label_column=..., or rename the column with dataset.rename_column."
        )


def read_labels(dataset: Dataset, label_column: str, split: str) -> np.ndarray:
    """
    Reads the labels of a split and checks that they are integers from 0.

    Args:
        dataset (`datasets.Dataset`): N rows.
        label_column (`str`): Column of the labels.
        split (`str`): Name of the split in error messages.

    Returns:
        `np.ndarray`: Shape `[N]`, int64.

    Raises:
        ValueError: When the column is missing, is not of integers, or holds negative or missing values.
    """
    check_label_column(dataset, label_column, split)
    labels = column_as_numpy(dataset, label_column)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{label_column!r} of {split} holds {dataset.features[label_column]}, of which one is {labels[0]!r}; "
            f"labels must be integers from 0, none missing. Use dataset.class_encode_column({label_column!r}), or "
            "data.load_source."
        )
    if labels.min() < 0:
        row = int(np.argmin(labels))
        raise ValueError(
            f"{label_column!r} of {split} is {labels[row]} in row {row}, but labels start at 0. Negative labels "
            f"usually mark rows without a label: remove them with dataset.filter(lambda row: row[{label_column!r}] >= "
            "0)."
        )
    return labels.astype(np.int64)


def check_label_range(labels: np.ndarray, num_labels: int, label_column: str, split: str) -> None:
    """Raises a `ValueError` when a label is `num_labels` or above, and so past the classifier's last output."""
    if labels.max() >= num_labels:
        row = int(np.argmax(labels))
        raise ValueError(
            f"{label_column!r} of {split} is {labels[row]} in row {row}, but num_labels is {num_labels}, so labels go "
            f"from 0 to {num_labels - 1}. Raise num_labels, or shift labels that start at 1 (data.load_source does)."
        )


def check_same_features(reference: Dataset, other: Dataset, reference_name: str, other_name: str) -> None:
    """
    Checks that two splits can stand in one table: the same columns, types and label maps.

    Raises:
        ValueError: Names the first column that differs and both of its types.
    """
    for column in sorted({*reference.column_names, *other.column_names}):
        mine, theirs = reference.features.get(column), other.features.get(column)
        if mine is None or theirs is None:
            lacking, having = (reference_name, other_name) if mine is None else (other_name, reference_name)
            raise ValueError(
                f"Column {column!r} is in {having} but not in {lacking}. Remove it there with dataset.remove_columns, "
                "or add it here."
            )
        if mine != theirs:
            what = "label map" if isinstance(mine, ClassLabel) and isinstance(theirs, ClassLabel) else "type"
            raise ValueError(
                f"Column {column!r} has another {what} in {other_name} than in {reference_name}: {_describe(theirs)} "
                f"against {_describe(mine)}. All must agree: use dataset.cast_column, or "
                "dataset.align_labels_with_mapping for label maps."
            )


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
        rows = np.asarray(indices)
        if rows.size == 0:
            raise ValueError(
                f"{name} has no rows. Leave it out, or lower the number of clients or min_size of the partition."
            )
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"{name} must be a flat array of integer row indices, got shape {rows.shape} and type {rows.dtype}."
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
    hashes = {name: _row_hashes(dataset, shared) for name, dataset in splits.items()}
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if against not in (None, first, second):
                continue
            count = int(np.isin(hashes[second], hashes[first]).sum())
            if count:
                warnings.warn(
                    f"{count} of {len(splits[second])} rows of {second} are also in {first} (equal "
                    f"{', '.join(shared)}). Scores will look better than they are; remove the duplicates from "
                    "one of them.",
                    stacklevel=4,
                )


def _describe(feature: object) -> str:
    return str(feature.names) if isinstance(feature, ClassLabel) else str(feature)


def _row_hashes(dataset: Dataset, columns: list[str]) -> np.ndarray:
    """uint64 hash of each row, from the stored values: images are not decoded."""
    table: pa.Table = dataset.select_columns(columns).with_format("arrow")[:]
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    combined = np.zeros(table.num_rows, dtype=np.uint64)
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_nested(field.type):
            values = np.array([repr(value) for value in column.to_pylist()], dtype=object)
        else:
            values = column.to_pandas().to_numpy()
        # The odd factor makes the order of columns count; uint64 wraps around, which is wanted.
        combined = combined * np.uint64(1_000_003) + pd.util.hash_array(values)
    return combined
