"""The columns of a dataset that a model reads, and labels under a name that collators know."""

import inspect
from collections.abc import Callable, Sequence

import datasets
import torch
from torch import nn

from ..data.labels import labels_for_collators
from ..weights import StateLayout
from .adapters import freeze_lora_a
from .trainer_of_rounds import TrainerOfRounds, client_model_of


class ModelColumns(TrainerOfRounds):
    """Chooses columns, and knows the clients' model, for [`FederatedTrainer`]."""

    def _columns_of_clients(self) -> datasets.Dataset:
        """The pool without the columns that the client model does not take."""
        self._set_signature_columns_if_needed()
        return self._remove_unused_columns(self._data.pool, "client")

    def _remove_unused_columns(self, dataset: datasets.Dataset, description: str | None = None) -> datasets.Dataset:
        """
        Removes columns as [`~transformers.Trainer`] does, but for the labels: the data's `label_column` becomes
        `label`, and classes with names are numbered as the clients' are. With `remove_unused_columns=False` rows stay
        as they are.
        """
        data = self.federated_dataset
        if data is not None and self.args.remove_unused_columns and data.label_column in dataset.column_names:
            dataset = data.align_labels(dataset, f"the {(description or 'given').lower()} set")
            dataset = labels_for_collators(dataset, data.label_column)
        return super()._remove_unused_columns(dataset, description)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the *client* model takes; a mixture passes them on."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            expert = self.strategy.server_models(self.model)[0]
            if expert is not self.model:
                own = inspect.signature(client_model_of(expert).forward).parameters
                self._signature_columns = [*(self._signature_columns or ()), *own]

    def _server_models(self) -> tuple[Sequence[nn.Module], StateLayout]:
        """Returns the modules that become the rows of the server, and their layout."""
        modules = self.strategy.server_models(self.model)
        if self.args.lora_fusion == "ffa":
            freeze_lora_a(modules)
        return modules, StateLayout.of(modules[0], lora_products=self.args.lora_fusion == "svd")

    def _num_embeddings(self) -> int | None:
        """Tokens that the client model knows, `None` if it reads none."""
        client_model = client_model_of(self.strategy.server_models(self.model)[0])
        if client_model.main_input_name != "input_ids":
            return None
        weight = client_model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return len(weight)


def check_batch_has_labels(rows: datasets.Dataset, collate: Callable, label_column: str) -> None:
    """Raises `ValueError` when a collator makes a batch without `labels`, of which no model has a loss."""
    if not {"label", "labels"}.isdisjoint(rows.column_names):
        return
    with torch.random.fork_rng(devices=[]):
        batch = collate([rows[0]])
    if "labels" not in batch:
        raise ValueError(
            f"The collator makes no `labels` of rows with the columns {rows.column_names}, where `label_column` is "
            f"{label_column!r}: leave `remove_unused_columns` out, for its default calls that column `label`, or let "
            "`data_collator` return `labels`."
        )
