"""A function applied to rows one to one, labels untouched: what an existing partition bears."""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from .split_checks import naming_missing_texts


def map_rows(
    dataset: Dataset,
    labels_N: np.ndarray,
    label_column: str,
    name: str,
    function: Callable,
    options: dict[str, Any],
    read_labels: Callable,
) -> Dataset:
    """
    Maps a dataset and checks that the result still fits its partition.

    Args:
        dataset (`datasets.Dataset`): N rows.
        labels_N (`np.ndarray` of shape `[N]`), label_column (`str`): Their labels, and where they are.
        name (`str`): What they are called in messages.
        function (`Callable`), options (`dict`): Of `datasets.Dataset.map`.
        read_labels (`Callable`): How rows of this kind tell their classes, see [`read_labels`] in `labels`.

    Raises:
        ValueError: When the function changes the number of rows, or labels.
    """
    with naming_missing_texts(dataset, name):
        mapped = dataset.map(function, **options)
    if len(mapped) != len(dataset):
        raise ValueError(
            f"map turned the {len(dataset)} rows of {name} into {len(mapped)}, so the partition no longer fits. "
            "The function must keep rows one to one; split long texts or filter before building the "
            "FederatedDataset."
        )
    if not np.array_equal(read_labels(mapped, label_column, f"the mapped {name}"), labels_N):
        raise ValueError(
            f"map changed {label_column!r} of {name}. Change labels before building the FederatedDataset."
        )
    return mapped
