"""Sources of data: the shipped reviews, scikit-learn's digits, a file, a folder of parquet files, the Hub."""

import csv
import glob
import io
import os
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError

from .label_maps import with_one_label_map
from .labels import check_few_classes, column_as_numpy, holds_names
from .partitions import hold_out


DATA_FOLDER_VARIABLE = "HF_FEDMOE_DATA"
LABEL_COLUMNS = ("label", "labels", "fine_label")
# Splits of each; the class of a character of Shakespeare is yet to be made, see `next_character_windows`.
SHIPPED = {"reviews": ("train", "test"), "shakespeare": ("train",)}
# What needs neither a folder of data nor a network.
WITH_PACKAGES = (*SHIPPED, "digits")
# What `datasets` calls the first values of rows that have more than there are names.
UNNAMED = "__index_level_0__"
# Of columns of a .csv, besides commas.
OTHER_SEPARATORS = (";", "\t", "|")
FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_source(
    name: str,
    text_column: str | None = None,
    label_column: str | None = None,
    test_size: int | float = 0.2,
    seed: int = 0,
    image_column: str | None = None,
) -> DatasetDict:
    """
    Loads a classification dataset as splits `train` and `test` with columns `text` or `image`, and `label`.

    `name` is looked up in this order:

    1. `"reviews"`: the reviews that come with the package (columns text, label, department; five classes);
    2. `"digits"`: the handwritten digits that come with scikit-learn (1797 grey images of 8x8; ten classes);
    3. a local file that ends in `.parquet`, `.csv`, `.json` or `.jsonl`;
    4. `<name>.parquet`, or `<name>_train.parquet` with `<name>_test.parquet`, in the folder that the environment
       variable `HF_FEDMOE_DATA` names;
    5. a dataset of the Hugging Face Hub.

    Labels become a `ClassLabel` that counts from 0. Strings and booleans are class-encoded in sorted order. Integers
    that start at 1 (stars) are shifted down by one and keep their old values as names. Integers that start at 0 stay.
    A column that is a `ClassLabel` already stays as it is; where those of the splits differ, they are merged by name.
    All other columns (user, department, ...) are kept, for natural partitions. A dataset with a column of images is
    one of images, unless `text_column` is given, and needs no text.

    Args:
        name (`str`): See above.
        text_column (`str`, *optional*): Column to rename to `text`. By default `text`, or else the only column of
            strings.
        label_column (`str`, *optional*): Column to rename to `label`. By default the first that there is of
            `label`, `labels` and `fine_label`.
        test_size (`int` or `float`, *optional*, defaults to 0.2): Rows, or share of rows, to hold out (stratified by
            label) when the source has no split named test.
        seed (`int`, *optional*, defaults to 0): Seed of this hold-out.
        image_column (`str`, *optional*): Column to rename to `image` (`img` of CIFAR on the Hub). By default `image`,
            or else the only column with the feature `datasets.Image`.

    Returns:
        `datasets.DatasetDict`: With `train` and `test`.

    Raises:
        ValueError: When the name is found nowhere, a column is missing or cannot be guessed, or labels, texts or
            images are missing.
    """
    if text_column is not None and image_column is not None:
        raise ValueError(
            f"text_column is {text_column!r} and image_column is {image_column!r}, but a classifier reads one of the "
            "two. Give only that one."
        )
    splits = _find(name)
    if "train" in splits:
        splits = {split: splits[split] for split in ("train", "test") if split in splits}
    elif len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    else:
        raise ValueError(
            f"{name!r} has the splits {list(splits)}, but none is named train. Load and name it yourself."
        )

    splits = {
        split: _rename_columns(data, text_column, label_column, image_column, f"{name}/{split}")
        for split, data in splits.items()
    }
    splits = _encode_labels(splits, name)
    if "test" not in splits:
        held, rest = hold_out(column_as_numpy(splits["train"], "label"), test_size, seed)
        if len(held) == 0:
            remedy = "a larger test_size, or more rows" if test_size else "a test_size above 0"
            raise ValueError(
                f"{str(name)!r} has no test split and test_size is {test_size}, which holds out none of its "
                f"{len(rest)} rows. Give {remedy}."
            )
        splits = {"train": splits["train"].select(rest), "test": splits["train"].select(held)}
    return DatasetDict(splits)


