"""
A hash of each row by itself, from the stored values, to find rows that two datasets share.

Shape suffixes: N rows, n values of all lists of these rows.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .fingerprint import is_file


# Odd, so that the order of what is combined counts; uint64 wraps around, which is wanted.
FACTOR = np.uint64(1_000_003)
MISSING = np.uint64(0x9E3779B97F4A7C15)


def row_hashes(dataset: Dataset, columns: Iterable[str]) -> np.ndarray:
    """
    Hashes each row of these columns, whatever their types. Images and sounds are not decoded; they count by their
    bytes, or by their path where those are in a file of its own.

    Returns:
        `np.ndarray`: Shape `[N]`, uint64.
    """
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    empty = np.zeros(0, dtype=np.uint64)
    return _combined(
        [np.concatenate([empty, *map(_hashes, column.chunks)]) for column in table.columns], table.num_rows
    )


def _combined(parts: Iterable[np.ndarray], num_rows: int) -> np.ndarray:
    combined_N = np.zeros(num_rows, dtype=np.uint64)
    for part_N in parts:
        combined_N = combined_N * FACTOR + part_N
    return combined_N


def _hashes(array: pa.Array) -> np.ndarray:
    """The hashes `[N]` of the values of an array."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _hashes(array.storage)
    if pa.types.is_dictionary(kind):
        return _hashes(array.dictionary_decode())
    if is_file(kind):
        contents, paths = array.field("bytes"), array.field("path")
        return np.where(contents.is_null().to_numpy(zero_copy_only=False), _hashes(paths), _hashes(contents))
    if pa.types.is_struct(kind):
        hashes_N = _combined(map(_hashes, array.flatten()), len(array))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        hashes_N = _hashes_of_lists(array)
    elif pa.types.is_boolean(kind):
        hashes_N = _hashes(array.cast(pa.uint8()))
    elif pa.types.is_integer(kind):
        # Beside missing ones they would become floats, whose hashes are others.
        hashes_N = pd.util.hash_array(array.fill_null(0).to_numpy())
    elif pa.types.is_floating(kind) or kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        hashes_N = pd.util.hash_array(array.to_pandas().to_numpy())
    else:
        hashes_N = pd.util.hash_array(np.array([repr(value) for value in array.to_pylist()], dtype=object))
    if array.null_count:
        hashes_N[array.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return hashes_N


def _hashes_of_lists(array: pa.Array) -> np.ndarray:
    lengths_N = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends_N = lengths_N.cumsum()
    places_n = np.arange(lengths_N.sum()) - np.repeat(ends_N - lengths_N, lengths_N)
    powers = np.full(lengths_N.max(initial=0) + 1, FACTOR).cumprod(dtype=np.uint64)
    # Differences of running sums are right although these wrap around.
    sums = np.concatenate([np.zeros(1, np.uint64), (_hashes(array.flatten()) * powers[places_n]).cumsum()])
    return sums[ends_N] - sums[ends_N - lengths_N] + lengths_N.astype(np.uint64)
