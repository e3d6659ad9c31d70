"""Labels under any name of their column: all that a trainer does ends with the bits of `label`."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import METHODS, trained
from tests.tiny_federation import (
    assert_equal_states,
    state,
    timeless,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_rows,
)
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor


INPUTS = ("input_ids", "attention_mask")


def under(column, rows, decoys=()):
    """Returns the rows with the labels in another column, and further columns that could be taken for them."""
    rows = rows.rename_column("label", column) if column != "label" else rows
    for place, decoy in enumerate(decoys):
        rows = rows.add_column(decoy, [place] * len(rows))
    return rows


def federation_of(data, column, decoys=()):
    splits = data.split_indices
    renamed = FederatedDataset(
        under(column, data.pool, decoys),
        data.client_indices,
        splits["reserved"],
        splits["validation"],
        label_column=column,
    )
    return hold_out_client_tests(renamed, test_share=0.25, unseen_share=0.25)


def everything(trainer, column="label", decoys=()):
    """All that a trainer says, of the rows of `trainer` under `column`."""
    test = under(column, tiny_rows(9, seed=4), decoys)
    predicted = trainer.predict(test)
    new = trainer.personalize(test)
    return SimpleNamespace(
        log=timeless(trainer.state.log_history),
        metrics=timeless([trainer.evaluate(test), trainer.evaluate({"a": test}), predicted.metrics]),
        predictions=predicted.predictions,
        label_ids=predicted.label_ids,
        clients=[trainer.evaluate_clients(), [vars(score) for score in trainer.client_table]],
        states=[state(trainer.model), state(new), state(trainer.personalize(0))],
    )


def assert_same(first, second):
    assert [first.log, first.metrics, first.clients] == [second.log, second.metrics, second.clients]
    np.testing.assert_array_equal(first.predictions, second.predictions)
    np.testing.assert_array_equal(first.label_ids, second.label_ids)
    for one, other in zip(first.states, second.states, strict=True):
        assert_equal_states(one, other)


@pytest.fixture(scope="module")
def as_label(tmp_path_factory):
    found = {}

    def run(method):
        if method not in found:
            data = federation_of(tiny_federation(), "label")
            found[method] = everything(trained(tmp_path_factory.mktemp("label"), method, data, rounds=1))
        return found[method]

    return run


@pytest.mark.parametrize(
    ("method", "column", "decoys"),
    [
        ("fedavg", "stars", ()),
        ("fedavg", "labels", ("label", "label_ids")),
        ("fedmoe", "label_ids", ()),
        ("fedmoe", "stars", ("label", "labels")),
    ],
)
def test_the_column_may_have_any_name(tmp_path, as_label, method, column, decoys):
    data = federation_of(tiny_federation(), column, decoys)
    run = trained(tmp_path, method, data, rounds=1)
    assert_same(everything(run, column, decoys), as_label(method))


def test_images(tmp_path):
    def run(column, decoys=()):
        torch.manual_seed(0)
        data = federation_of(tiny_image_federation(), column, decoys)
        args = tiny_args(tmp_path / column, rounds=1)
        trainer = FederatedTrainer(tiny_cnn(), args, data, processing_class=tiny_processor())
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer.evaluate_clients(), state(trainer.model)

    (loss, clients, model), expected = run("stars", ("label",)), run("label")
    assert (loss, clients) == expected[:2]
    assert_equal_states(model, expected[2])


def test_a_collator_of_ones_own_gets_label(tmp_path):
    seen = []

    def collate(rows):
        seen.append(set(rows[0]))
        return default_data_collator(rows)

    data = federation_of(tiny_federation(), "stars")
    run = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=1), data, data_collator=collate)
    run.train()
    run.evaluate()
    assert all(columns == {"input_ids", "attention_mask", "label"} for columns in seen)


def test_columns_that_are_not_removed_keep_their_names(tmp_path, as_label):
    def collate(rows):
        labels = torch.tensor([row["stars"] for row in rows])
        return default_data_collator(
            [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
        ) | {"labels": labels}

    data = federation_of(tiny_federation(), "stars")
    args = tiny_args(tmp_path, rounds=1, remove_unused_columns=False)
    run = FederatedTrainer(tiny_expert(), args, data, data_collator=collate)
    run.train()
    assert_same(everything(run, "stars"), as_label("fedavg"))
    # Nobody calls the column by its name to the default collator.
    with pytest.raises(ValueError, match=r"makes no `labels` of rows .* `label_column` is 'stars': leave"):
        FederatedTrainer(tiny_expert(), args, data).train()


def test_a_test_set_of_its_own_and_another_map_are_numbered_alike(tmp_path):
    names = ["bad", "fair", "good"]
    rows = tiny_rows(60).cast_column("label", datasets.ClassLabel(names=names)).rename_column("label", "stars")
    held = rows.select(range(40, 60))
    turned = held.align_labels_with_mapping({"good": 0, "bad": 1, "fair": 2}, "stars")
    strings = held.remove_columns("stars").add_column("stars", [names[label] for label in held["stars"]])
    clients = np.split(np.arange(40), 4)
    data = FederatedDataset(rows.select(range(40)), clients, label_column="stars")
    run = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=1), data, eval_dataset={"turned": turned})
    run.train()
    expected = run.evaluate(held)["eval_loss"]
    assert run.evaluate(turned)["eval_loss"] == run.evaluate(strings)["eval_loss"] == expected
    assert run.evaluate()["eval_turned_loss"] == expected
    assert run.predict(turned).label_ids.tolist() == held["stars"][:]
    assert_equal_states(state(run.personalize(turned)), state(run.personalize(held)))
    with pytest.raises(ValueError, match="'stars' of the evaluation set has classes that the others have not: awful"):
        run.evaluate(held.cast_column("stars", datasets.ClassLabel(names=["awful", "fair", "good"])))


def test_a_new_client_of_other_widths_is_cast(tmp_path):
    run = trained(tmp_path, "fedavg_plus", federation_of(tiny_federation(), "label"), rounds=1)
    rows = tiny_rows(6, seed=3)
    narrow = rows.cast_column("input_ids", datasets.List(datasets.Value("int32")))
    assert_equal_states(state(run.personalize(narrow)), state(run.personalize(rows)))


def test_named_clients_are_called_by_name(tmp_path):
    plain = federation_of(tiny_federation(), "label")
    data = federation_of(tiny_federation(), "label")
    data.given_client_names = ["north", "south", "east", "west"]
    run = trained(tmp_path, "fedavg_plus", data, rounds=1)
    # By name, and the same bits as by number.
    assert_equal_states(state(run.personalize("south")), state(run.personalize(1)))
    with pytest.raises(ValueError, match=r"`client` is 'nord': give .* its name, one of north, south, east, west"):
        run.personalize("nord")
    other = trained(tmp_path / "plain", "fedavg_plus", plain, rounds=1)
    assert_equal_states(state(run.model), state(other.model))
    run.evaluate_clients()
    assert [score.name for score in run.client_table] == data.given_client_names
    assert [score.client for score in run.client_table] == [0, 1, 2, 3]
    lines = (tmp_path / "_client_metrics.csv").read_text().splitlines()
    assert lines[0].startswith("client,name,unseen") and lines[2].startswith("1,south,False")
    other.evaluate_clients()
    assert [score.name for score in other.client_table] == ["0", "1", "2", "3"]


def test_refusals_name_the_client(tmp_path):
    class Broken(METHODS["fedavg"].strategy):
        def train_client(self, local, task):
            raise OSError("battery empty")

    data = tiny_federation()
    data.given_client_names = ["north", "south", "east", "west"]
    run = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, clients_per_round=4), data, strategy=Broken())
    with pytest.raises(
        RuntimeError, match="client north, client south, client east, client west: OSError: battery empty"
    ):
        run.train()