def load_rows(name: str) -> Dataset:
    """
    Loads all rows of a source as they are, its splits joined: for data whose classes have to be made first.

    Args:
        name (`str`): Looked up as in [`load_source`]; `"shakespeare"` is the plays that come with the package
            (columns text, role_id, play, act and scene; one row for each speech).

    Returns:
        `datasets.Dataset`

    Raises:
        ValueError: When the name is found nowhere.
    """
    return concatenate_datasets(list(_find(name).values()))


def load_named_classes(
    name: str | Path, text_column: str | None = None, label_column: str | None = None, image_column: str | None = None
) -> Dataset:
    """
    Loads all rows of a source with columns `text` or `image`, and `label`, whose classes are called by their names:
    for rows that are one part of the data, and may lack a class. Numbers become names, 3 becomes "3".

    Args:
        name (`str`), text_column, label_column, image_column (*optional*): As in [`load_source`].

    Returns:
        `datasets.Dataset`: With the labels as strings.

    Raises:
        ValueError: When the name is found nowhere, or a column is missing or has missing values.
    """
    rows = _rename_columns(load_rows(str(name)), text_column, label_column, image_column, str(name))
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        names = [feature.names[label] for label in rows["label"]]
    else:
        # CSV readers give 5.0 for stars.
        whole = (int(each) if isinstance(each, float) and each.is_integer() else each for each in rows["label"])
        names = [str(each) for each in whole]
    return rows.remove_columns("label").add_column("label", names)


def _find(name: str) -> dict[str, Dataset]:
    looked_for = []
    if name in SHIPPED:
        shipped = resources.files("hf_fedmoe") / "assets" / name
        # In memory: a few hundred KB, and the package may lie in a zip or a folder that cannot be written to.
        return {
            split: Dataset(pq.read_table(io.BytesIO((shipped / f"{split}.parquet").read_bytes())))
            for split in SHIPPED[name]
        }
    looked_for.append(f"the shipped {', '.join(SHIPPED)}")
    if name == "digits":
        return {"train": _digits()}
    looked_for.append('scikit-learn\'s "digits"')

    path = Path(name).expanduser()
    if path.suffix.lower() in FILE_FORMATS:
        if path.is_file():
            return read_files(FILE_FORMATS[path.suffix.lower()], {"train": path}, name)
        # A name with the suffix of a file is never meant for the Hub.
        raise ValueError(f"There is no file {name!r} in the current folder {Path.cwd()}. Check the path.")
    looked_for.append(f"a local file ({', '.join(FILE_FORMATS)})")

    folder = os.environ.get(DATA_FOLDER_VARIABLE)
    if folder:
        alone, train = Path(folder, f"{name}.parquet"), Path(folder, f"{name}_train.parquet")
        if alone.is_file():
            return read_files("parquet", {"train": alone}, name)
        if train.is_file():
            files = {"train": train}
            if (test := Path(folder, f"{name}_test.parquet")).is_file():
                files["test"] = test
            return read_files("parquet", files, name)
        looked_for.append(f"{alone} and {train} ({DATA_FOLDER_VARIABLE})")
    else:
        looked_for.append(f"no folder of parquet files, because {DATA_FOLDER_VARIABLE} is not set")

    try:
        return dict(load_dataset(name))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        looked_for.append(f"a dataset {name!r} on the Hub ({type(error).__name__})")
        raise ValueError(
            f"No dataset {name!r}. Looked for: {'; '.join(looked_for)}. Check the spelling, the path, or the network "
            "connection."
        ) from error
    except Exception as error:
        if path.exists():
            raise _unreadable(name, "a data set", error) from error
        raise


