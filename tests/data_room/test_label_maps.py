"""Clients whose classes have the same names and other numbers."""

import itertools

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_fedmoe.data import FederatedDataset


def named(names, labels, start=0):
    """Rows of a client, `labels` by name, numbered as its own map says."""
    return Dataset.from_dict(
        {"text": [f"row {start + i}" for i in range(len(labels))], "label": [names.index(name) for name in labels]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )


def strings(labels, start=0):
    return Dataset.from_dict({"text": [f"row {start + i}" for i in range(len(labels))], "label": labels})


def by_name(rows):
    return [rows.features["label"].names[label] for label in rows["label"]]


NEG_POS = named(["neg", "pos"], ["neg", "pos", "pos"])
POS_NEG = named(["pos", "neg"], ["pos", "neg", "neg", "pos"], start=10)
NEUTRAL = named(["pos", "neutral"], ["neutral", "pos"], start=20)


def test_maps_in_another_order_become_one():
    data = FederatedDataset.from_clients([NEG_POS, POS_NEG])
    assert data.label_names == ["neg", "pos"] and data.num_labels == 2
    assert [data.client(i)["label"][:] for i in range(2)] == [[0, 1, 1], [1, 0, 0, 1]]
    assert by_name(data.client(0)) == by_name(NEG_POS) and by_name(data.client(1)) == by_name(POS_NEG)
    assert data.client(1)["text"][:] == POS_NEG["text"][:]
    assert data.pool.features == NEG_POS.features


def test_a_client_that_lacks_a_class():
    data = FederatedDataset.from_clients([NEG_POS, NEUTRAL])
    assert data.label_names == ["neg", "neutral", "pos"]
    assert [by_name(data.client(i)) for i in range(2)] == [["neg", "pos", "pos"], ["neutral", "pos"]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_clients_does_not_number_classes(order):
    clients = [[NEG_POS, POS_NEG, NEUTRAL][client] for client in order]
    data = FederatedDataset.from_clients(clients)
    assert data.label_names == ["neg", "neutral", "pos"]
    assert [by_name(data.client(i)) for i in range(3)] == [by_name(client) for client in clients]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_map_that_has_all_names_keeps_its_order(order):
    whole = named(["low", "mid", "high"], ["high", "mid", "low"])
    clients = [whole, named(["high", "low"], ["low", "high"], 10), strings(["mid", "low"], 20)]
    data = FederatedDataset.from_clients([clients[client] for client in order])
    assert data.label_names == ["low", "mid", "high"]
    assert [data.client(order.index(i))["label"][:] for i in range(3)] == [[2, 1, 0], [0, 2], [1, 0]]


def test_equal_maps_are_left_alone():
    clients = [NEG_POS, named(["neg", "pos"], ["pos"], 10)]
    data = FederatedDataset.from_clients(clients)
    address = clients[0].data.column("text").chunk(0).buffers()[2].address
    assert data.pool.data.column("text").chunk(0).buffers()[2].address == address


def test_strings_get_one_map():
    data = FederatedDataset.from_clients(
        [strings(["pos", "neg"]), strings(["neutral", "neutral"], 10)], reserved=strings(["pos", "neutral", "neg"], 20)
    )
    assert data.label_names == ["neg", "neutral", "pos"]
    assert [data.client(0)["label"][:], data.client(1)["label"][:]] == [[2, 0], [1, 1]]
    assert data.reserved["label"][:] == [2, 1, 0]


def test_stars_in_words_are_sorted_by_value():
    data = FederatedDataset.from_clients([strings(["10", "2"]), strings(["1", "2"], 10)])
    assert data.label_names == ["1", "2", "10"] and data.client(0)["label"][:] == [2, 1]


def test_reserved_validation_and_test_follow_the_clients():
    other = ["good", "fair", "bad"]
    data = FederatedDataset.from_clients(
        [named(["bad", "fair", "good"], ["bad", "fair", "good"])],
        reserved=named(other, ["good", "fair", "bad"], 10),
        validation=named(["good", "bad"], ["bad", "good"], 20),
        test=named(other, ["fair", "good"], 30).add_column("extra", [1, 2]),
    )
    assert data.label_names == ["bad", "fair", "good"]
    assert data.reserved["label"][:] == [2, 1, 0] and data.validation["label"][:] == [0, 2]
    assert data.test["label"][:] == [1, 2] and data.test["extra"][:] == [1, 2]
    assert data.test.features["label"] == data.pool.features["label"]


def test_a_further_class_of_the_test_comes_last():
    with pytest.warns(UserWarning, match="1 of 1 rows of test have classes of which no client has a row: awful"):
        data = FederatedDataset.from_clients(
            [named(["bad", "fair", "good"], ["bad", "fair", "good"])], test=named(["good", "awful"], ["awful"], 10)
        )
    assert data.label_names == ["bad", "fair", "good", "awful"] and data.client(0)["label"][:] == [0, 1, 2]


@pytest.mark.parametrize("make", [lambda rows: FederatedDataset(rows, [[0, 1], [2]])])
def test_the_constructor_matches_a_test_by_name(make):
    rows = named(["bad", "fair", "good"], ["bad", "fair", "good"])
    data = FederatedDataset(rows, [[0, 1], [2]], test=named(["good", "fair", "bad"], ["good", "bad"], 10))
    assert data.test["label"][:] == [2, 0] and data.pool is rows


def test_rows_that_are_views_keep_their_rows():
    view = POS_NEG.select([3, 1])
    data = FederatedDataset.from_clients([NEG_POS, view])
    assert data.client(1)["text"][:] == ["row 13", "row 11"] and by_name(data.client(1)) == ["pos", "neg"]


def test_names_beside_numbers_are_refused():
    numbers = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"'label' of client 1 holds Value\('int64'\) without names.*'neg', 'pos'"):
        FederatedDataset.from_clients([NEG_POS, numbers])
    # The remedy it names.
    fixed = numbers.cast_column("label", ClassLabel(names=["neg", "pos"]))
    assert FederatedDataset.from_clients([NEG_POS, fixed]).label_names == ["neg", "pos"]
    with pytest.raises(ValueError, match=r"calls its classes 0, 1, that of client \w+ neg, pos"):
        FederatedDataset.from_clients({"b": numbers.cast_column("label", ClassLabel(2)), "a": NEG_POS})


def test_names_that_differ_in_case_only_are_refused():
    with pytest.raises(ValueError, match=r"the class 'neg' in client 0 and 'Neg' in client 1\. Write them alike"):
        FederatedDataset.from_clients([NEG_POS, strings(["Neg", "pos"], 10)])
    # Characters do differ so.
    data = FederatedDataset.from_clients([strings(["a", "A"]), strings(["a", "B"], 10)])
    assert data.label_names == ["A", "B", "a"]


def test_missing_labels_are_refused_by_name():
    with pytest.raises(ValueError, match="'label' of client south is missing in 1 of 2 rows"):
        FederatedDataset.from_clients({"north": strings(["a", "b"]), "south": strings(["a", None], 10)})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos"])})
    masked = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    with pytest.raises(ValueError, match="'label' of client 1 is -1 in row 0"):
        FederatedDataset.from_clients([NEG_POS, masked])


def test_an_empty_string_is_no_class():
    with pytest.raises(ValueError, match="'label' of client 1 has rows whose label is an empty string"):
        FederatedDataset.from_clients([NEG_POS, strings(["neg", " "], 10)])


def test_maps_may_have_many_names_without_rows():
    names = [f"class {i:03}" for i in range(300)]
    clients = [named(names, ["class 000", "class 299"]), named(names[::-1], ["class 001"], 10)]
    data = FederatedDataset.from_clients(clients)
    assert data.label_names == names and data.pool["label"][:] == [0, 299, 1]
    # Few rows of many classes at each client are no ids.
    data = FederatedDataset.from_clients([strings(names, 1000 * i) for i in range(3)])
    assert data.num_labels == 300


def test_another_dataset_is_numbered_as_the_clients():
    data = FederatedDataset.from_clients([NEG_POS, POS_NEG])
    assert data.align_labels(POS_NEG, "new")["label"][:] == [1, 0, 0, 1]
    assert data.align_labels(strings(["pos"]), "new")["label"][:] == [1]
    assert data.align_labels(NEG_POS, "new") is NEG_POS
    with pytest.raises(ValueError, match=r"of new has classes that the others have not: neutral\. There are neg, pos"):
        data.align_labels(NEUTRAL, "new")
