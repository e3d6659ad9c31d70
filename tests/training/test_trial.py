"""Whatever cannot work is refused before the first round, by row, value and remedy; the trial leaves no trace."""

import random

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import BertForSequenceClassification

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.strategies import FedAvg, FedMoE
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.trial import Trial, _check_indices
from tests.every_method import image_model
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_decoder,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_rows,
)
from tests.tiny_images import tiny_image_federation, tiny_processor
from tests.tiny_models import PAD_TOKEN_ID, tiny_bert, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer


def pad(rows):
    """Rows of any length as a batch, without a tokenizer."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"labels": torch.tensor([row["label"] for row in rows])}
    for name, filling in (("input_ids", PAD_TOKEN_ID), ("attention_mask", 0)):
        filled = [[*row[name], *[filling] * (longest - len(row[name]))] for row in rows]
        batch[name] = torch.tensor(filled).view(len(rows), longest)
    return batch


def with_rows(changed, **splits):
    """Three clients of 8 rows, 24 to 35 reserved, 36 to 43 for validation; some rows with other tokens."""
    rows = tiny_rows(52).to_dict()
    for row, ids in changed.items():
        rows["input_ids"][row], rows["attention_mask"][row] = ids, [1] * len(ids)
    table = datasets.Dataset.from_dict(rows, features=tiny_rows(1).features)
    clients = np.split(np.arange(24), 3)
    return FederatedDataset(
        table, clients, **{"reserved": np.arange(24, 36), "validation": np.arange(36, 44)} | splits
    )


def make_trainer(folder, data, model=tiny_expert, kind=FederatedTrainer, strategy=None, **changes):
    settings = {name: changes.pop(name) for name in ("data_collator", "peft_config") if name in changes}
    args = tiny_args(folder, rounds=1, **changes)
    return kind(model(), args, data, strategy=strategy, **{"data_collator": pad} | settings)


LONG, OTHER = [3] * 60, [3, 40, 4]


@pytest.mark.parametrize(
    ("data", "model", "settings", "message"),
    [
        (
            lambda: with_rows({9: LONG, 20: LONG[:41], 21: LONG[:40]}),
            tiny_expert,
            {},
            r"`input_ids` of row 1 of client 1 \(`train_dataset.client\(1\)\[1\]`\) has 60 tokens, but the model "
            r"reads no more than 40: prepare the data with `truncation=True, max_length=40`. So it is with 2 rows, of "
            r"client 1, client 2. It says: RuntimeError",
        ),
        (
            lambda: with_rows({0: LONG[:33]}),
            tiny_decoder,
            {},
            r"has 33 tokens, but the model reads no more than 32.*an embedding of 32 rows is asked for row 32",
        ),
        (
            lambda: with_rows({0: LONG}),
            tiny_expert,
            {"peft_config": LoraConfig(r=2)},
            r"has 60 tokens, but the model reads no more than 40",
        ),
        (
            lambda: with_rows({25: LONG}),
            tiny_mixture,
            {"strategy": FedMoE()},
            r"row 1 of the reserved set \(`train_dataset.reserved\[1\]`\) has 60 tokens",
        ),
        (
            lambda: with_rows({37: LONG}),
            tiny_expert,
            {},
            r"row 1 of `trainer.eval_dataset` \(`trainer.eval_dataset\[1\]`\) has 60 tokens",
        ),
        (
            lambda: with_rows({45: LONG}, client_tests=[[44], [45], [46]]),
            tiny_expert,
            {},
            r"row 0 of the test of client 1 \(`train_dataset.client_test\(1\)\[0\]`\) has 60 tokens",
        ),
        (
            lambda: with_rows({45: LONG}, test=np.arange(44, 52)),
            tiny_expert,
            {},
            r"row 1 of `train_dataset.test` \(`train_dataset.test\[1\]`\) has 60 tokens",
        ),
        (
            lambda: with_rows({45: LONG}, unseen_clients=[[44, 45]]),
            tiny_expert,
            {},
            r"row 1 of client 3 \(`train_dataset.client\(3\)\[1\]`\) has 60 tokens",
        ),
        (
            lambda: with_rows({9: OTHER, 13: OTHER, 25: OTHER}),
            tiny_mixture,
            {"strategy": FedMoE()},
            r"`input_ids` of row 1 of client 1 \(.*\) holds the token 40, but the model knows 40, 0 to 39; so it is "
            r"with 3 rows, of client 1, the reserved set: prepare the data with the tokenizer of this model",
        ),
        (lambda: with_rows({16: [3, -1]}), tiny_expert, {}, r"row 0 of client 2 .* holds the token -1"),
        (
            lambda: with_rows({7: []}),
            tiny_decoder,
            {"per_device_train_batch_size": 1},
            r"row 7 of client 0 .* holds no text, 0 tokens of nothing but padding: leave such rows out",
        ),
    ],
    ids=[
        "clients",
        "decoder",
        "adapters",
        "reserved",
        "validation",
        "client tests",
        "test",
        "unseen",
        "tokens",
        "negative",
        "empty",
    ],
)
def test_rows_that_no_model_reads(tmp_path, data, model, settings, message):
    run = make_trainer(tmp_path, data(), model, **settings)
    before = state(run.model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.rounds == []
    assert_equal_states(before, state(run.model))
    assert not run.model.get_input_embeddings().weight.untyped_storage().nbytes() > 40 * 16 * 4  # no bank any more


def test_rows_that_nobody_reads_are_nobodys_fault(tmp_path):
    make_trainer(tmp_path, with_rows({50: LONG, 51: OTHER})).train()
    # FedAvg does not read the reserved set, and a Llama has no longest text.
    make_trainer(tmp_path, with_rows({25: LONG})).train()
    make_trainer(tmp_path, with_rows({0: LONG}), lambda: tiny_llama(3)).train()


def test_validation_rows_of_the_users_own(tmp_path):
    own = (
        tiny_rows(6)
        .cast_column("label", datasets.Value("int64"))
        .map(lambda row, i: {"label": i - 1}, with_indices=True)
    )
    args, data = tiny_args(tmp_path), tiny_federation()
    run = FederatedTrainer(tiny_expert(), args, data, eval_dataset={"one": tiny_rows(4), "other": own})
    message = (
        r"`label` of row 0 of `trainer.eval_dataset\['other'\]` .* is -1, but the model knows 3 classes, 0 to 2; so "
        r"it is with 3 rows, of `trainer.eval_dataset\['other'\]`: leave out rows without a label"
    )
    with pytest.raises(ValueError, match=message):
        run.train()


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda rows: rows,
            r"`train_data_collator` makes of row 0 of client 0 .* and row 1 .* a list, where the model",
        ),
        (
            lambda rows: pad(rows) | {"text": ["a", "b"]},
            r"'text' is a list, .*leave that column out, .*remove_columns",
        ),
        (lambda rows: pad(rows) | {"n": torch.ones(1)}, r"'n' has the shape \(1,\), where 2 rows are wanted"),
        (
            lambda rows: {name: t for name, t in pad(rows).items() if name != "labels"},
            r"a batch of 'input_ids', 'attention_mask' without 'labels', so that there is no loss: .*rename_column",
        ),
        (
            lambda rows: {"labels": pad(rows)["labels"]},
            r"a batch of 'labels' without 'input_ids', which a BertForSequenceClassification reads",
        ),
        (None, r"`train_data_collator` can make no batch of row 1 of client 0 .* and row 0 .*: ValueError: expected"),
    ],
    ids=["list", "no tensor", "rows", "no labels", "no texts", "ragged"],
)
def test_collators_whose_batches_no_model_reads(tmp_path, collate, message):
    data = tiny_federation() if collate else with_rows({0: [2] * 9, 1: [2, 3]})
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data, data_collator=collate).train()


def expert_whose_loss_is(loss):
    class Changed(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask, labels=labels)
            outputs.loss = loss(outputs.logits)
            return outputs

    return Changed(tiny_bert(3).config)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits: None, "The loss of the Changed is None, where a number is wanted.*with a head"),
        (lambda logits: logits.mean(1), r"The loss of the Changed has the shape \(2,\): return one number, the mean"),
        (lambda logits: logits.mean() / 0, "The loss of the Changed is -?inf on the shortest and the longest row"),
        (lambda logits: logits.mean().detach(), "The loss of the Changed has no gradient: compute it of"),
        (
            lambda logits: torch.zeros((), requires_grad=True),
            "depends on no parameter that learns: all gradients are None",
        ),
        (lambda logits: (logits.sum() * 0).sqrt(), "has a gradient that is not finite"),
        (lambda logits: logits[:, 7].mean(), "The model cannot read row 0 of client 0.*IndexError: index 7"),
    ],
    ids=["none", "by row", "infinite", "detached", "of nothing", "gradient", "error"],
)
def test_losses_that_nobody_learns_by(tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_federation(), lambda: expert_whose_loss_is(loss)).train()


def test_a_model_of_which_nothing_learns(tmp_path):
    with pytest.raises(ValueError, match="Nothing of the BertForSequenceClassification learns, all its parameters"):
        make_trainer(tmp_path, tiny_federation(), lambda: tiny_expert().requires_grad_(False))


class Noisy:
    """A collator that draws from every generator there is."""

    def __call__(self, rows):
        batch = pad(rows)
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        batch["labels"] = (batch["labels"] + int(noise * 10)) % 3
        return batch


@pytest.mark.parametrize("model", [lambda: tiny_bert(3), lambda: image_model("fedavg")], ids=["dropout", "batchnorm"])
def test_the_trial_leaves_no_trace(tmp_path, monkeypatch, model):
    """Equal bits with and without it: weights, running statistics, generators, optimizer."""
    images = model().main_input_name == "pixel_values"
    states, drawn = [], []

    class Watched(FedAvg):
        def setup(self, server, num_clients):
            drawn.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
            assert all(parameter.grad is None for parameter in server.worker.parameters())
            states.append(state(server.worker) | {"training": torch.tensor(server.worker.training)})

    for trial in (True, False):
        if not trial:
            monkeypatch.setattr(Trial, "run", lambda self: None)
        torch.manual_seed(0)
        data = tiny_image_federation() if images else tiny_federation()
        args = tiny_args(tmp_path, rounds=2)
        processor = tiny_processor() if images else None
        collate = None if images else Noisy()
        run = FederatedTrainer(model(), args, data, Watched(), processing_class=processor, train_data_collator=collate)
        random.seed(1)
        run.train()
        states.append(state(run.model))
    assert drawn[0] == drawn[1]
    assert_equal_states(states[0], states[2])
    assert_equal_states(states[1], states[3])


def test_what_a_batch_that_was_read_covers_is_not_read_again(tmp_path, monkeypatch):
    read = []
    train, evaluate = Trial._train, Trial._evaluate

    def watch(name, method):
        def watched(self, batch):
            read.append((name, tuple(batch["input_ids"].shape)))
            return method(self, batch)

        return watched

    monkeypatch.setattr(Trial, "_train", watch("train", train))
    monkeypatch.setattr(Trial, "_evaluate", watch("evaluate", evaluate))
    make_trainer(
        tmp_path, with_rows({25: [3] * 20, 37: [3] * 30, 45: [3] * 4}), tiny_mixture, strategy=FedMoE()
    ).train()
    assert read == [("train", (2, 8)), ("train", (2, 20)), ("evaluate", (2, 30))]
    read.clear()
    make_trainer(tmp_path, with_rows({0: [3] * 20}), per_device_train_batch_size=1).train()
    assert read == [("train", (1, 20)), ("evaluate", (2, 8))]


def test_rows_that_are_made_when_they_are_read_are_tried_out_alone(tmp_path):
    data = tiny_federation()
    data.pool = data.pool.with_transform(lambda rows: {**rows, "input_ids": [[40] * 8 for _ in rows["input_ids"]]})
    with pytest.raises(ValueError, match=r"The model cannot read row 0 of client 0 .*an embedding of 40 rows"):
        make_trainer(tmp_path, data).train()


@pytest.mark.parametrize("strategy", [FedAvg, FedMoE])
def test_rows_that_were_never_prepared(tmp_path, strategy):
    """The server collates its reserved set after the trial, whose words a user therefore gets for every method."""
    rows = datasets.Dataset.from_dict({"text": ["good", "bad", "fair"], "label": [0, 1, 2]})
    data = FederatedDataset.from_clients([rows, rows], reserved=rows)
    model = tiny_mixture() if strategy is FedMoE else tiny_expert()
    trainer = FederatedTrainer(model, tiny_args(tmp_path), data, strategy(), processing_class=tiny_tokenizer())
    message = r"can make no batch of .*they have only \['label'\], no 'input_ids': tokenise texts, or decode images"
    with pytest.raises(ValueError, match=message):
        trainer.train()


class Positions(torch.nn.Embedding):
    """Reads of token ids only how many there are, as BART's positions do."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]))


def test_an_embedding_is_asked_for_its_input_unless_it_reads_it_otherwise():
    ids = torch.tensor([[34, 34]])
    _check_indices(Positions(2, 1), (ids,))
    with pytest.raises(IndexError, match="an embedding of 2 rows is asked for row 34"):
        _check_indices(torch.nn.Embedding(2, 1), (ids,))
