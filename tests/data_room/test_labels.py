"""Labels that are no classes yet: stars from 1, ids, strings; under any name of their column."""

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Value

from hf_fedmoe.data import FederatedDataset, iid, predominant
from hf_fedmoe.data.label_distribution import are_in_order
from hf_fedmoe.data.labels import labels_for_collators


def rows_with(labels, column="stars", **more):
    return Dataset.from_dict({"text": [f"row {i}" for i in range(len(labels))], column: labels, **more})


def renamed(row):
    return {"text": f"{row['text']} of the test"}


class Halves:
    """Flower's protocol: two partitions."""

    num_partitions = 2

    def __init__(self, dataset):
        self.dataset = dataset

    def load_partition(self, index):
        return self.dataset.select(range(index, len(self.dataset), 2))


# Every way to a federation of two clients.
WAYS = {
    "constructor": lambda rows, **more: FederatedDataset(
        rows, [range(len(rows) // 2), range(len(rows) // 2, len(rows))], **more
    ),
    "split": lambda rows, **more: FederatedDataset.split(rows, lambda rest: iid(len(rest), 2), **more),
    "from_clients": lambda rows, **more: FederatedDataset.from_clients(
        [rows.select(range(len(rows) // 2)), rows.select(range(len(rows) // 2, len(rows)))], **more
    ),
    "from_partitioner": lambda rows, **more: FederatedDataset.from_partitioner(Halves(rows), **more),
}


@pytest.fixture(params=WAYS)
def federate(request):
    return lambda rows, **more: WAYS[request.param](rows, label_column="stars", **more)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 3, 4, 5] * 4, r"'stars' of \w+ holds the numbers 1, 2, 3, 4, 5, and no 0.*give num_labels=6"),
        ([10, 20, 30, 20] * 4, "holds the numbers 10, 20, 30, and no 0"),
        ([0, 100, 200, 100] * 4, "holds the numbers 0, 100, 200, and few of 0 to 200"),
        ([0] * 12, "is 0 in all rows, and one class is nothing to learn"),
        (list(range(200)), "has 200 different values in 200 rows: these are ids, texts or numbers to predict"),
        ([f"id {i}" for i in range(200)], "has 200 different values in 200 rows"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(federate, labels, message):
    with pytest.raises(ValueError, match=message):
        federate(rows_with(labels))


def test_many_ids_are_refused_without_a_model_of_ten_thousand_classes():
    labels = np.random.default_rng(0).permutation(np.r_[np.arange(10_000), np.arange(2_000)])
    with pytest.raises(ValueError, match="has 10000 different values in 12000 rows"):
        FederatedDataset(Dataset.from_dict({"label": labels}), [np.arange(12_000)])
    # Who means it says so.
    data = FederatedDataset(Dataset.from_dict({"label": labels}), [np.arange(12_000)], num_labels=10_000)
    assert data.num_labels == 10_000


def test_both_remedies_for_stars_work(federate):
    rows = rows_with([1, 2, 3, 4, 5] * 4)
    data = federate(rows.class_encode_column("stars"))
    assert data.num_labels == 5 and data.label_names == ["1", "2", "3", "4", "5"]
    assert data.label_counts().sum(axis=0).tolist() == [4] * 5 and data.has_label_names
    data = federate(rows, num_labels=6)
    assert data.num_labels == 6 and data.label_counts().sum(axis=0).tolist() == [0, 4, 4, 4, 4, 4]
    assert data.label_names == list("012345") and not data.has_label_names


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["b", "a", "b", "c"] * 3, ["a", "b", "c"], [1, 0, 1, 2]),
        ([True, False, True, True] * 3, ["False", "True"], [1, 0, 1, 1]),
        (["10", "9", "1", "9"] * 3, ["1", "9", "10"], [2, 1, 0, 1]),
    ],
)
def test_strings_and_booleans_become_classes_in_order(federate, labels, names, expected):
    data = federate(rows_with(labels), test=rows_with(labels[:2] * 5).map(renamed))
    assert data.label_names == names and data.pool.features["stars"] == ClassLabel(names=names)
    found = dict(zip(data.pool["text"], data.pool["stars"], strict=True))
    assert found == {f"row {i}": expected[i % 4] for i in range(12)}
    assert data.test["stars"][:2] == expected[:2] and data.test.features["stars"] == ClassLabel(names=names)
    assert data.pool.column_names == ["text", "stars"]


def test_split_counts_classes_before_rows_are_dropped():
    rows = rows_with([0] * 4 + [1, 2] * 30)
    data = FederatedDataset.split(
        rows, lambda rest: predominant(rest["stars"], 2, 6, share=0.5).copy(), label_column="stars", stratify=False
    )
    assert data.num_labels == 3
    # Nobody has class 0: that is no reason to call the others 0 and 1, nor to refuse them.
    few = FederatedDataset.split(rows, lambda rest: [np.arange(4, 20), np.arange(20, 40)], label_column="stars")
    assert few.num_labels == 3 and few.label_counts().sum(axis=0).tolist() == [0, 18, 18]


def test_a_class_that_only_the_test_has_warns(federate):
    rows = rows_with(["a", "b"] * 6)
    test = Dataset.from_dict({"text": ["x", "y", "z"], "stars": ["a", "c", "c"]})
    with pytest.warns(UserWarning, match="2 of 3 rows of test have classes of which no client has a row: c"):
        data = federate(rows, test=test)
    assert data.label_names == ["a", "b", "c"] and data.test["stars"][:] == [0, 2, 2]
    numbers = Dataset.from_dict({"text": ["x", "y"], "stars": [0, 2]})
    with pytest.warns(UserWarning, match="1 of 2 rows of test have classes of which no client has a row: 2"):
        assert federate(rows_with([0, 1] * 6), test=numbers).num_labels == 3


def test_num_labels_must_hold_all_labels(federate):
    with pytest.raises(ValueError, match=r"'stars' of \w+ is 2 in row \d, but num_labels is 2.*Raise num_labels"):
        federate(rows_with([0, 1, 2, 0] * 3), num_labels=2)
    assert federate(rows_with([0, 1, 2, 0] * 3), num_labels=7).num_labels == 7
    named = rows_with([0, 1] * 6).cast_column("stars", ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="num_labels is 3, but 'stars' has 2 classes"):
        federate(named, num_labels=3)
    with pytest.raises(ValueError, match="one class only"):
        federate(rows_with([0] * 12).cast_column("stars", ClassLabel(names=["a"])))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64"])
def test_integers_of_any_width(federate, dtype):
    data = federate(rows_with([0, 1] * 6).cast_column("stars", Value(dtype)), test=rows_with([1, 0]).map(renamed))
    assert data.num_labels == 2 and data.label_counts().sum(axis=0).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("columns", "label_column", "expected"),
    [
        (["text", "stars"], "stars", {"text": 0, "label": 1}),
        (["text", "label", "stars"], "stars", {"text": 0, "label": 2}),
        (["labels", "stars", "label_ids"], "stars", {"label": 1}),
        (["label", "text", "labels"], "label", {"label": 0, "text": 1}),
        (["label", "text", "labels"], "labels", {"text": 1, "labels": 2}),
        (["label_ids", "text", "label"], "label_ids", {"label": 0, "text": 1}),
        (["y", "target"], "y", {"label": 0, "target": 1}),
    ],
)
def test_collators_are_given_one_column_of_labels(columns, label_column, expected):
    rows = Dataset.from_dict({column: [place] for place, column in enumerate(columns)})
    assert labels_for_collators(rows, label_column)[0] == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (float("nan"), "The reserved size is nan"),
        (True, "The reserved size is True"),
        ("30", "The reserved size is '30'"),
        (1.0, "The reserved size is 1.0, but must be a number of rows or a share"),
        (-1, "The reserved size is -1"),
    ],
)
def test_sizes_that_are_none(size, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset.split(rows_with([0, 1] * 20, "label"), lambda rest: iid(len(rest), 2), reserved_size=size)


@pytest.mark.parametrize("size", [0, 0.0, np.int64(0), np.float32(0)])
def test_a_size_of_zero_holds_nothing_out(size):
    rows = rows_with([0, 1] * 20, "label")
    data = FederatedDataset.split(rows, lambda rest: iid(len(rest), 2), reserved_size=size, validation_size=size)
    assert data.reserved is None and data.validation is None and data.client_sizes.sum() == 40


@pytest.mark.parametrize("size", [10, 0.25, np.int32(10), np.float32(0.25)])
def test_a_size_is_rows_or_a_share(size):
    data = FederatedDataset.split(rows_with([0, 1] * 20, "label"), lambda rest: iid(len(rest), 2), reserved_size=size)
    assert len(data.reserved) == 10


@pytest.mark.parametrize(
    ("reserved", "message"),
    [
        (np.arange(12) == 3, r"flat array of integer row indices.*bool.*np.flatnonzero\(mask\)"),
        ([-1], "reserved has row -1, but the pool has rows 0 to 11"),
        (rows_with([0, 1]), "reserved is a datasets.Dataset, but must be rows.*from_clients"),
        (datasets.DatasetDict(), "reserved must be a flat array|reserved has no rows"),
    ],
)
def test_reserved_rows_that_are_none(reserved, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset(rows_with([0, 1] * 6, "label"), [range(6)], reserved=reserved)


def test_reserved_rows_may_be_a_list():
    data = FederatedDataset(rows_with([0, 1] * 6, "label"), [range(6)], reserved=[6, 7])
    assert data.reserved["text"][:] == ["row 6", "row 7"]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["1", "2", "5"], True),
        (["1 star", "2 stars", "3 stars"], True),
        ([str(digit) for digit in range(10)], False),
        (["1", "2"], False),
        (["3", "2", "1"], False),
        (["grade 1", "step 2", "grade 3"], False),
        (["bad", "fair", "good"], False),
    ],
)
def test_classes_that_are_steps_of_a_scale_are_known(names, ordered):
    assert are_in_order(names) == ordered
