import warnings
from itertools import chain

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_fedmoe.data import FederatedDataset, dirichlet, iid, predominant


NAMES = ["bad", "fair", "good"]


def make_dataset(num_rows, seed=0, names=NAMES, start=0):
    labels = np.random.default_rng(seed).choice(3, size=num_rows, p=[0.2, 0.3, 0.5])
    return Dataset.from_dict(
        {"text": [f"row {start + i}" for i in range(num_rows)], "label": labels},
        features=Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )


@pytest.fixture(scope="module")
def pool():
    return make_dataset(300)


@pytest.fixture(scope="module")
def federated(pool):
    return FederatedDataset.split(
        pool,
        lambda rows: dirichlet(rows["label"], num_clients=4, alpha=0.5, seed=1),
        reserved_size=30,
        validation_size=0.1,
        test=40,
        seed=5,
    )


def texts(federated):
    parts = [federated.client(i)["text"][:] for i in range(federated.num_clients)]
    return parts + [data["text"][:] for data in (federated.reserved, federated.validation, federated.test)]


def test_split_uses_every_row_once(federated, pool):
    parts = texts(federated)
    assert sorted(chain.from_iterable(parts)) == sorted(pool["text"][:])
    assert [len(part) for part in parts[4:]] == [30, 30, 40]
    assert federated.num_clients == 4 and federated.num_labels == 3 and federated.label_names == NAMES
    np.testing.assert_array_equal(federated.client_sizes, [len(part) for part in parts[:4]])


def test_split_is_stratified(federated, pool):
    expected = np.bincount(pool["label"][:]) / len(pool)
    for held in (federated.reserved, federated.validation, federated.test):
        np.testing.assert_allclose(np.bincount(held["label"][:]) / len(held), expected, atol=0.04)


def test_split_depends_on_the_seed_alone(pool):
    def split(seed):
        return FederatedDataset.split(pool, lambda rows: iid(len(rows), 3, seed=0), reserved_size=20, seed=seed)

    assert split(1).state_fingerprint() == split(1).state_fingerprint()
    assert split(1).state_fingerprint() != split(2).state_fingerprint()
    assert split(1).reserved["text"][:] != split(2).reserved["text"][:]


def test_split_drops_rows_that_nobody_has(pool):
    federated = FederatedDataset.split(
        pool, lambda rows: predominant(rows["label"], 3, 20, share=0.6), reserved_size=10
    )
    assert len(federated.pool) == 70
    assert federated.client_sizes.tolist() == [20, 20, 20]
    assert federated.label_counts().diagonal().tolist() == [12, 12, 12]


def test_split_hands_the_partition_only_what_remains(pool):
    seen = []
    federated = FederatedDataset.split(
        pool,
        lambda rows: seen.append(rows["text"][:]) or iid(len(rows), 2),
        reserved_size=50,
        test=make_dataset(9, start=900),
    )
    assert len(seen[0]) == 250 and not set(seen[0]) & set(federated.reserved["text"][:])
    assert len(federated.test) == 9


def test_split_size_errors(pool):
    with pytest.raises(ValueError, match="validation size is 200, but only 150 of 300 rows remain"):
        FederatedDataset.split(pool, lambda rows: iid(len(rows), 2), reserved_size=150, validation_size=200)
    with pytest.raises(ValueError, match=r"reserved size is 1.5"):
        FederatedDataset.split(pool, lambda rows: iid(len(rows), 2), reserved_size=1.5)
    with pytest.raises(ValueError, match="test size is -1"):
        FederatedDataset.split(pool, lambda rows: iid(len(rows), 2), test=-1)
    with pytest.raises(ValueError, match="partition returned no clients"):
        FederatedDataset.split(pool, lambda rows: [])
    with pytest.raises(ValueError, match="client 1 has row 300, but the pool has rows 0 to 299"):
        FederatedDataset.split(pool, lambda rows: [np.array([0]), np.array([300])])


def test_client_is_a_view(pool):
    federated = FederatedDataset(pool, [np.arange(0, 300, 2), np.array([5, 3])])
    assert federated.client(1)["text"][:] == ["row 5", "row 3"]
    # The same memory, seen through indices: no row was copied.
    texts = [
        data.data.column("text").chunk(0).buffers()[2] for data in (pool, federated.client(0), federated.client(1))
    ]
    assert len({buffer.address for buffer in texts}) == 1
    assert federated.reserved is None and federated.validation is None and federated.test is None
    with pytest.raises(IndexError, match="client 2 does not exist: there are 2 clients"):
        federated.client(2)
    with pytest.raises(IndexError):
        federated.client(-1)


