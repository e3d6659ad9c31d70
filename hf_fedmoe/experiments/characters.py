"""The character recipe: roles of plays, windows of what they say, the next character."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data import (
    CHARACTERS,
    FederatedDataset,
    character_inputs,
    decode_characters,
    load_rows,
    natural,
    next_character_windows,
)
from ..models import (
    EnsembleForSequenceClassification,
    FedMoEForSequenceClassification,
    MultiHeadForSequenceClassification,
)
from .classifier_experiment import ClassifierExperiment, build_classifier, label_maps
from .experiment import find_model


# Characters of a context that are printed, and of its continuation.
SHOWN = 40


@dataclass
class CharacterExperiment(ClassifierExperiment):
    """The next character as a class; a model is the name of an architecture, with random weights, or a trained one."""

    model_config: str = field(default="{}", metadata={"help": "JSON: the configuration of an architecture."})
    role_column: str = field(default="role_id", metadata={"help": "Column that says who speaks."})
    window: int = field(default=80, metadata={"help": "Characters that are read for one prediction."})
    stride: int = field(default=1, metadata={"help": "Characters from one window to the next."})
    min_windows: int = field(default=64, metadata={"help": "Roles with fewer training windows are left out."})
    server_roles: int = field(default=4, metadata={"help": "Roles of the reserved set and of validation, half each."})

    mixture_class = FedMoEForSequenceClassification
    ensemble_class = EnsembleForSequenceClassification
    multi_head_class = MultiHeadForSequenceClassification
    partitions = (*ClassifierExperiment.partitions, "natural")
    lowest = {**ClassifierExperiment.lowest, "window": 1, "stride": 1, "min_windows": 1, "server_roles": 2}

    def load_processor(self) -> None:
        """Characters need none."""

    def load(self, name: str) -> datasets.DatasetDict:
        rows = load_rows(name)
        return next_character_windows(rows, self.window, self.stride, role_column=self.role_column)

    def split(self, source: datasets.DatasetDict, seed: int) -> FederatedDataset:
        # Windows overlap, so that the server's roles are at no client, and validation has others than the reserved
        # set. Who they are is the same for every seed, as the test rows are: the last lines of the clients' roles.
        train, test = source["train"], source["test"]
        owner_N = np.asarray(train[self.role_column][:])
        roles, sizes = np.unique(owner_N, return_counts=True)
        roles = roles[(sizes >= self.min_windows) & np.isin(roles, test[self.role_column][:])]
        server = self.server_roles
        needed = server + (self.num_clients if self.partition == "natural" else 1)
        if len(roles) < needed:
            raise ValueError(
                f"`server_roles` is {server} and `num_clients` {self.num_clients}, but only {len(roles)} roles have "
                f"`min_windows` = {self.min_windows} windows for training and one for the test: ask for fewer, or "
                "lower `min_windows` or `stride`."
            )
        roles = np.random.default_rng(0).permutation(roles)
        chosen = roles[server:needed] if self.partition == "natural" else roles[server:]
        rows = np.flatnonzero(np.isin(owner_N, chosen))
        rng = np.random.default_rng(seed)
        held = {
            "reserved": self._draw(np.isin(owner_N, roles[: server // 2]), "reserved_size", rng),
            "validation": self._draw(np.isin(owner_N, roles[server // 2 : server]), "validation_size", rng),
        }
        clients = [rows[part] for part in self.divide(train.select(rows), seed)]
        used = np.sort(np.concatenate([*clients, *held.values()]))
        test = test.select(np.flatnonzero(np.isin(np.asarray(test[self.role_column][:]), chosen)))
        test = test.shuffle(seed=0).select(range(min(self.max_test_examples, len(test))))
        with warnings.catch_warnings():
            # No play has all 100 characters.
            warnings.filterwarnings("ignore", message="The reserved set of .* rows has no example")
            return FederatedDataset(
                train.select(used),
                [np.searchsorted(used, part) for part in clients],
                np.searchsorted(used, held["reserved"]),
                np.searchsorted(used, held["validation"]),
                test,
            )

    def _draw(self, is_candidate_N: np.ndarray, field_name: str, rng: np.random.Generator) -> np.ndarray:
        rows, size = np.flatnonzero(is_candidate_N), vars(self)[field_name]
        if not 1 <= size <= len(rows):
            raise ValueError(
                f"`{field_name}` is {size}, but the server's roles for it have {len(rows)} windows: pass 1 to "
                f"{len(rows)}, raise `server_roles` or lower `stride`."
            )
        return np.sort(rng.choice(rows, size, replace=False))

    def divide(self, rows: datasets.Dataset, seed: int) -> list[np.ndarray]:
        if self.partition == "natural":
            return natural(rows[self.role_column], None, seed, max_size=self.examples_per_client)
        return super().divide(rows, seed)

    def prepare(self, data: FederatedDataset, processor: None) -> FederatedDataset:
        return data

    def make_expert(self, data: FederatedDataset, processor: None) -> PreTrainedModel:
        return self._build(find_model(self.model), label_maps(data))

    def make_gate(self, num_experts: int) -> PreTrainedModel:
        return self._build(find_model(self._gate_names()), {"num_labels": num_experts})

    def _build(self, name: str, labels: dict[str, Any]) -> PreTrainedModel:
        config = {"vocab_size": len(CHARACTERS), **self.read_json("model_config")}
        return build_classifier(AutoModelForSequenceClassification, name, config, labels)

    @torch.no_grad()
    def show(self, folder: Path, data: FederatedDataset, processor: None) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert data.test is not None
        text = context = decode_characters(data.test[0]["input_ids"])
        for _ in range(SHOWN):
            logits_1C = model(**character_inputs([text], self.window)).logits
            text += CHARACTERS[logits_1C.argmax().item()]
        print(f"  {context[-SHOWN:]!r} goes on {text[len(context) :]!r}")
        for row in data.test.select(range(min(5, len(data.test)))):
            inputs = {"input_ids": torch.tensor([row["input_ids"]])}
            found = model(**inputs).logits.argmax().item()
            end = decode_characters(row["input_ids"][-SHOWN:])
            print(f"  {end!r}: {data.label_names[found]}, truly {data.label_names[row['label']]}")
