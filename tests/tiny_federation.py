"""A federation small enough to run whole in a test: classes are told apart by the tokens they prefer."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import TrainerCallback

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import (
    EnsembleForSequenceClassification,
    FedMoEForSequenceClassification,
    MultiHeadForSequenceClassification,
)
from hf_fedmoe.strategies import PFedMoE
from hf_fedmoe.training import FederatedTrainer, FedMoETrainingArguments
from tests.tiny_models import PAD_TOKEN_ID, VOCAB_SIZE, tiny_bert, tiny_gpt2


NUM_LABELS = 3
LENGTH = 8


def tiny_rows(num_rows: int, seed: int = 0) -> datasets.Dataset:
    """Tokenised rows of one length; most of each row's tokens come from the third of the vocabulary of its class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_LABELS, size=num_rows)
    third = (VOCAB_SIZE - 4) // NUM_LABELS
    own = 2 + labels[:, None] * third + rng.integers(third, size=(num_rows, LENGTH))
    any_token = rng.integers(2, VOCAB_SIZE - 2, size=(num_rows, LENGTH))
    input_ids = np.where(rng.random((num_rows, LENGTH)) < 0.8, own, any_token)
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int64")),
            "attention_mask": datasets.List(datasets.Value("int64")),
            "label": datasets.ClassLabel(NUM_LABELS),
        }
    )
    columns = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def tiny_federation(num_clients: int = 4, client_size: int = 12, reserved_size: int = 24, seed: int = 0):
    """IID clients of equal size, a reserved set, and 20 validation rows."""
    rows = tiny_rows(num_clients * client_size + reserved_size + 20, seed)
    clients = np.split(np.arange(num_clients * client_size), num_clients)
    rest = np.arange(num_clients * client_size, len(rows))
    return FederatedDataset(rows, clients, reserved=rest[:reserved_size], validation=rest[reserved_size:])


def with_padding(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A collator of texts of different lengths, which follow from their first token."""
    lengths = [3 + row["input_ids"][0] % 6 for row in rows]
    batch = {"labels": torch.tensor([row["label"] for row in rows])}
    for name, filler in (("input_ids", PAD_TOKEN_ID), ("attention_mask", 0)):
        parts = [torch.tensor(row[name][:length]) for row, length in zip(rows, lengths, strict=True)]
        batch[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filler)
    return batch


def tiny_expert(**config):
    """Makes equal bits every time."""
    torch.manual_seed(7)
    return tiny_bert(NUM_LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def tiny_decoder():
    """A GPT-2 without dropout, the same bits every time."""
    torch.manual_seed(3)
    return tiny_gpt2(NUM_LABELS, pad_token_id=PAD_TOKEN_ID, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def tiny_mixture(num_routed_experts: int = 2, **config) -> FedMoEForSequenceClassification:
    return FedMoEForSequenceClassification.from_expert(tiny_expert(), num_routed_experts=num_routed_experts, **config)


def tiny_ensemble(num_models: int = 2) -> EnsembleForSequenceClassification:
    return EnsembleForSequenceClassification.from_classifier(tiny_expert(), num_models)


def tiny_multi_head(num_heads: int = 2) -> MultiHeadForSequenceClassification:
    return MultiHeadForSequenceClassification.from_classifier(tiny_expert(), num_heads)


def tiny_gate(num_routed_experts: int):
    torch.manual_seed(8)
    return tiny_bert(num_routed_experts, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def tiny_gated_experts(num_routed_experts: int = 2, **config) -> FedMoEForSequenceClassification:
    """Experts with heads of their own and a gate that is a model, no main expert."""
    experts = list(tiny_ensemble(num_routed_experts).models)
    return FedMoEForSequenceClassification.from_experts([], experts, tiny_gate(num_routed_experts), **config)


def tiny_pfedmoe(**settings) -> PFedMoE:
    """Own models of two architectures, one of them narrower than the shared model."""
    own = [tiny_bert(NUM_LABELS, hidden_size=8).config, tiny_gpt2(NUM_LABELS).config]
    return PFedMoE(own, **{"gate_hidden_size": 5} | settings)


def tiny_args(output_dir: str | Path, **changes) -> FedMoETrainingArguments:
    fields = dict(
        rounds=3,
        clients_per_round=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=11,
    )
    return FedMoETrainingArguments(output_dir=str(output_dir), **(fields | changes))


def interrupted_and_resumed(make: Callable[[], FederatedTrainer], after: int = 2) -> FederatedTrainer:
    """Stops what `make` makes at the checkpoint of a round, and returns another that went on from there."""

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == after

    interrupted = make()
    interrupted.add_callback(Stop())
    interrupted.strategy.finish = lambda *_: None  # a killed run never gets there
    interrupted.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    return resumed


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(first: dict, second: dict, **tolerance) -> None:
    """Bitwise, or within `atol`/`rtol` if given."""
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


def timeless(log_history: list[dict]) -> list[dict]:
    """Logs without what a clock writes into them."""
    clocks = ("runtime", "per_second", "seconds", "preparation_time")
    return [{key: value for key, value in entry.items() if not any(c in key for c in clocks)} for entry in log_history]