def test_label_counts(pool):
    federated = FederatedDataset(pool, [np.arange(10), np.arange(10, 300)])
    counts = federated.label_counts()
    assert counts.shape == (2, 3)
    np.testing.assert_array_equal(counts[0], np.bincount(pool["label"][:10], minlength=3))
    np.testing.assert_array_equal(counts.sum(axis=0), np.bincount(pool["label"][:]))


def test_overlap_is_an_error_that_names_both_splits_and_the_row(pool):
    with pytest.raises(ValueError, match=r"client 1 and reserved overlap: row 7 of the pool is in both \(2 rows"):
        FederatedDataset(pool, [[1, 2], [7, 8, 9]], reserved=[20, 7, 8])
    with pytest.raises(ValueError, match="client 0 and client 1 overlap: row 2"):
        FederatedDataset(pool, [[1, 2], [2, 3]])
    with pytest.raises(ValueError, match="validation and test overlap: row 4"):
        FederatedDataset(pool, [[0]], validation=[4], test=[4])
    with pytest.raises(ValueError, match="client 0 has row 3 more than once"):
        FederatedDataset(pool, [[3, 1, 3]])


def test_empty_and_missing(pool):
    with pytest.raises(ValueError, match="there are no clients"):
        FederatedDataset(pool, [])
    with pytest.raises(ValueError, match="client 1 has no rows"):
        FederatedDataset(pool, [[0], []])
    with pytest.raises(ValueError, match="reserved has no rows"):
        FederatedDataset(pool, [[0]], reserved=[])
    with pytest.raises(ValueError, match=r"label_column is 'stars', but pool has only the columns \['text'"):
        FederatedDataset(pool, [[0]], label_column="stars")
    with pytest.raises(ValueError, match="label_column is 'label', but test has only the columns"):
        FederatedDataset(pool, [[0]], test=pool.remove_columns("label"))
    with pytest.raises(ValueError, match="client 0 has row -1, but the pool has rows 0 to 299"):
        FederatedDataset(pool, [[-1]])
    with pytest.raises(ValueError, match="client 0 must be a flat array of integer row indices"):
        FederatedDataset(pool, [[0.5]])


