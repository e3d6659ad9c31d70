"""Datasets that came apart, brought to one table: the same columns and types."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    concatenate_datasets,
)

from .label_maps import with_one_label_map


# What to do with what is no `Dataset`.
REMEDIES: dict[type, str] = {
    type(None): "leave it out",
    DatasetDict: 'take one of its splits, for example splits["train"]',
    IterableDatasetDict: 'take one of its splits and read it, Dataset.from_list(list(splits["train"]))',
    IterableDataset: "rows are counted and drawn, so read the stream, Dataset.from_list(list(stream))",
    pd.DataFrame: "use Dataset.from_pandas(frame)",
    list: "use Dataset.from_list(rows)",
    dict: "use Dataset.from_dict(columns)",
    str: "use datasets.load_dataset or data.load_source",
    torch.utils.data.Dataset: "use Dataset.from_list([rows[i] for i in range(len(rows))])",
}
STRINGS, BYTES = ("string", "large_string"), ("binary", "large_binary")


def check_dataset(data: Any, name: str) -> None:
    """Raises a `ValueError` that says what to do when `data`, called `name`, is no `datasets.Dataset` with rows."""
    if not isinstance(data, Dataset):
        # A streaming dataset is a PyTorch dataset too: the first that fits says more.
        remedy = next((text for kind, text in REMEDIES.items() if isinstance(data, kind)), "make one of it")
        raise ValueError(f"{name} is a {type(data).__name__}, not a datasets.Dataset: {remedy}.")
    if len(data) == 0:
        raise ValueError(f"{name} has no rows. Leave it out, or give a dataset with rows.")


def check_clients(clients: Any) -> Sequence[Dataset] | Mapping[str, Dataset]:
    """Raises a `ValueError` when clients are no list of datasets, or datasets by name; returns them otherwise."""
    if isinstance(clients, DatasetDict) and "train" in clients:
        raise ValueError(
            f"clients is a DatasetDict with the splits {list(clients)}, which are no clients. Divide one of them, "
            'FederatedDataset.split(splits["train"], ...), or give a dict of the clients\' datasets.'
        )
    if isinstance(clients, str | Dataset) or not isinstance(clients, Sequence | Mapping):
        raise ValueError(
            f"clients is a {type(clients).__name__}: give a list of datasets, or a dict of datasets by the clients' "
            "names. FederatedDataset.split divides one dataset among clients."
        )
    if len(clients) == 0:
        raise ValueError("clients is empty: there are no clients. Give at least one dataset.")
    return clients


def one_table(datasets: Mapping[str, Dataset]) -> tuple[Dataset, dict[str, np.ndarray]]:
    """
    Joins datasets, which copies no rows but those of datasets that are cast, see [`with_common_features`].

    Args:
        datasets (`Mapping[str, datasets.Dataset]`): By their names in messages.

    Returns:
        `tuple[Dataset, dict[str, np.ndarray]]`: The table, and the rows of each dataset in it.
    """
    datasets = with_common_features(datasets)
    table = concatenate_datasets(list(datasets.values()))
    ends = np.cumsum([len(dataset) for dataset in datasets.values()])
    return table, dict(zip(datasets, np.split(np.arange(len(table)), ends[:-1]), strict=True))


def with_common_features(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """
    Casts datasets to common features, so that they can stand in one table.

    Integers, numbers with fractions, strings and lists of these are cast to the widest type among the datasets; label
    maps of further columns are merged by name. Datasets that have the common features are returned as they came.

    Args:
        datasets (`Mapping[str, datasets.Dataset]`): By their names in messages.

    Raises:
        ValueError: Names the first column that a dataset lacks, or that has types with nothing in common.
    """
    datasets = dict(datasets)
    first_name, first = next(iter(datasets.items()))
    for name, dataset in datasets.items():
        for column in sorted({*first.column_names} ^ {*dataset.column_names}):
            having, lacking = (first_name, name) if column in first.column_names else (name, first_name)
            raise ValueError(
                f"Column {column!r} is in {having} but not in {lacking}. Remove it there with dataset.remove_columns, "
                "or add it here."
            )
        _check_transform(first, dataset, first_name, name)
    for column in first.column_names:
        features = {name: dataset.features[column] for name, dataset in datasets.items()}
        if all(feature == first.features[column] for feature in features.values()):
            continue
        if all(isinstance(feature, ClassLabel) for feature in features.values()):
            datasets = with_one_label_map(datasets, {}, column)
            continue
        common = first.features[column]
        for name, feature in features.items():
            wider = _common_feature(common, feature)
            if wider is None:
                raise ValueError(
                    f"Column {column!r} has another type in {name} than in {first_name}: {feature} against "
                    f"{common}. All must agree: use dataset.cast_column."
                )
            common = wider
        for name, feature in features.items():
            if feature != common:
                datasets[name] = datasets[name].cast_column(column, common)
    return datasets


def _common_feature(one: Any, other: Any) -> Any | None:
    """The feature that holds what both hold, `None` if there is none."""
    if one == other:
        return one
    if isinstance(one, Value) and isinstance(other, Value):
        dtype = _common_dtype(one.dtype, other.dtype)
        return None if dtype is None else Value(dtype)
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        inner = _common_feature(one.feature, other.feature)
        return None if inner is None else List(inner)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        inner = {key: _common_feature(one[key], other[key]) for key in one}
        return None if None in inner.values() else inner
    return None


def _common_dtype(one: str, other: str) -> str | None:
    for kind in (STRINGS, BYTES):
        if one in kind and other in kind:
            return kind[0]
    if "null" in (one, other):
        return other if one == "null" else one
    for number in (np.integer, np.floating):
        try:
            if all(np.issubdtype(np.dtype(dtype), number) for dtype in (one, other)):
                common = np.promote_types(one, other)
                return common.name if np.issubdtype(common, number) else None
        except TypeError:  # of dates, for example, which numpy has not
            return None
    return None


def _check_transform(first: Dataset, other: Dataset, first_name: str, name: str) -> None:
    """Refuses transforms that datasets do not share: joined with others, a dataset silently loses its own."""
    if first.format != other.format and "custom" in (first.format["type"], other.format["type"]):
        raise ValueError(
            f"{first_name} and {name} do not have the same transform (with_transform), and one table has one. Give it "
            "to all, or use data.map after building the FederatedDataset."
        )
