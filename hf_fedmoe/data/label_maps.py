"""One label map for datasets that came with several: classes are the same when their names are."""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from .labels import (
    check_few_classes,
    check_label_column,
    check_no_missing_labels,
    holds_names,
    name_some,
    read_labels,
)


Names = tuple[str, ...]


def with_one_label_map(
    leading: Mapping[str, Dataset], following: Mapping[str, Dataset], label_column: str
) -> dict[str, Dataset]:
    """
    Gives the labels of all datasets one `datasets.ClassLabel`, by the names of the classes.

    Strings and booleans are names; integers without names stay as they are. Datasets that have the common map already
    are returned as they came.

    Args:
        leading (`Mapping[str, datasets.Dataset]`): Datasets by their names in messages. If one of their maps, and only
            one, has all their names, its order is taken. Otherwise names are sorted, numbers by their value. So the
            order of datasets does not matter.
        following (`Mapping[str, datasets.Dataset]`): Further ones; names that only these have come last, sorted.
        label_column (`str`): Column of the labels.

    Returns:
        `dict[str, datasets.Dataset]`: All of them, leading ones first.

    Raises:
        ValueError: When labels are missing, some have names and others have not, or names differ in case only.
    """
    datasets = {**leading, **following}
    for where, dataset in datasets.items():
        check_label_column(dataset, label_column, where)
    features = {where: dataset.features[label_column] for where, dataset in datasets.items()}
    named = [where for where, feature in features.items() if holds_names(feature)]
    first = features[named[0]] if named else None
    if first is None or (isinstance(first, ClassLabel) and all(feature == first for feature in features.values())):
        return datasets
    for where, feature in features.items():
        if where not in named:
            names = first.names if isinstance(first, ClassLabel) else ["...", "..."]
            raise ValueError(
                f"{label_column!r} of {where} holds {feature} without names of classes, that of {named[0]} has names. "
                f"Give them the same ones, dataset.cast_column({label_column!r}, datasets.ClassLabel(names={names})), "
                "in the order of the numbers."
            )
    maps = {where: _names_of(dataset, label_column, where) for where, dataset in datasets.items()}
    _check_numbers(maps, label_column)
    _check_spelling(maps, label_column)
    in_order = {maps[where] for where in leading if isinstance(features[where], ClassLabel)}
    names = merge_names([maps[where] for where in leading], in_order, [maps[where] for where in following])
    if not in_order:
        check_few_classes(names, sum(map(len, datasets.values())), f"{label_column!r} of {name_some(list(leading))}")
    return {where: with_label_map(dataset, label_column, names, where) for where, dataset in datasets.items()}


def merge_names(leading: Iterable[Names], in_order: Iterable[Names], following: Iterable[Names] = ()) -> list[str]:
    """
    The names of all maps in one order.

    Args:
        leading (`Iterable[tuple[str, ...]]`): Maps.
        in_order (`Iterable[tuple[str, ...]]`): Those of them whose order somebody has chosen.
        following (`Iterable[tuple[str, ...]]`, *optional*): Maps whose further names come last.
    """
    every = set().union(*leading)
    whole = {names for names in in_order if set(names) == every}
    merged = list(whole.pop()) if len(whole) == 1 else _in_order(every)
    return merged + _in_order(set().union(*following) - every)


def with_label_map(dataset: Dataset, label_column: str, names: list[str], where: str) -> Dataset:
    """
    Numbers the labels of a dataset by their names' places in `names`.

    Args:
        dataset (`datasets.Dataset`): With labels that have names.
        label_column (`str`): Column of the labels.
        names (`list[str]`): Names of the classes.
        where (`str`): Name of the dataset in messages.

    Raises:
        ValueError: When the dataset has a name that is not among `names`, or missing labels.
    """
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel) and feature.names == names:
        return dataset
    own = _names_of(dataset, label_column, where)
    if unknown := [name for name in own if name not in set(names)]:
        raise ValueError(
            f"{label_column!r} of {where} has classes that the others have not: {name_some(unknown)}. There are "
            f"{name_some(names)}. Remove or rename them."
        )
    if isinstance(feature, ClassLabel):
        if list(own) == names[: len(own)]:
            return dataset.cast_column(label_column, ClassLabel(names=names))
        codes = read_labels(dataset, label_column, where)
    else:
        codes = pc.index_in(_strings(dataset, label_column), value_set=pa.array(own)).to_numpy()
    place = {name: label for label, name in enumerate(names)}
    labels = np.array([place[name] for name in own])[codes]
    # Added before the old column goes: without any column a dataset has no rows.
    added = f"{label_column} by name"
    return (
        dataset.add_column(added, labels, feature=ClassLabel(names=names))
        .remove_columns(label_column)
        .rename_column(added, label_column)
        .select_columns(dataset.column_names)
    )


def _names_of(dataset: Dataset, label_column: str, where: str) -> Names:
    """Names of the classes: those of the map, or else all that occur, sorted."""
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    check_no_missing_labels(dataset, label_column, where)
    names = pc.unique(_strings(dataset, label_column)).to_pylist()
    if not all(map(str.strip, names)):
        raise ValueError(
            f"{label_column!r} of {where} has rows whose label is an empty string. Remove them, "
            f"dataset.filter(lambda row: row[{label_column!r}].strip()), or give them labels."
        )
    return tuple(_in_order(names))


def _strings(dataset: Dataset, label_column: str) -> pa.ChunkedArray:
    column = dataset.select_columns([label_column]).with_format("arrow")[:][label_column]
    return pc.if_else(column, "True", "False") if pa.types.is_boolean(column.type) else column.cast(pa.string())


def _in_order(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _check_numbers(maps: Mapping[str, Names], label_column: str) -> None:
    """A `ClassLabel` without names calls its classes "0", "1", ..., which says nothing beside maps of words."""
    distinct = _distinct(maps)
    for names, where in distinct.items():
        others = [other for other in distinct if other != names]
        if not others or list(names) != [str(label) for label in range(len(names))]:
            continue
        if all(set(names).isdisjoint(other) for other in others):
            raise ValueError(
                f"{label_column!r} of {where} calls its classes {name_some(names)}, that of {distinct[others[0]]} "
                f"{name_some(others[0])}. Give both the same names, dataset.cast_column({label_column!r}, "
                "datasets.ClassLabel(names=[...]))."
            )


def _check_spelling(maps: Mapping[str, Names], label_column: str) -> None:
    """Refuses names that differ in case or spaces only, unless one map has both (characters do)."""
    distinct = _distinct(maps)
    spelled: dict[str, tuple[str, str]] = {}
    for names, where in distinct.items():
        for name in names:
            other, other_place = spelled.setdefault(name.strip().casefold(), (name, where))
            if other != name and not any({name, other} <= set(both) for both in distinct):
                raise ValueError(
                    f"{label_column!r} has the class {other!r} in {other_place} and {name!r} in {where}. Write them "
                    f"alike: strings with dataset.map, a ClassLabel with dataset.cast_column({label_column!r}, "
                    "datasets.ClassLabel(names=[...]))."
                )


def _distinct(maps: Mapping[str, Names]) -> dict[Names, str]:
    """Each map once, and the first dataset that has it."""
    found: dict[Names, str] = {}
    for where, names in maps.items():
        found.setdefault(names, where)
    return found
