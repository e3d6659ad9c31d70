"""The column of labels: read, checked, and counted as classes."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value


# More classes than this need at least two rows each, on average: ids and numbers to predict have fewer.
MANY_CLASSES = 100
MAX_NAMED = 12


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


def labels_for_collators(dataset: Dataset, label_column: str) -> Dataset:
    """
    Calls the labels `label`, unless they are called `label` or `labels`, which collators know already. Further columns
    of such names go: a collator would take them for the labels.
    """
    name = label_column if label_column in ("label", "labels") else "label"
    known = {"label", "labels", "label_ids"} - {label_column}
    dataset = dataset.remove_columns([column for column in dataset.column_names if column in known])
    return dataset if name == label_column else dataset.rename_column(label_column, name)


def check_no_missing_labels(dataset: Dataset, label_column: str, split: str) -> None:
    """Raises a `ValueError` when rows have no label."""
    column = dataset.select_columns([label_column]).with_format("arrow")[:][label_column]
    if column.null_count:
        raise ValueError(
            f"{label_column!r} of {split} is missing in {column.null_count} of {len(dataset)} rows. Remove them, "
            f"dataset.filter(lambda row: row[{label_column!r}] is not None), or give them labels."
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
    check_no_missing_labels(dataset, label_column, split)
    labels = column_as_numpy(dataset, label_column)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{label_column!r} of {split} holds {dataset.features[label_column]}, of which one is {labels[0]!r}; "
            f"labels must be integers from 0. {_remedy(labels, label_column)}"
        )
    if labels.min() < 0:
        row = int(np.argmin(labels))
        raise ValueError(
            f"{label_column!r} of {split} is {labels[row]} in row {row}, but labels start at 0. Negative labels "
            f"usually mark rows without a label: remove them with dataset.filter(lambda row: row[{label_column!r}] >= "
            "0)."
        )
    return labels.astype(np.int64)


def _remedy(labels: np.ndarray, label_column: str) -> str:
    if labels.ndim != 1 or labels.dtype == object:
        return "A row has one label: choose or make a column with one integer or string in each row."
    if not np.issubdtype(labels.dtype, np.floating):
        return f"Use dataset.class_encode_column({label_column!r}), or data.load_source."
    if (labels == np.rint(labels)).all():
        return f'These are whole numbers: use dataset.cast_column({label_column!r}, datasets.Value("int64")).'
    return "Numbers with fractions are no classes: divide them into some, for example low and high."


def check_label_range(labels: np.ndarray, num_labels: int, label_column: str, split: str) -> None:
    """Raises a `ValueError` when a label is `num_labels` or above, and so past the classifier's last output."""
    if labels.max() >= num_labels:
        row = int(np.argmax(labels))
        raise ValueError(
            f"{label_column!r} of {split} is {labels[row]} in row {row}, but num_labels is {num_labels}, so labels go "
            f"from 0 to {num_labels - 1}. Raise num_labels, or let labels that start at 1 be classes by name, "
            f"dataset.class_encode_column({label_column!r})."
        )


def count_classes(labels: np.ndarray, label_column: str, split: str) -> int:
    """
    Counts the classes of integer labels that have no names: the largest plus one.

    Args:
        labels (`np.ndarray`, shape `[N]`): Integers from 0.
        label_column (`str`): Column of the labels.
        split (`str`): Name of the split in messages.

    Raises:
        ValueError: When 0 has no row (stars from 1 to 5), most numbers below the largest have none (10, 20, 30), all
            labels are 0, or many have hardly a row each (ids, a number to predict).

    Warns:
        UserWarning: When a class in between has no row.
    """
    present, count = np.unique(labels), int(labels.max()) + 1
    begin = f"{label_column!r} of {split}"
    encode = f"make classes of what there is, dataset.class_encode_column({label_column!r})"
    check_few_classes(present, len(labels), begin)
    if count == 1:
        raise ValueError(
            f"{begin} is 0 in all rows, and one class is nothing to learn. Choose another label_column, or give "
            "num_labels=2 if other clients have more classes."
        )
    if present[0] > 0 or 2 * len(present) < count:
        lacking = "no 0" if present[0] > 0 else f"few of 0 to {count - 1}"
        raise ValueError(
            f"{begin} holds the numbers {name_some(present)}, and {lacking}, but labels count from 0. Either "
            f"{encode}, or give num_labels={count} if the others are classes too."
        )
    if len(present) < count:
        missing = np.setdiff1d(np.arange(count), present)
        warnings.warn(
            f"{begin} has no row of {len(missing)} of {count} classes: {name_some(missing)}. Give num_labels={count} "
            f"if they are meant, or {encode}.",
            stacklevel=4,
        )
    return count


def check_few_classes(classes: Sequence | np.ndarray, num_rows: int, begin: str) -> None:
    """Raises a `ValueError` that starts with `begin` when there are many classes with hardly a row each."""
    if len(classes) > MANY_CLASSES and 2 * len(classes) > num_rows:
        raise ValueError(
            f"{begin} has {len(classes)} different values in {num_rows} rows: these are ids, texts or numbers to "
            "predict rather than classes. Choose another label_column, or make it a datasets.ClassLabel if they are."
        )


def resolve_classes(
    feature: object, labels: Mapping[str, np.ndarray], num_labels: int | None, label_column: str
) -> tuple[int, list[str]]:
    """
    Number and names of the classes.

    Args:
        feature: Of the column: a `datasets.ClassLabel`, or integers, whose names are their numbers.
        labels (`Mapping[str, np.ndarray]`): The labels of each split by its name.
        num_labels (`int`, *optional*): What the caller says; by default what [`count_classes`] finds.
        label_column (`str`): Column of the labels.

    Raises:
        ValueError: When `num_labels` is no number of classes, or another one than that of the names.
    """
    if num_labels is not None and (
        isinstance(num_labels, bool) or not isinstance(num_labels, int | np.integer) or num_labels < 2
    ):
        raise ValueError(f"num_labels is {num_labels!r}: give an integer of at least 2, or leave it out.")
    if not isinstance(feature, ClassLabel):
        if num_labels is None:
            num_labels = count_classes(np.concatenate(list(labels.values())), label_column, " and ".join(labels))
        num_labels = int(num_labels)
        return num_labels, [str(label) for label in range(num_labels)]
    if num_labels not in (None, feature.num_classes):
        raise ValueError(
            f"num_labels is {num_labels}, but {label_column!r} has {feature.num_classes} classes: "
            f"{feature.names}. Leave num_labels out, or cast the column."
        )
    if feature.num_classes < 2:
        raise ValueError(
            f"{label_column!r} has one class only, {feature.names}, and that is nothing to learn. Choose "
            "another label_column, or cast it to a datasets.ClassLabel with all names."
        )
    return feature.num_classes, list(feature.names)


def name_some(values: Sequence | np.ndarray) -> str:
    """The values separated by commas, cut short."""
    names = [str(value) for value in values[:MAX_NAMED]]
    return ", ".join(names) + (f" ... {values[-1]}" if len(values) > MAX_NAMED else "")


def holds_names(feature: object) -> bool:
    """Tells whether a column's values are names of classes: a `datasets.ClassLabel`, strings or booleans."""
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool")
    )
