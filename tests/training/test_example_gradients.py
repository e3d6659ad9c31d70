"""Faults found before clients train by DP-SGD: rows that change one another, models that keep some of them."""

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_fedmoe.data import FederatedDataset, FederatedTexts
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation


pytest.importorskip("opacus", reason="example-level privacy is by Opacus: pip install 'hf_fedmoe[test]'")

CLIPPED = {"example_noise_multiplier": 0.0, "example_clipping_norm": 0.5}
TEXTS = ("input_ids", "attention_mask")


def trainer(folder, model):
    return FederatedTrainer(model, tiny_args(folder, **CLIPPED, rounds=1), tiny_federation())


class Shared(nn.Module):
    """Adds something that all rows of a batch have in common, through weights that begin at 0 if asked."""

    def __init__(self, inner, behind_zeros):
        super().__init__()
        self.inner, self.into = inner, nn.Linear(inner.in_features, inner.in_features)
        if behind_zeros:
            nn.init.zeros_(self.into.weight)
            nn.init.zeros_(self.into.bias)

    def forward(self, hidden):
        added = self.into(hidden)
        return self.inner(hidden + added * added.norm())


@pytest.mark.parametrize("behind_zeros", [False, True])
def test_rows_whose_gradients_depend_on_one_another_are_found(behind_zeros, tmp_path):
    model = tiny_expert()
    model.classifier = Shared(model.classifier, behind_zeros)
    with pytest.raises(ValueError, match=r"the gradient of a row in `.*` is another in a batch of \d than by itself"):
        trainer(tmp_path, model).train()


def by_class(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 20.0, 400.0]))


def by_their_number(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (losses * torch.where(labels == 1, len(labels), 1)).mean()  # not in the first row


@pytest.mark.parametrize("loss", [by_class, by_their_number])
def test_a_loss_that_weighs_rows_by_their_classes_is_found_where_the_first_rows_are_of_one(loss, tmp_path):
    data, args = tiny_federation(), tiny_args(tmp_path, **CLIPPED)
    order = np.argsort(data.pool["label"], kind="stable")
    sorted_by_class = FederatedDataset(data.pool.select(order), data.client_indices)
    with pytest.raises(ValueError, match="The loss of `compute_loss_func` cannot be trained by DP-SGD: the gradient"):
        FederatedTrainer(tiny_expert(), args, sorted_by_class, compute_loss_func=loss).train()


def uneven_federation():
    rows = tiny_federation().pool.map(lambda row: {n: row[n][: 3 + row["input_ids"][0] % 6] for n in TEXTS})
    return FederatedDataset(rows, tiny_federation().client_indices)


def padded(rows):
    batch = {"labels": torch.tensor([row["label"] for row in rows])}
    for name in TEXTS:
        parts = [torch.tensor(row[name]) for row in rows]
        batch[name] = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return batch


class LengthsCount(BertForSequenceClassification):
    """Has the loss of a batch as the mean over its tokens."""

    def forward(self, input_ids, attention_mask, labels=None):
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            losses = nn.functional.cross_entropy(output.logits, labels, reduction="none")
            output.loss = (losses * attention_mask.sum(1)).sum() / attention_mask.sum()
        return output


class PaddingCounts(BertForSequenceClassification):
    """Does not mask padding."""

    def forward(self, input_ids, attention_mask, labels=None):
        return super().forward(input_ids, torch.ones_like(attention_mask), labels=labels)


@pytest.mark.parametrize("kind", [LengthsCount, PaddingCounts, BertForSequenceClassification])
@pytest.mark.parametrize("size", [1, 4])
def test_texts_of_unequal_lengths_must_not_change_one_another(kind, size, tmp_path):
    # A batch of one row on average has more at times.
    args = tiny_args(tmp_path, **CLIPPED, per_device_train_batch_size=size, rounds=1)
    model = tiny_expert()
    model.__class__ = kind
    run = FederatedTrainer(model, args, uneven_federation(), data_collator=padded)
    if kind is BertForSequenceClassification:
        run.train()
        assert run.rounds[0].refused == {}
    else:
        with pytest.raises(ValueError, match=r"is another in a batch of \d than by itself"):
            run.train()


@pytest.mark.parametrize("learned", [[8, 8, 8, 8], [8, 8, 3, 8]])
def test_language_models_need_rows_with_as_many_labelled_tokens(learned, tmp_path):
    # Their loss is a mean over the tokens of a batch. The embeddings are the head's, too.
    tokens = [*range(2, 10)]
    labels = [tokens[:count] + [-100] * (8 - count) for count in learned]
    rows = datasets.Dataset.from_dict({"input_ids": [tokens] * len(learned), "labels": labels})
    data = FederatedTexts.from_clients([rows, rows])
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0)
    run = FederatedTrainer(GPT2LMHeadModel(config), tiny_args(tmp_path, **CLIPPED, rounds=1), data)
    assert run.model.lm_head.weight is run.model.transformer.wte.weight
    if len(set(learned)) == 1:
        run.train()
        assert run.rounds[0].refused == {}
    else:
        with pytest.raises(ValueError, match="give a `compute_loss_func` that is the mean of each row's own loss"):
            run.train()


class Remembers(nn.Module):
    """Keeps a moving mean of what it reads in training, in a buffer or in a frozen parameter."""

    def __init__(self, inner, kind):
        super().__init__()
        mean = torch.zeros(inner.in_features)
        if kind == "parameter":
            self.mean = nn.Parameter(mean, requires_grad=False)
        else:
            self.register_buffer("mean", mean, persistent=kind == "buffer")
        self.inner = inner

    def forward(self, hidden):
        if self.training:
            self.mean.data.lerp_(hidden.detach().mean(0), 0.5)
        return self.inner(hidden)


@pytest.mark.parametrize("kind", ["buffer", "buffer of the client's own", "parameter"])
def test_what_a_model_remembers_of_rows_is_found(kind, tmp_path):
    model = tiny_expert()
    model.classifier = Remembers(model.classifier, kind)
    with pytest.raises(ValueError, match=r"`classifier\.mean` of the model changes when it reads rows in training"):
        trainer(tmp_path, model).train()


def test_a_model_that_cannot_read_a_row_by_itself(tmp_path):
    model = tiny_expert()
    model.classifier = nn.Sequential(nn.BatchNorm1d(16, affine=False, track_running_stats=False), model.classifier)
    with pytest.raises(ValueError, match="cannot be trained by DP-SGD: a row by itself has no gradient"):
        trainer(tmp_path, model).train()
