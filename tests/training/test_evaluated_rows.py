"""Datasets that cannot be evaluated are told apart, with the row and the remedy."""

import datasets
import pytest

from hf_fedmoe.strategies import FedAvg
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation
from tests.tiny_tokenizer import tiny_tokenizer


def rows(ids, label):
    return datasets.Dataset.from_dict(
        {"input_ids": [[3], ids], "attention_mask": [[1], [1] * len(ids)], "label": [0, label]}
    )


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: rows([3], 9), r"`label` of row 1 of the dataset .* is 9, but the model knows .* It says: IndexError"),
        (lambda: rows([3, 4000], 0), r"`input_ids` of row 1 of the dataset .* holds the token 4000"),
        (
            lambda: rows([3] * 500, 0),
            r"row 1 of the dataset .* has 500 tokens, but the model reads no more than \d+: pr",
        ),
        (
            lambda: datasets.Dataset.from_dict({"text": ["a"], "label": [0]}),
            r"the dataset has only \['label'\], no 'input_ids': prepare it like the clients' data",
        ),
        (tiny_federation, "_dataset` is a FederatedDataset: give one of its splits, for example `data"),
        (lambda: [{"label": 0}], "_dataset` is a list: give a dataset"),
    ],
)
def test_datasets_that_no_model_reads(tmp_path, dataset, message):
    trainer = FederatedTrainer(
        tiny_expert(), tiny_args(tmp_path), tiny_federation(), FedAvg(), processing_class=tiny_tokenizer()
    )
    for ask in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=message):
            ask(dataset())


def test_nothing_to_predict(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), FedAvg())
    with pytest.raises(ValueError, match="`test_dataset` is None: give a dataset"):
        trainer.predict(None)
