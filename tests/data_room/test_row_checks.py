"""The pass over all rows: each fault by row and value, whatever the columns are stored as."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_fedmoe.data import row_checks
from hf_fedmoe.data.row_checks import scan_rows


IDS = [[2, 3, 4], [5], [6, 7], [8, 9, 10, 11]]


def rows(input_ids=IDS, **columns):
    return datasets.Dataset.from_dict({"input_ids": input_ids, **columns})


def faults_of(dataset, **limits):
    return [(f.column, f.problem, f.rows, f.values) for f in scan_rows(dataset, **limits).faults]


@pytest.fixture(params=[1, 3, 10_000], ids=["blocks of 1", "blocks of 3", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(row_checks, "BLOCK", request.param)


def test_sound_rows(blocks):
    dataset = rows(attention_mask=[[1] * len(ids) for ids in IDS], label=[0, 1, 2, 0])
    found = scan_rows(dataset, num_embeddings=12, num_labels=3)
    assert found.faults == [] and found.lengths_N.tolist() == [3, 1, 2, 4]


def test_tokens_outside_of_the_vocabulary(blocks):
    problem = "holds the token {value}, but the model knows 9, 0 to 8"
    assert faults_of(rows(), num_embeddings=9) == [("input_ids", problem, [3], [9])]
    negative = [[0], [], [0, -1, -2], [4, -100]]
    found = sorted(faults_of(rows(negative), num_embeddings=4))
    assert [fault[2:] for fault in found] == [([1], [0]), ([2, 3], [-1, 4])]


def test_texts_of_nothing_or_of_padding(blocks):
    dataset = rows([[2], [], [1, 1], [2, 1]], attention_mask=[[1], [], [0, 0], [1, 0]])
    assert [f[2:] for f in faults_of(dataset)] == [([1, 2], [0, 2])]


def test_masks_of_other_lengths(blocks):
    widths = [[1] * 3, [1] * 2, [1] * 2, []]
    problem = "has {value} values, another number than `input_ids` has tokens"
    expected = [("attention_mask", problem, [1, 3], [2, 0])]
    assert faults_of(rows(attention_mask=widths)) == expected
    assert faults_of(rows(token_type_ids=widths)) == [("token_type_ids", *expected[0][1:])]


def test_labels_outside_of_the_classes(blocks):
    found = faults_of(rows(labels=[0, 3, -100, 1]), num_labels=3)
    assert found == [("labels", "is {value}, but the model knows 3 classes, 0 to 2", [1, 2], [3, -100])]
    assert faults_of(rows(label=[0, None, 1, 2]), num_labels=3)[0][2] == [1]
    assert faults_of(rows(label=[0.5, 7.0, 1.0, 2.0]), num_labels=3) == []  # a number to be regressed


def test_rows_are_those_of_the_dataset_not_of_its_storage(blocks):
    dataset = rows().select([3, 0, 3, 1])
    assert scan_rows(dataset).lengths_N.tolist() == [4, 3, 4, 1]
    assert sorted(faults_of(dataset, num_embeddings=11)[0][2]) == [0, 2]
    joined = datasets.concatenate_datasets([rows(), rows(IDS[::-1])])
    assert scan_rows(joined.shuffle(seed=1)).lengths_N.tolist() == [
        len(r) for r in joined.shuffle(seed=1)["input_ids"]
    ]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int8()), pa.large_list(pa.int32()), pa.list_(pa.int64(), 2), pa.list_(pa.bool_())]
)
def test_however_lists_are_stored(kind):
    values = [[True, False]] * 2 if pa.types.is_boolean(kind.value_type) else [[1, 0]] * 2
    table = pa.table({"input_ids": pa.array(values, type=kind)})
    found = scan_rows(datasets.Dataset(table), num_embeddings=2)
    assert found.lengths_N.tolist() == [2, 2] and not found.faults


def test_columns_that_are_no_texts():
    with pytest.raises(ValueError, match=r"`input_ids` holds string, where a model reads lists of integers: tokenise"):
        scan_rows(rows(["a", "b"]))
    with pytest.raises(ValueError, match="`input_ids` has rows without a value: leave them out"):
        scan_rows(rows([[1], None]))
    pixels = datasets.Dataset.from_dict({"pixel_values": [b"0", b"1"], "label": [0, 5]})
    assert scan_rows(pixels, num_labels=3).lengths_N is None
    assert faults_of(pixels, num_labels=3)[0][2:] == ([1], [5])


def test_formats_do_not_matter():
    assert scan_rows(rows().with_format("torch")).lengths_N.tolist() == [3, 1, 2, 4]
    assert isinstance(scan_rows(rows()).lengths_N, np.ndarray)