def read_files(file_format: str, files: dict[str, Path], name: str, **options: Any) -> dict[str, Dataset]:
    """
    Reads files of one format.

    Args:
        file_format (`str`): One of the values of `FILE_FORMATS`.
        files (`dict[str, Path]`): By the names of their splits.
        name (`str`): What they are called in messages.
        options: Of the format's reader in `datasets`.

    Raises:
        ValueError: When they cannot be read, with the reason.
    """
    if file_format == "csv":  # of which there is one file at a time
        ((split, path),) = files.items()
        options["sep"] = _separator(path)
    try:
        # Escaped: brackets and stars in a file's name would be a pattern, which may also fit other files.
        escaped = {split: glob.escape(str(path.expanduser())) for split, path in files.items()}
        found = dict(load_dataset(file_format, data_files=escaped, **options))
    except Exception as error:
        if file_format == "csv":
            _check_separator(path, name, options["sep"])
        raise _unreadable(name, file_format, error) from error
    if file_format == "csv":
        _check_names(path, found[split], name, options["sep"])
    return found


def _names(path: Path, separator: str) -> list[str]:
    """Lists the names in the first line of a .csv that is not empty; none where it is no text."""
    try:
        with path.expanduser().open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return next(filter(None, csv.reader(file, delimiter=separator)), [])
    except (OSError, csv.Error):  # which reading it will name
        return []


def _separator(path: Path) -> str:
    """
    Tells by what the columns of a .csv are separated: commas, unless there is none between its names but another sign,
    as spreadsheets write it in many countries. Rows tell nothing, since texts have all these signs.
    """
    if len(_names(path, ",")) > 1:
        return ","
    others = [sign for sign in OTHER_SEPARATORS if len(_names(path, sign)) > 1]
    return others[0] if len(others) == 1 else ","


def _check_separator(path: Path, name: str, taken: str) -> None:
    """Raises `ValueError` where a .csv that could not be read may have either of several separators."""
    names = _names(path, taken)
    if len(names) == 1 and (signs := [sign for sign in OTHER_SEPARATORS if sign in names[0]]):
        raise ValueError(
            f"{str(name)!r} begins with {names[0][:80]!r}, whose columns may be separated by "
            f"{' or '.join(map(repr, signs))}: save it with commas, in UTF-8."
        )


def _check_names(path: Path, rows: Dataset, name: str, separator: str) -> None:
    """
    Raises `ValueError` where a .csv has two columns of one name, of which the first would be taken, or more values in
    a row than names of columns: all would be of others.
    """
    names = _names(path, separator)
    for column, count in Counter(names).items():
        if column and count > 1:
            raise ValueError(f"{str(name)!r} has {count} columns {column!r}: give each a name of its own.")
    if UNNAMED in rows.column_names and UNNAMED not in names:  # which pandas makes an index of what is too much
        raise ValueError(
            f"{str(name)!r} has more values in each row than names in its first line, {separator.join(names)!r}: put "
            f"texts with {separator!r} into quotes, and give each column a name."
        )


