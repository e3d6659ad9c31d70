"""Labels as they stand in somebody's files, words or numbers, brought to one label map for all of them."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from datasets import ClassLabel

from .counted import counted
from .labels import check_few_classes, name_some


# A name this many times rarer than one that it resembles is taken for a slip.
RARER = 10


def one_label_map(labels: Mapping[str, np.ndarray], column: str, classes: Sequence[str] | None) -> ClassLabel:
    """
    Finds the classes of all files together.

    Args:
        labels (`Mapping[str, np.ndarray]`): The label of each row as a string, by the name of the file in messages.
        column (`str`): What the labels are called in messages.
        classes (`Sequence[str]`, *optional*): All classes in their order; those that occur if left out, numbers by
            their value and words in natural order, `"grade 2"` before `"grade 10"`.

    Returns:
        `datasets.ClassLabel`

    Raises:
        ValueError: When a label is not among `classes`. Without them, when there is a single class, hardly two
            rows of any, words among numbers, or one name in two spellings.

    Warns:
        UserWarning: When a class of one file only looks like a slip of the pen.
    """
    if classes is not None:
        return _as_told(labels, column, classes)
    counts = {where: Counter(found.tolist()) for where, found in labels.items()}
    total = sum(counts.values(), Counter())
    check_few_classes(list(total), sum(total.values()), f"`{column}` of all files together")
    if len(total) == 1:
        raise ValueError(
            f"`{column}` is {next(iter(total))!r} in every row of every file, and one class is nothing to learn: name "
            "another column of labels, or all classes, classes=[...] (--classes)."
        )
    _check_one_kind(labels, total, column)
    _check_spelling(counts, total, column)
    _warn_of_slips(counts, total, column)
    return ClassLabel(names=in_natural_order(total))


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorts names: numbers by their value, and numbers within words too."""
    names = sorted(names)
    if all(map(_is_number, names)):
        return sorted(names, key=float)
    return sorted(names, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in _parts(name)])


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name.casefold()) if part]


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", name) is not None


def _as_told(labels: Mapping[str, np.ndarray], column: str, classes: Sequence[str]) -> ClassLabel:
    names = [str(name) for name in classes]
    if isinstance(classes, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"classes is {classes!r}: give a list of at least two different names.")
    for where, found in labels.items():
        for row in np.flatnonzero(~np.isin(found, names)):
            near = get_close_matches(found[row], names, n=1)
            raise ValueError(
                f"`{column}` of {where} is {str(found[row])!r} in row {row + 1}, which classes has not: "
                + (f"is it {near[0]!r}?" if near else f"it has {name_some(names)}.")
            )
    return ClassLabel(names=names)


def _check_one_kind(labels: Mapping[str, np.ndarray], total: Counter, column: str) -> None:
    """Refuses words among numbers, and numbers among words: the rarer are named."""
    numbers = {name for name in total if _is_number(name)}
    words = set(total) - numbers
    if not numbers or not words:
        return
    odd, others = sorted((numbers, words), key=lambda names: sum(total[name] for name in names))
    for where, found in labels.items():
        for row in np.flatnonzero(np.isin(found, list(odd))):
            raise ValueError(
                f"`{column}` of {where} is {str(found[row])!r} in row {row + 1}, while most labels are "
                f"{'numbers' if others is numbers else 'words'} ({name_some(in_natural_order(others))}): write it as "
                f"they are, or say that these are the classes, classes={in_natural_order(others) + sorted(odd)} "
                "(--classes)."
            )


def _check_spelling(counts: Mapping[str, Counter], total: Counter, column: str) -> None:
    spelled: dict[str, str] = {}
    for name in total:
        other = spelled.setdefault(name.casefold(), name)
        if other != name:
            places = ", ".join(f"{each!r} in {_where(counts, each)}" for each in (other, name))
            raise ValueError(
                f"`{column}` has one name in two spellings, {places}: write it alike everywhere, or say that these "
                f"are two classes, classes={in_natural_order(total)} (--classes)."
            )


def _warn_of_slips(counts: Mapping[str, Counter], total: Counter, column: str) -> None:
    for name, count in total.items():
        if _is_number(name) or sum(name in found for found in counts.values()) > 1:
            continue
        common = [other for other in total if total[other] >= RARER * count]
        for near in get_close_matches(name, common, n=1, cutoff=0.8):
            warnings.warn(
                f"`{column}` is {name!r} in {counted(count, 'row')} of {_where(counts, name)} and "
                f"nowhere else: is it {near!r}? Mend the file, or, if it is a class of its own, say so, "
                f"classes={in_natural_order(total)} (--classes).",
                stacklevel=5,
            )


def _where(counts: Mapping[str, Counter], name: str) -> str:
    return next(where for where, found in counts.items() if name in found)
