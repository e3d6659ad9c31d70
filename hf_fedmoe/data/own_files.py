"""Clients' own files, one table of texts and labels for each client, checked and brought to common columns."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value

from .own_labels import one_label_map
from .own_paths import OwnPath, check_paths, named_paths
from .sources import FILE_FORMATS, OTHER_SEPARATORS, read_files


# Of a .csv: an empty cell is a text of no letters, and "None" and "NA" are texts as well.
AS_WRITTEN = {"csv": {"keep_default_na": False}}
# What is wrong in more files is counted.
MOST_FAULTS = 3


def read_own_files(
    clients: Mapping[str, OwnPath] | Sequence[OwnPath],
    others: Mapping[str, OwnPath],
    text: str,
    label: str,
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """
    Reads files of labelled texts.

    Args:
        clients (`Mapping[str, str]` or `Sequence[str]`): A `.csv`, `.jsonl`, `.json` or `.parquet` of each client.
        others (`Mapping[str, str]`): Files of the server, by the name of the split.
        text (`str`), label (`str`), classes (`Sequence[str]`, *optional*): See [`FederatedDataset.from_files`].

    Returns:
        `tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]]`: Clients and splits by their names, with the
        columns `text` and `label`, a `datasets.ClassLabel` that is the same for all. Other columns are left out.

    Raises:
        ValueError: Names the file, the column, the row and the remedy, for all files that are wrong.
    """
    if text == label:
        raise ValueError(f"text and label are both {text!r}: name the column of texts and that of labels.")
    paths = named_paths(clients)
    check_paths({**paths, **others}, FILE_FORMATS, "file")
    different = list(dict.fromkeys([*paths.values(), *others.values()]))
    found = dict(zip(different, _each([partial(_read, path, text, label) for path in different]), strict=True))
    kind = one_label_map({repr(str(path)): labels for path, (_, labels) in found.items()}, label, classes)
    tables = {path: _table(texts, labels, kind) for path, (texts, labels) in found.items()}
    return (
        {name: tables[path] for name, path in paths.items()},
        {name: tables[path] for name, path in others.items()},
    )


def _table(texts: pa.ChunkedArray, labels_N: np.ndarray, kind: ClassLabel) -> Dataset:
    columns = {"text": texts.cast(pa.string()), "label": pa.array(kind.str2int(labels_N.tolist()), pa.int64())}
    return Dataset(pa.table(columns), DatasetInfo(features=Features({"text": Value("string"), "label": kind})))


def read_texts(path: OwnPath, text: str) -> list[str]:
    """
    Reads texts without labels from a file.

    Args:
        path (`str`): A `.csv`, `.jsonl`, `.json` or `.parquet`.
        text (`str`): Its column of texts.

    Raises:
        ValueError: Names the file, the column, the row and the remedy.
    """
    check_paths({"texts": path}, FILE_FORMATS, "file")
    return _texts(_rows(path, text=text), text, path).to_pylist()


def _read(path: OwnPath, text: str, label: str) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Texts of a file, and its labels `[N]` as strings."""
    rows = _rows(path, text=text, label=label)
    texts, labels_N = _each([partial(_texts, rows, text, path), partial(_labels, rows, label, path)])
    return texts, labels_N


def _each(reads: Sequence[Callable[[], Any]]) -> list[Any]:
    """Returns the result of each of them, or raises one error for all that fail."""
    results: list[Any] = []
    faults: list[str] = []
    for read in reads:
        try:
            results.append(read())
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f" And so on: {len(faults)} files are wrong." if len(faults) > MOST_FAULTS else ""
        raise ValueError("\n".join(faults[:MOST_FAULTS]) + more)
    return results


def _rows(path: OwnPath, **columns: str) -> Dataset:
    """All rows of a file, which has these columns by what they are for."""
    kind = FILE_FORMATS[Path(path).suffix.lower()]
    rows = read_files(kind, {"train": Path(path)}, str(path), **AS_WRITTEN.get(kind, {}))["train"]
    if len(rows) == 0:
        raise ValueError(f"{str(path)!r} has no rows: check that it is the file that you mean, or leave it out.")
    for role, column in columns.items():
        _check_column(path, role, column, rows.column_names)
    return rows


def _check_column(path: OwnPath, role: str, column: str, columns: list[str]) -> None:
    if column in columns:
        return
    if len(columns) == 1 and (signs := [sign for sign in OTHER_SEPARATORS if sign in columns[0]]):
        raise ValueError(
            f"{str(path)!r} has one column, {columns[0]!r}, with {' and '.join(map(repr, signs))} in its name: "
            "separate the columns of a .csv by commas."
        )
    folded = {name.strip().casefold(): name for name in columns}
    near = [folded[name] for name in get_close_matches(column.strip().casefold(), folded, n=2)]
    raise ValueError(
        f"{str(path)!r} has no column {column!r} for {role}: "
        + (f"is it {' or '.join(map(repr, near))}? It" if near else "it")
        + f" has {', '.join(map(repr, columns))}. All files name their columns alike: name "
        f"one that is there (--{role}_column), or rename it."
    )


def _texts(rows: Dataset, name: str, path: OwnPath) -> pa.ChunkedArray:
    column = rows.data.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(
            f"`{name}` of {str(path)!r} holds {column.type}, {column[0].as_py()!r} in row 1, and no texts: name the "
            "column of texts."
        )
    empty_N = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(column, ""))), 0)
    _check_none(empty_N, f"`{name}` of {str(path)!r} is empty", "texts")
    return column


def _labels(rows: Dataset, name: str, path: OwnPath) -> np.ndarray:
    """The names `[N]` of the classes; whole numbers are called by what they are, with or without a point."""
    column, feature = rows.data.column(name), rows.features[name]
    begin = f"`{name}` of {str(path)!r}"
    if pa.types.is_boolean(column.type):
        column = pc.if_else(column, "True", "False")
    elif isinstance(feature, ClassLabel):  # of a .parquet that `datasets` wrote
        column = pc.take(pa.array(feature.names), column)
    elif pa.types.is_floating(column.type):
        column = _whole_numbers(column, begin)
    elif not (pa.types.is_integer(column.type) or pa.types.is_string(column.type) or _is_large(column.type)):
        kind = "values of several types" if str(column.type) == "extension<arrow.json>" else column.type
        raise ValueError(f"{begin} holds {kind}: a label is a word or a whole number, name another column.")
    names = pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), ""))
    _check_none(pc.equal(pc.utf8_length(names), 0), f"{begin} is empty", "labels")
    return np.array(names.to_pylist(), dtype=object)


def _whole_numbers(column: pa.ChunkedArray, begin: str) -> pa.ChunkedArray:
    values_N = column.to_numpy()
    known_N = ~np.isnan(values_N)
    wrong = np.flatnonzero(known_N & ~(np.isfinite(values_N) & (values_N == np.rint(values_N))))
    if len(wrong):
        raise ValueError(
            f"{begin} is {values_N[wrong[0]]} in row {wrong[0] + 1}: numbers that are not whole are no classes, "
            "divide them into some, for example low and high."
        )
    return pa.chunked_array([pa.array(np.where(known_N, values_N, 0).astype(np.int64), mask=~known_N)])


def _check_none(wrong_N: pa.ChunkedArray, begin: str, what: str) -> None:
    rows = np.flatnonzero(wrong_N.to_numpy())
    if len(rows):
        raise ValueError(
            f"{begin} in {len(rows)} of {len(wrong_N)} rows, row {rows[0] + 1} first (the first row of data is 1): "
            f"give them {what}, or take these rows out of the file."
        )


def _is_large(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind)