def _unreadable(name: str, file_format: str, error: BaseException) -> ValueError:
    """Says in one line why files cannot be read: the reason is the innermost of several errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{str(name)!r} is not UTF-8 ({reason}). Save the file as UTF-8.")
    if "corresponds to no data" in reason or type(error).__name__ == "EmptyDataError":
        return ValueError(f"{str(name)!r} has no rows. Check that it is the file that you mean, and whole.")
    return ValueError(
        f"{str(name)!r} cannot be read as {file_format}. It says: {type(error).__name__}: {reason.rstrip('.')}. Check "
        "that the file is whole and of the format that its name ends in."
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes half a second, which only this source is worth

    digits = load_digits()
    pixels_BYX = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=[str(name) for name in range(10)])})
    return Dataset.from_dict({"image": list(pixels_BYX), "label": digits.target}, features=features)


def _rename_columns(
    dataset: Dataset, text_column: str | None, label_column: str | None, image_column: str | None, where: str
) -> Dataset:
    if label_column is None:
        label_column = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    content, content_column = _find_content(dataset, text_column, label_column, image_column)
    for target, column in (("label", label_column), (content, content_column)):
        if column is None or column not in dataset.column_names:
            if column is None and target == "text" and "text" in dataset.column_names:
                raise ValueError(
                    f"{where} has no texts in 'text' but {dataset.features['text']}. Give another text_column, "
                    "or save the data after dataset.cast_column('text', datasets.Value('string'))."
                )
            if len(dataset.column_names) == 1 and (
                found := [sign for sign in OTHER_SEPARATORS if sign in dataset.column_names[0]]
            ):
                raise ValueError(
                    f"{where} has one column, {dataset.column_names[0]!r}, whose name holds "
                    f"{' and '.join(map(repr, found))}. Separate the columns of a .csv by commas."
                )
            what = f"has no column {column!r}" if column else f"leaves open which column is the {target}"
            raise ValueError(f"{where} {what}; it has {dataset.column_names}. Give {target}_column=...")
        if target == "image" and not isinstance(dataset.features[column], Image):
            raise ValueError(
                f"{where} has no images in {column!r} but {dataset.features[column]}. Give another image_column, or "
                f"save the data after dataset.cast_column({column!r}, datasets.Image())."
            )
        if missing := _count_missing(dataset, column):
            # An image may have neither bytes nor path, and `filter` would fail to decode it.
            remedy = (
                f"dataset.cast_column({column!r}, datasets.Image(decode=False)).filter(lambda row: row[{column!r}] "
                f"and any(row[{column!r}].values())), and cast it back to datasets.Image()"
                if target == "image"
                else f"dataset.filter(lambda row: row[{column!r}] is not None)"
            )
            raise ValueError(
                f"{where} has {missing} rows without {target} (column {column!r}). Remove them: {remedy}."
            )
        if column != target:
            if target in dataset.column_names:
                raise ValueError(
                    f"{where} has a column {target!r} besides {target}_column = {column!r}. Remove or rename one of "
                    f"the two, because {column!r} is renamed to {target!r}."
                )
            dataset = dataset.rename_column(column, target)
    return dataset


def _find_content(
    dataset: Dataset, text_column: str | None, label_column: str | None, image_column: str | None
) -> tuple[str, str | None]:
    """Says whether the dataset is one of `"text"` or `"image"`, and its column, `None` where that is open."""
    if text_column is not None:
        return "text", text_column
    if image_column is not None:
        return "image", image_column
    content = "image"
    columns = [column for column, kind in dataset.features.items() if isinstance(kind, Image)]
    if not columns:
        content, kinds = "text", (Value("string"), Value("large_string"))
        columns = [column for column, kind in dataset.features.items() if kind in kinds and column != label_column]
    return content, content if content in columns else columns[0] if len(columns) == 1 else None


def _count_missing(dataset: Dataset, column: str) -> int:
    values = dataset.data.column(column)
    if not isinstance(dataset.features[column], Image):
        return values.null_count
    has_neither = pc.and_(pc.is_null(pc.struct_field(values, "bytes")), pc.is_null(pc.struct_field(values, "path")))
    return pc.sum(has_neither).as_py() or 0


def _encode_labels(splits: dict[str, Dataset], name: str) -> dict[str, Dataset]:
    """Gives all splits one `ClassLabel` from the values of all of them."""
    if any(holds_names(dataset.features["label"]) for dataset in splits.values()):
        return with_one_label_map(splits, {}, "label")
    labels = {split: column_as_numpy(dataset, "label") for split, dataset in splits.items()}
    every = np.concatenate(list(labels.values()))
    if np.issubdtype(every.dtype, np.floating) and (every == np.rint(every)).all():
        every = every.astype(np.int64)  # CSV readers give 5.0 for stars
    if not np.issubdtype(every.dtype, np.integer):
        what, values = f"of the type {splits['train'].features['label']}", every
        if np.issubdtype(every.dtype, np.floating):
            what, values = "numbers with fractions", every[every != np.rint(every)]
        raise ValueError(f"Labels of {name!r} are {what}, for example {values[0]}. Need classes.")
    if every.min() not in (0, 1):
        raise ValueError(
            f"Integer labels of {name!r} go from {every.min()} to {every.max()}, but must start at 0 or 1. Map "
            "them to 0..C-1, or remove rows without a label."
        )
    values = np.arange(every.min(), every.max() + 1)
    check_few_classes(values, len(every), f"'label' of {name!r}")
    feature = ClassLabel(names=[str(value) for value in values])
    return {
        split: dataset.remove_columns("label").add_column(
            "label", np.searchsorted(values, labels[split]), feature=feature
        )
        for split, dataset in splits.items()
    }
