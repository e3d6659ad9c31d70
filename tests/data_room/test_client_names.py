"""Names of clients: kept on every way, and nothing that is computed depends on them."""

import warnings

import numpy as np
import pytest
from datasets import Dataset

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests, natural_by_name


def rows(start=0, count=4):
    numbers = range(start, start + count)
    return Dataset.from_dict({"text": [f"row {i}" for i in numbers], "label": [i % 2 for i in range(count)]})


NAMED = {"north": rows(), "südost": rows(10), "a shop, with a comma": rows(20)}


@pytest.fixture
def data():
    return FederatedDataset.from_clients(NAMED, reserved=rows(30))


def test_a_dict_of_clients_has_names(data):
    assert data.client_names == ["north", "südost", "a shop, with a comma"]
    assert [data.client_name(i) for i in range(3)] == data.client_names
    assert data.client("südost")["text"][:] == data.client(1)["text"][:] == rows(10)["text"][:]
    assert data.client_number("südost") == data.client_number(1) == data.client_number(np.int64(1)) == 1
    with pytest.raises(KeyError, match=r"There is no client 'sudost'. Meant \['südost'\]"):
        data.client("sudost")
    with pytest.raises(TypeError):
        data.client(0.5)


def test_without_names_clients_are_called_by_their_numbers():
    data = FederatedDataset.from_clients(list(NAMED.values()))
    assert data.client_names == ["0", "1", "2"] and data.given_client_names is None
    assert data.client_name(2) == "2" and data.client("2")["text"][:] == rows(20)["text"][:]


def test_names_change_nothing_that_is_computed(data):
    plain = FederatedDataset.from_clients(list(NAMED.values()), reserved=rows(30))
    assert data.state_fingerprint() == plain.state_fingerprint()
    assert data.pool.to_dict() == plain.pool.to_dict() and data.pool._fingerprint == plain.pool._fingerprint
    first, second = (hold_out_client_tests(each, 0.25, 0.3, seed=1) for each in (data, plain))
    assert first.state_fingerprint() == second.state_fingerprint()


def test_map_and_hold_outs_keep_the_names(data):
    assert data.map(lambda row: {"n": 1}).client_names == data.client_names
    held = hold_out_client_tests(data, 0.25, unseen_share=0.3, seed=0)
    assert sorted(held.client_names) == sorted(NAMED) and len(held.unseen_indices) == 1
    for number, name in enumerate(held.client_names):
        own = {*held.client(number)["text"], *held.client_test(number)["text"]}
        assert own == set(NAMED[name]["text"]) and held.client(name)["text"][:] == held.client(number)["text"][:]
    plain = hold_out_client_tests(FederatedDataset.from_clients(list(NAMED.values())), 0.25, unseen_share=0.3, seed=0)
    assert plain.client_names == ["0", "1", "2"]


def test_the_constructor_takes_rows_by_name():
    data = FederatedDataset(rows(), {"a": [0], "b": [1]}, unseen_clients={"c": [2, 3]})
    assert data.client_names == ["a", "b", "c"] and data.client("c")["text"][:] == ["row 2", "row 3"]
    half = FederatedDataset(rows(), [[0], [1]], unseen_clients={"c": [2, 3]})
    assert half.client_names == ["0", "1", "c"]
    with pytest.raises(ValueError, match="Clients 0 and 1 are both called 'a'"):
        FederatedDataset(rows(), {"a": [0, 1]}, unseen_clients={"a": [2, 3]})


def test_split_by_shop_is_named_by_shop():
    shops = rows(count=8).add_column("shop", ["x", "y", "x", "z", "z", "y", "x", "z"])
    data = FederatedDataset.split(shops, lambda rest: natural_by_name(rest["shop"], min_size=3))
    assert data.client_names == ["x", "z"]
    assert [set(data.client(i)["shop"]) for i in range(2)] == [{"x"}, {"z"}]
    numbers = rows(count=6).add_column("shop", [7, 7, 12, 12, 7, 12])
    assert FederatedDataset.split(numbers, lambda rest: natural_by_name(rest["shop"])).client_names == ["7", "12"]


class Partitioner:
    num_partitions = 2

    def __init__(self, dataset):
        self.dataset = dataset

    def load_partition(self, index):
        return self.dataset.select([2 * index, 2 * index + 1])


def test_partitions_can_be_named():
    data = FederatedDataset.from_partitioner(Partitioner(rows()), client_names={0: "a", 1: "b"}.values())
    assert data.client_names == ["a", "b"] and data.client("b")["text"][:] == ["row 2", "row 3"]
    with pytest.raises(ValueError, match="client_names has 1 names for 2 partitions"):
        FederatedDataset.from_partitioner(Partitioner(rows()), client_names=["a"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "The name of client 1 is ''"),
        ("  ", "The name of client 1 is '  '"),
        ("two\nlines", r"The name of client 1 is 'two\\nlines'.*on one line"),
        ("bell\x07", "on one line"),
        ("south ", "without spaces around it"),
        (("a", 1), r"The name of client 1 is \('a', 1\), a tuple: give a string"),
        (None, "The name of client 1 is None, a NoneType"),
        (1.5, "The name of client 1 is 1.5, a float"),
        (True, "The name of client 1 is True, a bool"),
    ],
)
def test_odd_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset.from_clients({"north": rows(), name: rows(10)})


def test_numbers_become_names():
    assert FederatedDataset.from_clients({np.int64(7): rows(), 3: rows(10)}).client_names == ["7", "3"]
    with pytest.raises(ValueError, match="Clients 0 and 1 are both called '7'"):
        FederatedDataset.from_clients({7: rows(), "7": rows(10)})


def test_the_table_and_messages_call_clients_by_name(data):
    lines = data.summary().splitlines()
    assert [line[:27].strip() for line in lines[2:6]] == [
        "client north",
        "client südost",
        "client a shop, with a comma",
        "all clients",
    ]
    with pytest.raises(ValueError, match="client x and client y overlap: row 1"):
        FederatedDataset(rows(), {"x": [0, 1], "y": [1, 2]})
    with pytest.raises(ValueError, match="client y has no rows"):
        FederatedDataset(rows(), {"x": [0, 1], "y": []})
    with pytest.raises(ValueError, match="Client y has 1 row, too few"):
        hold_out_client_tests(FederatedDataset(rows(), {"x": [0, 1], "y": [2]}))


@pytest.mark.parametrize("names", [["a$b", "x_y^2", "名前"], [f"c{i}" for i in range(40)]])
def test_the_plot_has_the_names(tmp_path, names):
    clients = {name: rows(4 * i) for i, name in enumerate(names)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a font that lacks them draws boxes
        FederatedDataset.from_clients(clients).plot(tmp_path / "clients.svg")
    svg = (tmp_path / "clients.svg").read_text(encoding="utf-8")
    assert ("<!-- a$b -->" in svg) == (len(names) == 3)