@pytest.mark.parametrize(
    "labels, num_labels, message",
    [
        ([0, -1, 1], None, "'label' of pool is -1 in row 1, but labels start at 0"),
        ([0, 1, 5], 3, "'label' of pool is 5 in row 2, but num_labels is 3"),
        ([0, 1, 5], 1, "num_labels is 1: give an integer of at least 2"),
        ([0, 1, 5], True, "num_labels is True: give an integer"),
        ([0.0, 1.0, 0.5], None, "labels must be integers from 0. Numbers with fractions are no classes"),
        ([0.0, 1.0, 2.0], None, r"""whole numbers: use dataset.cast_column\('label', datasets.Value\("int64"\)\)"""),
        ([[0], [1], [0, 1]], None, "A row has one label"),
        ([0, None, 1], None, r"is missing in 1 of 3 rows. Remove them, dataset.filter"),
        (["a", None, "b"], None, r"is missing in 1 of 3 rows"),
        ([None] * 3, None, "is missing in 3 of 3 rows"),
        (["a"] * 3, None, r"'label' has one class only, \['a'\]"),
    ],
)
def test_bad_labels(labels, num_labels, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset(Dataset.from_dict({"label": labels}), [[0, 1, 2]], num_labels=num_labels)


def test_num_labels_without_class_names():
    plain = Dataset.from_dict({"stars": [0, 1, 3]})
    with pytest.warns(UserWarning, match=r"'stars' of pool has no row of 1 of 4 classes: 2. Give num_labels=4"):
        assert FederatedDataset(plain, [[0, 1, 2]], label_column="stars").num_labels == 4
    federated = FederatedDataset(plain, [[0, 1, 2]], label_column="stars", num_labels=5)
    assert federated.label_names == ["0", "1", "2", "3", "4"]
    assert federated.label_counts().tolist() == [[1, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match=r"num_labels is 4, but 'label' has 3 classes: \['bad', 'fair', 'good'\]"):
        FederatedDataset(make_dataset(3), [[0, 1, 2]], num_labels=4)


def test_reserved_set_without_a_class_warns():
    data = make_dataset(50)
    bad = np.flatnonzero(np.array(data["label"][:]) == 0)
    others = np.setdiff1d(np.arange(50), bad)
    with pytest.warns(UserWarning, match="no example of 1 of 3 classes: bad.*Raise reserved_size"):
        FederatedDataset(data, [np.concatenate([bad, others[:10]])], reserved=others[10:])


def test_from_clients_keeps_them_as_they_came():
    clients = [make_dataset(10, 1), make_dataset(20, 2, start=10).select(range(5, 20)), make_dataset(5, 3, start=30)]
    reserved = make_dataset(30, 4, start=100)
    test = make_dataset(8, 5, start=200).add_column("extra", range(8))
    federated = FederatedDataset.from_clients(clients, reserved=reserved, test=test)
    assert federated.client_sizes.tolist() == [10, 15, 5]
    assert all(federated.client(i).to_dict() == client.to_dict() for i, client in enumerate(clients))
    assert federated.reserved.to_dict() == reserved.to_dict()
    assert federated.validation is None and federated.test.column_names == ["text", "label", "extra"]


def test_from_clients_refuses_different_features():
    clients = [make_dataset(10), make_dataset(10, start=10)]
    with pytest.raises(ValueError, match="Column 'extra' is in client 1 but not in client 0"):
        FederatedDataset.from_clients([clients[0], clients[0].add_column("extra", range(10))])
    with pytest.raises(ValueError, match="Column 'text' has another type in client 1 than in client 0"):
        FederatedDataset.from_clients([clients[0], clients[1].cast_column("text", Value("binary"))])
    plain = clients[0].cast_column("label", Value("int64"))
    with pytest.raises(ValueError, match=r"'label' of reserved holds Value\('int64'\) without names.*names=\['bad'"):
        FederatedDataset.from_clients(clients[:1], reserved=plain)
    with pytest.raises(ValueError, match="client 1 has no rows"):
        FederatedDataset.from_clients([clients[0], clients[0].select([])])


def test_equal_rows_in_separate_datasets_warn(pool):
    with pytest.warns(UserWarning, match=r"4 of 10 rows of test are also in clients \(equal text\)"):
        FederatedDataset(pool, [np.arange(200)], test=make_dataset(10, seed=9, start=196))
    with pytest.warns(UserWarning, match="10 of 40 rows of reserved are also in clients"):
        FederatedDataset.from_clients([pool], reserved=make_dataset(40, start=290))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FederatedDataset.from_clients([pool], reserved=make_dataset(40, start=300), test=make_dataset(40, start=340))
        # Labels alone are always equal somewhere, so they are not content.
        FederatedDataset(pool, [np.arange(200)], test=make_dataset(10).remove_columns("text"))


def test_equal_rows_of_lists_are_found():
    def tokens(start):
        return Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(start, start + 6)], "label": [0, 1] * 3})

    with pytest.warns(UserWarning, match=r"2 of 6 rows of test are also in clients \(equal input_ids\)"):
        FederatedDataset.from_clients([tokens(0)], test=tokens(4))


class DealingPartitioner:
    """Flower's protocol, without Flower."""

    def __init__(self, dataset, num_partitions):
        self.dataset = dataset
        self._num_partitions = num_partitions

    @property
    def num_partitions(self):
        return self._num_partitions

    def load_partition(self, partition_id):
        return self.dataset.select(range(partition_id, len(self.dataset), self._num_partitions))


def test_from_partitioner(pool):
    federated = FederatedDataset.from_partitioner(DealingPartitioner(pool, 7), test=make_dataset(20, start=500))
    assert federated.num_clients == 7 and federated.client_sizes.sum() == 300
    assert federated.client(3)["text"][:3] == ["row 3", "row 10", "row 17"]


def test_map_keeps_the_partition(federated, pool):
    mapped = federated.map(lambda batch: {"length": [len(text) for text in batch["text"]]}, batched=True)
    for i in range(4):
        assert mapped.client(i)["text"][:] == federated.client(i)["text"][:]
        assert mapped.client(i)["length"][:] == [len(text) for text in federated.client(i)["text"][:]]
    assert mapped.test["length"][:] == [len(text) for text in federated.test["text"][:]]
    assert "length" not in federated.pool.column_names
    assert mapped.state_fingerprint() == federated.state_fingerprint()


