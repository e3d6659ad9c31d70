"""A checksum of what rows hold, read from their Arrow buffers: no row becomes a Python object."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pyarrow as pa
from datasets import Dataset


# Rows are hashed in portions of this many, so that it does not matter in which chunks a table has them.
PORTION = 1000


def rows_fingerprint(dataset: Dataset, columns: Iterable[str] | None = None) -> str:
    """
    A checksum of the rows of a dataset in their order. Equal contents give equal checksums, whether they were
    selected, concatenated, mapped or loaded; nothing is decoded. An image or sound whose bytes are in a file of its
    own counts by that file's name and size.

    Args:
        dataset (`datasets.Dataset`): The rows.
        columns (`Iterable[str]`, *optional*): Whose contents count, all columns if left out.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    names = sorted(dataset.column_names if columns is None else columns)
    digest = hashlib.sha256(f"{len(dataset)} {names}".encode())
    if names:
        for portion in dataset.select_columns(names).with_format("arrow").iter(PORTION):
            for name in names:
                _hash_array(portion[name].combine_chunks(), digest.update)
    return digest.hexdigest()[:16]


def _hash_array(array: pa.Array, update: Callable[[bytes | memoryview], None]) -> None:
    """Hashes the values and the places of the missing ones, but not what happens to lie in memory around them."""
    if isinstance(array, pa.ChunkedArray):  # of no rows, or of more than one buffer can hold
        for chunk in array.chunks:
            _hash_array(chunk, update)
        return
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    update(f"{len(array)} {array.null_count} ".encode())
    if array.null_count:
        update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).data)
        array = array.drop_null()
    if len(array) == 0:
        return
    if pa.types.is_dictionary(kind):
        _hash_array(array.dictionary_decode(), update)
    elif is_file(kind):
        _hash_files(array, update)
    elif pa.types.is_struct(kind):
        for field in kind:
            update(field.name.encode())
            _hash_array(array.field(field.name), update)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        update(array.value_lengths().to_numpy().astype("<i8").data)
        _hash_array(array.flatten(), update)
    elif pa.types.is_fixed_size_list(kind):
        update(f"{kind.list_size} ".encode())
        _hash_array(array.flatten(), update)
    elif pa.types.is_boolean(kind):
        update(np.packbits(array.to_numpy(zero_copy_only=False)).data)
    elif pa.types.is_primitive(kind):
        width = kind.bit_width // 8
        update(str(kind).encode())
        update(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])
    elif kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        _, offsets, values = array.buffers()
        width = "<i8" if kind in (pa.large_string(), pa.large_binary()) else "<i4"
        places = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1]
        update(np.diff(places).astype("<i8").data)
        if values is not None:
            update(memoryview(values)[places[0] : places[-1]])
    else:
        update(repr(array.to_pylist()).encode())


def is_file(kind: pa.DataType) -> bool:
    """Tells whether this is how `datasets` stores images and sounds."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _hash_files(array: pa.StructArray, update: Callable[[bytes | memoryview], None]) -> None:
    """Hashes files: by their bytes, or by their name and size where those are not in the table."""
    contents = array.field("bytes")
    _hash_array(contents, update)
    if contents.null_count:
        for path, missing in zip(array.field("path").to_pylist(), contents.is_null().to_pylist(), strict=True):
            if missing and path is not None:
                size = os.path.getsize(path) if os.path.exists(path) else -1
                update(f"{os.path.basename(path)} {size} ".encode())


def partition_fingerprint(
    num_labels: int, labels_N: np.ndarray, parts: Mapping[str, np.ndarray], test_labels_n: np.ndarray | None
) -> str:
    """
    A checksum of who has which rows, and of their labels.

    Args:
        num_labels (`int`): Number of classes.
        labels_N (`np.ndarray` of shape `[N]`): Labels of the pool.
        parts (`Mapping[str, np.ndarray]`): Rows of the pool by what has them.
        test_labels_n (`np.ndarray` of shape `[n]`, *optional*): Labels of a test set that is not in the pool.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{num_labels} {len(labels_N)}".encode())
    for name, rows in parts.items():
        digest.update(f"{name} {len(rows)}".encode())
        digest.update(rows.astype("<i8").tobytes())
        digest.update(labels_N[rows].astype("<i8").tobytes())
    if test_labels_n is not None:
        digest.update(f"test {len(test_labels_n)}".encode())
        digest.update(test_labels_n.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
