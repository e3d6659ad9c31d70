"""Clients in groups, of texts and of images."""

import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_fedmoe.experiments import ImageExperiment, TextExperiment


SETTINGS = {"dataset": ["own"], "model": ["own"], "partition": "domains", "num_domains": 2, "num_clients": 4}
SETTINGS |= {"examples_per_client": 5, "reserved_size": 8, "validation_size": 0}
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "fair", "good", "best"])})


def rows_of(start, stop):
    numbers = range(start, stop)
    return Dataset.from_dict(
        {"text": [f"row {row}" for row in numbers], "label": [row % 4 for row in numbers]}, FEATURES
    )


def test_a_text_means_another_class_to_each_group():
    experiment = TextExperiment(**SETTINGS)
    data = experiment.split(DatasetDict(train=rows_of(0, 60), test=rows_of(60, 80)), seed=0)
    for client in range(4):
        rows = data.client(client)
        assert len(rows) == 5 and set(rows["domain"]) == {client % 2}
        truly = np.array([int(text.removeprefix("row ")) % 4 for text in rows["text"]])
        assert (np.array(rows["label"]) == (truly + 2 * (client % 2)) % 4).all()
    assert set(data.test["domain"]) == {0, 1} and len(data.reserved) == 8


def test_domains_of_the_data_are_taken_as_they_are():
    told = [row % 2 for row in range(60)]
    train = rows_of(0, 60).add_column("domain", told)
    test = rows_of(60, 80).add_column("domain", told[:20])
    data = TextExperiment(**SETTINGS).split(DatasetDict(train=train, test=test), seed=0)
    for client in range(4):
        rows = data.client(client)
        assert set(rows["domain"]) == {client % 2}
        assert rows["label"][:] == [int(text.removeprefix("row ")) % 4 for text in rows["text"]]
    given = DatasetDict(train=train, test=test)
    with pytest.raises(
        ValueError, match="`num_domains` is 3, but the data has a column 'domain' of 2, which are taken"
    ):
        TextExperiment(**SETTINGS | {"num_domains": 3}).split(given, seed=0)
    # Left out, it is that of the data, or four.
    unsaid = TextExperiment(**SETTINGS | {"num_domains": None})
    assert {tuple(set(unsaid.split(given, seed=0).client(client)["domain"])) for client in range(4)} == {(0,), (1,)}
    without = DatasetDict(train=rows_of(0, 60), test=rows_of(60, 80))
    assert [unsaid.split(without, seed=0).client(client)["domain"][0] for client in range(4)] == [0, 1, 2, 3]


def test_rows_without_a_domain_are_told():
    train = rows_of(0, 60).add_column("domain", ["north", None, "south"] * 20)
    with pytest.raises(ValueError, match=r"`domain` is missing in \d+ rows of \d+, row \d+ first: name that of each"):
        TextExperiment(**SETTINGS | {"num_domains": None}).split(DatasetDict(train=train, test=train), seed=0)


def test_several_data_sets_are_one_of_domains(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FEDMOE_DATA", str(tmp_path))
    for name, size in (("shop", 60), ("films", 40)):
        rows_of(0, size).map(lambda row, name=name: {"text": f"{name}: {row['text']}"}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    settings = SETTINGS | {"dataset": ["nowhere+shop", "shop + films"]}
    experiment = TextExperiment(**settings)
    name, source = experiment.source()
    data = experiment.split(source, seed=0)
    assert name == "shop + films" and len(data.test) == 16
    for client in range(4):
        rows = data.client(client)
        assert len(rows) == 5 and {text.split(":")[0] for text in rows["text"]} == set(rows["domain"])
        assert set(rows["domain"]) == {["films", "shop"][client % 2]}


@pytest.mark.parametrize("name", ["shop+shop", "shop+", "+"])
def test_each_data_set_is_joined_once(name):
    with pytest.raises(ValueError, match=re.escape(f"`dataset` has {name!r}: name each data set")):
        TextExperiment(**SETTINGS | {"dataset": [name]}).load(name)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TextExperiment, {"domain_shift": "turns"}, "`domain_shift` is 'turns': choose one of rotations, labels"),
        (ImageExperiment, {"num_domains": 0}, "`num_domains` is 0: give at least 1"),
    ],
)
def test_wrong_settings_are_told(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**SETTINGS | changes)


def test_texts_cannot_be_turned():
    experiment = TextExperiment(**SETTINGS, domain_shift="rotations")
    with pytest.raises(ValueError, match=r"shift is 'rotations', but only images can be turned.*: take 'labels'"):
        experiment.split(DatasetDict(train=rows_of(0, 60), test=rows_of(60, 80)), seed=0)