def test_map_reaches_a_separate_test_set(pool):
    federated = FederatedDataset(pool, [np.arange(300)], test=make_dataset(4, start=400))
    mapped = federated.map(lambda row: {"words": row["text"].split()}, remove_columns=["text"])
    assert mapped.test["words"][:] == [["row", str(400 + i)] for i in range(4)]
    assert mapped.pool.column_names == ["label", "words"]


def test_map_must_keep_rows_and_labels(federated):
    with pytest.raises(ValueError, match="map turned the 300 rows of pool into 600"):
        federated.map(lambda batch: {name: values * 2 for name, values in batch.items()}, batched=True)
    with pytest.raises(ValueError, match="map changed 'label' of pool"):
        federated.map(lambda row: {"label": 0})
    with pytest.raises(ValueError, match="label_column is 'label', but the mapped pool has only the columns"):
        federated.map(lambda row: {}, remove_columns=["label"])


def test_fingerprint_sees_rows_labels_and_splits(pool):
    base = FederatedDataset(pool, [np.arange(100), np.arange(100, 200)])
    others = [
        FederatedDataset(pool, [np.arange(101), np.arange(101, 200)]),
        FederatedDataset(pool, [np.arange(100, 200), np.arange(100)]),
        FederatedDataset(pool, [np.arange(100), np.arange(100, 200)], reserved=np.arange(200, 230)),
        FederatedDataset(pool, [np.arange(100), np.arange(100, 200)], validation=np.arange(200, 230)),
        FederatedDataset(make_dataset(300, seed=1), [np.arange(100), np.arange(100, 200)]),
    ]
    prints = {data.state_fingerprint() for data in [base, *others]}
    assert len(prints) == 6 and len(base.state_fingerprint()) == 16


def test_summary_is_a_table():
    data = Dataset.from_dict({"label": [0, 0, 0, 1, 1, 0, 1, 1]})
    with pytest.warns(UserWarning, match="no example"):
        federated = FederatedDataset(data, [[0, 1, 2, 3], [4, 5]], reserved=[6], test=[7])
    assert federated.summary().splitlines() == [
        "2 clients with 6 rows (2 to 4 each), 2 classes",
        "             size        0         1",
        "client 0        4  3 (75%)   1 (25%)",
        "client 1        2  1 (50%)   1 (50%)",
        "all clients     6  4 (67%)   2 (33%)",
        "reserved        1   0 (0%)  1 (100%)",
        "test            1   0 (0%)  1 (100%)",
    ]


def test_summary_of_many_clients_and_classes_stays_readable():
    data = Dataset.from_dict({"label": np.arange(80) % 20})
    summary = FederatedDataset(data, np.split(np.arange(80), 40)).summary().splitlines()
    assert len(summary) == 1 + 1 + 30 + 1 + 1
    assert summary[1].split() == ["size", "classes", "largest", "class"]
    assert summary[2].split() == ["client", "0", "2", "2/20", "0", "(50%)"]
    assert summary[32] == "... and 10 more clients"


@pytest.mark.parametrize("num_classes", [3, 15, 30])
def test_plot_writes_an_image(tmp_path, num_classes):
    data = Dataset.from_dict({"label": np.arange(90) % num_classes})
    FederatedDataset(data, np.split(np.arange(90), 9)).plot(tmp_path / "clients.png")
    content = (tmp_path / "clients.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 3000


def test_missing_texts_are_named_where_a_tokenizer_fails():
    rows = Dataset.from_dict({"text": ["a", None, "b"], "label": [0, 1, 2]})
    data = FederatedDataset.from_clients([rows])
    with pytest.raises(
        ValueError, match=r"'text' is missing in 1 of 3 rows, row 1 first.*dataset\.filter.*AttributeE"
    ):
        data.map(lambda row: {"length": len(row["text"].split())})
    with pytest.raises(ZeroDivisionError):
        FederatedDataset.from_clients([rows.select([0, 2])], num_labels=3).map(lambda row: {"length": 1 // 0})


def test_a_partition_is_a_function():
    with pytest.raises(ValueError, match=r"partition is None: give a function of the rows that divides them"):
        FederatedDataset.split(Dataset.from_dict({"label": [0, 1] * 4}), None)
