"""Equal rows are found by a hash, whatever the types of their columns."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from datasets import (
    Array2D,
    Array3D,
    Dataset,
    Features,
    Image,
    LargeList,
    List,
    Translation,
    Value,
    concatenate_datasets,
)

from hf_fedmoe.data import FederatedDataset, iid
from hf_fedmoe.data.row_hashes import row_hashes


KINDS = {
    "two axes": (Array2D((2, 2), "uint8"), [[[1, 2], [3, 4]], [[1, 2], [4, 3]], [[2, 1], [3, 4]]]),
    "three axes": (Array3D((1, 2, 1), "float32"), [[[[1], [2]]], [[[2], [1]]], [[[0], [0]]]]),
    "an open axis": (Array2D((None, 2), "int32"), [[[1, 2]], [[1, 2], [0, 0]], [[0, 0], [1, 2]]]),
    "images": (
        Image(),
        [{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}, {"bytes": None, "path": "c.png"}],
    ),
    "sounds": (
        {"array": List(Value("float32")), "rate": Value("int32")},
        [{"array": [1.0, 2.0], "rate": 8}, {"array": [2.0, 1.0], "rate": 8}, {"array": [1.0, 2.0], "rate": 9}],
    ),
    "lists of structs": (List({"a": Value("int8")}), [[{"a": 1}, {"a": 2}], [{"a": 2}, {"a": 1}], []]),
    "lists of lists": (List(List(Value("int64"))), [[[1], [2, 3]], [[1, 2], [3]], [[1, 2, 3]]]),
    "large lists": (LargeList(Value("int64")), [[1], [1, 0], None]),
    "lists of one length": (List(Value("int64"), length=2), [[1, 2], [2, 1], None]),
    "no structs": ({"a": Value("int64")}, [None, {"a": 1}, {"a": 2}]),
    "bytes": (Value("large_binary"), [b"a", b"b", None]),
    "texts": (Value("large_string"), ["a", "b", ""]),
    "truths": (Value("bool"), [True, False, None]),
    "whole numbers": (Value("int64"), [0, 2**53 + 1, 2**53]),
    "numbers": (Value("float16"), [1.0, 2.0, float("nan")]),
    "times": (Value("timestamp[us]"), [datetime.datetime(2020, 1, 1), datetime.datetime(1500, 1, 2), None]),
    "days": (Value("date32"), [datetime.date(2020, 1, 1), datetime.date(2, 1, 2), None]),
    "money": (Value("decimal128(10, 2)"), [decimal.Decimal("1.10"), decimal.Decimal("1.20"), None]),
    "translations": (
        Translation(["de", "en"]),
        [{"de": "a", "en": "b"}, {"de": "b", "en": "a"}, {"de": "", "en": ""}],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_equal_rows_have_equal_hashes_and_others_do_not(name):
    feature, values = KINDS[name]
    rows = Dataset.from_dict({"x": values, "y": [0, 0, 0]}, features=Features({"x": feature, "y": Value("int64")}))
    hashes_N = row_hashes(rows, ["x", "y"])
    assert hashes_N.dtype == np.uint64 and len(set(hashes_N.tolist())) == 3
    for kind in (None, "torch"):
        other = rows.with_format(kind)
        chunks = concatenate_datasets([other.select(range(1, 3)), other.select([1]), other.select([0, 2])])
        np.testing.assert_array_equal(row_hashes(chunks, ["x", "y"]), hashes_N[[1, 2, 1, 0, 2]])
    assert len(row_hashes(rows.select([]), ["x"])) == 0


@pytest.mark.parametrize("type_name", ["null", "int64", "bool", "string", "float32", "timestamp[ns, tz=UTC]"])
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_but_missing_values(type_name, inside):
    feature = List(Value(type_name)) if inside else Value(type_name)
    rows = Dataset.from_dict({"x": [None] * 3}, features=Features({"x": feature}))
    assert len(set(row_hashes(rows, ["x"]).tolist())) == 1


def test_a_missing_value_elsewhere_changes_no_hash():
    whole, broken = (Dataset.from_dict({"x": values}) for values in ([3, 4, 5], [3, None, 5]))
    expected, found = row_hashes(whole, ["x"]), row_hashes(broken, ["x"])
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist() and found[1] not in expected


def test_names_in_the_place_of_texts():
    names = Dataset(pa.table({"x": pa.array(["a", "b", "a"]).dictionary_encode()}))
    np.testing.assert_array_equal(
        row_hashes(names, ["x"]), row_hashes(Dataset.from_dict({"x": ["a", "b", "a"]}), ["x"])
    )


def test_the_same_file_under_another_name_is_the_same_image():
    files = [{"bytes": b"a", "path": "train/1.png"}, {"bytes": b"a", "path": "test/9.png"}]
    first, second = row_hashes(Dataset.from_dict({"x": files}, features=Features({"x": Image()})), ["x"])
    assert first == second


def test_the_order_of_columns_counts():
    rows = Dataset.from_dict({"x": ["a", "b"], "y": ["b", "a"]})
    first, second = row_hashes(rows, ["x", "y"])
    assert first != second


def pixels(seed):
    values = np.random.default_rng(seed).integers(0, 255, (6, 4, 4), dtype=np.uint8)
    features = Features({"pixels": Array2D((4, 4), "uint8"), "label": Value("int64")})
    return Dataset.from_dict({"pixels": values, "label": [0, 1] * 3}, features=features)


def test_columns_of_arrays_are_compared():
    FederatedDataset.from_clients([pixels(0), pixels(1)], reserved=pixels(2))
    FederatedDataset.split(pixels(0), lambda rows: iid(len(rows), 2), test=pixels(1))
    with pytest.warns(UserWarning, match=r"6 of 6 rows of reserved are also in clients \(equal pixels\)"):
        FederatedDataset.from_clients([pixels(0), pixels(1)], reserved=pixels(1))
