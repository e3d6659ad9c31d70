"""Clients that others have made: other containers, other widths of types, other orders of columns."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value

from hf_fedmoe.data import FederatedDataset


def client(start=0, **changes):
    columns = {"input_ids": List(Value("int64")), "text": Value("string"), "label": Value("int64")} | changes
    rows = {"input_ids": [[start, 1], [2, 3]], "text": [f"{start}", f"{start + 1}"], "label": [0, 1]}
    return Dataset.from_dict({name: rows[name] for name in columns}, features=Features(columns))


@pytest.mark.parametrize(
    "changes",
    [
        {"label": Value("int32")},
        {"text": Value("large_string")},
        {"input_ids": List(Value("int32"))},
        {"input_ids": LargeList(Value("int64"))},
        {"input_ids": List(Value("int32"), length=2)},
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_widths_are_cast(changes, first):
    clients = [client(), client(10, **changes)]
    data = FederatedDataset.from_clients(clients if first else clients[::-1])
    assert data.pool.features == client().features
    assert data.client(int(first)).to_dict() == clients[1].to_dict()
    assert data.client(int(not first)).to_dict() == clients[0].to_dict()


def test_reserved_and_validation_are_cast_too():
    data = FederatedDataset.from_clients(
        [client()], reserved=client(10, label=Value("int8")), validation=client(20, input_ids=List(Value("int16")))
    )
    assert data.reserved["label"][:] == [0, 1] and data.validation["input_ids"][:] == [[20, 1], [2, 3]]
    assert data.pool.features == client().features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": Value("binary")}, "Column 'text' has another type in client 1 than in client 0"),
        ({"input_ids": List(Value("float32"))}, "Column 'input_ids' has another type in client 1"),
    ],
)
def test_other_types_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset.from_clients([client(), client(10, **changes)])


def test_columns_in_another_order():
    other = client(10).select_columns(["label", "text", "input_ids"])
    data = FederatedDataset.from_clients([client(), other])
    assert data.pool.column_names == client().column_names and data.client(1).to_dict() == client(10).to_dict()


def test_label_maps_of_further_columns_are_merged_by_name():
    shops = [client().add_column("shop", [0, 0], feature=ClassLabel(names=[name])) for name in ("x", "y")]
    data = FederatedDataset.from_clients([shops[0], shops[1].map(lambda row: {"text": row["text"] + "!"})])
    assert data.pool.features["shop"] == ClassLabel(names=["x", "y"]) and data.pool["shop"][:] == [0, 0, 1, 1]


def test_a_transform_that_not_all_have_is_refused():
    transformed = client(10).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="client 0 and client 1 do not have the same transform"):
        FederatedDataset.from_clients([client(), transformed])


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return client()[index]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "client south is a NoneType, not a datasets.Dataset: leave it out"),
        (DatasetDict(train=client()), r"client south is a DatasetDict.*splits\[\"train\"\]"),
        (client().to_iterable_dataset(), r"client south is a IterableDataset.*Dataset.from_list\(list\(stream\)\)"),
        (pd.DataFrame(client().to_dict()), r"client south is a DataFrame.*Dataset.from_pandas\(frame\)"),
        (client().to_list(), r"client south is a list.*Dataset.from_list\(rows\)"),
        (client().to_dict(), r"client south is a dict.*Dataset.from_dict\(columns\)"),
        (Rows(), r"client south is a Rows.*Dataset.from_list\(\[rows\[i\] for i in range\(len\(rows\)\)\]\)"),
        ("south.csv", "client south is a str.*datasets.load_dataset"),
        (7, "client south is a int, not a datasets.Dataset: make one of it"),
        (client().select([]), "client south has no rows"),
    ],
)
def test_what_is_no_dataset_is_told_how_to_become_one(wrong, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset.from_clients({"north": client(), "south": wrong})


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "clients is empty"),
        ({}, "clients is empty"),
        (client(), "clients is a Dataset: give a list of datasets.*FederatedDataset.split"),
        (DatasetDict(train=client(), test=client(10)), r"the splits \['train', 'test'\], which are no clients"),
        (None, "clients is a NoneType"),
        ((rows for rows in [client()]), "clients is a generator"),
        (pd.DataFrame(), "clients is a DataFrame"),
    ],
)
def test_what_are_no_clients(clients, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset.from_clients(clients)


def test_a_dataset_dict_of_clients_has_their_names():
    assert FederatedDataset.from_clients(DatasetDict(north=client(), south=client(10))).client_names == [
        "north",
        "south",
    ]


@pytest.mark.parametrize("wrong", [DatasetDict(train=client()), [1, 2], None])
def test_the_pool_must_be_a_dataset(wrong):
    with pytest.raises(ValueError, match=f"pool is a {type(wrong).__name__}, not a datasets.Dataset"):
        FederatedDataset(wrong, [[0]])
    with pytest.raises(ValueError, match=f"dataset is a {type(wrong).__name__}, not a datasets.Dataset"):
        FederatedDataset.split(wrong, lambda rows: [np.arange(len(rows))])


def test_rows_that_two_clients_share_are_no_error():
    data = FederatedDataset.from_clients([client(), client()])
    assert data.client_sizes.tolist() == [2, 2] and data.client(0).to_dict() == data.client(1).to_dict()


def test_the_remedies_work():
    frame = pd.DataFrame(client().to_dict())
    stream = client(10).to_iterable_dataset()
    data = FederatedDataset.from_clients(
        [Dataset.from_pandas(frame), Dataset.from_list(list(stream)), datasets.Dataset.from_dict(client(20).to_dict())]
    )
    assert [data.client(i)["text"][0] for i in range(3)] == ["0", "10", "20"]
