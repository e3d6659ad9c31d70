"""Each client's personal model on its own test rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import FederatedDataset
from ..data.common_features import with_common_features
from ..data.labels import check_label_range, name_some, read_labels
from ..federation import Federation, balance, load_federation
from ..models import AdapterExpert
from ..reporting import ClientScore, score_client, summarise_clients, write_client_table
from ..weights import copy_module, release
from .columns import ModelColumns
from .several_processes import SeveralProcesses


# The underscore keeps it from the Hub: how well each client is served is not for everybody.
CLIENT_TABLE_NAME = "_client_metrics.csv"


class ClientEvaluation(ModelColumns, SeveralProcesses):
    """Evaluates clients' models, for [`FederatedTrainer`]."""

    def evaluate_clients(self) -> dict[str, float]:
        """
        Evaluates each client's personal model ([`~strategies.Strategy.personal_model`]) on its own test rows.

        The scores of the clients, unseen ones included, become `client_table` and `_client_metrics.csv` in
        `args.output_dir`. May be called in a callback during the run, or afterwards, by all processes of a launch;
        where the best model was loaded at the end, what the clients keep is that of its round.

        Returns:
            `dict[str, float]`: [`~reporting.summarise_clients`], each name with `clients_` before it.

        Raises:
            ValueError: When clients have no test rows.
        """
        data = self.federated_dataset
        if data is None or not data.client_test_indices:
            raise ValueError(
                "`train_dataset` has no test rows of its clients: hold some out, "
                "`hold_out_client_tests(data, test_share=0.2)`."
            )
        owners = balance([len(rows) for rows in [*data.client_indices, *data.unseen_indices]], self.processes.count)
        own = [client for client, owner in enumerate(owners) if owner == self.processes.index]
        with self._current_federation() as federation:
            parts = self.processes.gather(
                lambda: score_clients(federation, data, own, self._columns_of_clients(), self.data_collator)
            )
        self.client_table = sorted((score for part in parts for score in part), key=lambda score: score.client)
        if self.is_world_process_zero():
            write_client_table(self.client_table, self._output_dir / CLIENT_TABLE_NAME)
        metrics = {f"clients_{name}": value for name, value in summarise_clients(self.client_table).items()}
        self.log(dict(metrics))  # which adds the epoch
        return metrics

    def personalize(self, client: int | str | datasets.Dataset) -> nn.Module:
        """
        One client's personal model as a model of the caller's own, to use, save or push. Nothing of the run changes.

        Args:
            client (`int`, `str` or `datasets.Dataset`):
                The number or the name of a client, training or unseen. Or the labelled examples of somebody whom the
                run does not know, prepared like those of the clients: they get what an unseen client gets. FedEM and
                pFedMM fit the mixture weights and train nothing; a method of one global model gives a copy of that;
                the others train as their clients do, [`~strategies.Strategy.personal_model`].

        Returns:
            `nn.Module`: In evaluation mode. Like [`ClientEvaluation.evaluate_clients`], it may be asked for in a
            callback during the run, or afterwards.

        Raises:
            ValueError: When there is no such client, or the examples cannot be learned from.
        """
        if self.federated_dataset is None:
            raise ValueError("`train_dataset` is None: give the trainer the `FederatedDataset` of the run.")
        number, examples = self._client_and_examples(client)
        with self._current_federation() as federation:
            model = federation.personal_model(number, examples)
            # An adapter alone could not be saved.
            own = copy_module(model.peft_model if isinstance(model, AdapterExpert) else model)
        for wrapped in ("forward", "_original_forward"):  # by evaluation in mixed precision
            vars(own).pop(wrapped, None)
        return own.eval()

    def _client_and_examples(self, client: int | str | datasets.Dataset) -> tuple[int, datasets.Dataset | None]:
        """The number by which the federation asks, and the examples of a client that it does not know."""
        data = self._data
        if not isinstance(client, datasets.Dataset):
            try:
                return data.client_number(client), None
            except (LookupError, TypeError):
                names = data.client_names
                by_name = "" if data.given_client_names is None else f" its name, one of {name_some(names)},"
                raise ValueError(
                    f"`client` is {client!r}: give a client's number, 0 to {len(names) - 1},{by_name} or a "
                    "`datasets.Dataset` of a new client's labelled examples."
                ) from None
        if len(client) == 0:
            raise ValueError("`client` has no rows: give labelled examples to personalise the model with.")
        client = data.align_labels(client, "client")
        check_label_range(
            read_labels(client, data.label_column, "client"), data.num_labels, data.label_column, "client"
        )
        columns, client = self._columns_of_clients(), self._remove_unused_columns(client, "client")
        if missing := [name for name in columns.column_names if name not in client.column_names]:
            raise ValueError(
                f"`client` lacks the columns {missing}, which the run's clients have: prepare it as they were, with "
                "the same tokenizer or columns of images."
            )
        client = client.select_columns(columns.column_names)
        return data.num_clients, with_common_features({"the run's clients": columns, "client": client})["client"]

    @contextmanager
    def _current_federation(self) -> Iterator[Federation]:
        """Gives the federation of the round that has just run, or of the last one."""
        federation = self._active_federation or self._federation_of_the_last_round()
        try:
            yield federation
        finally:
            if self._active_federation is None:
                federation.local_trainer.close()
                for module in self.strategy.server_models(self.model):
                    release(module)
                self.accelerator.free_memory()

    def _federation_of_the_last_round(self) -> Federation:
        federation = self._federation()
        server, store = federation.server, federation.store
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best and not self.args.save_only_model:
            load_federation(Path(best), server, store)
        elif self._left is not None:
            server.tensors, server.integers, ended = self._left
            store.go_on_from(ended)
        else:
            self.strategy.setup(server, federation.num_clients)
        return federation


def score_clients(
    federation: Federation, data: FederatedDataset, clients: list[int], pool: datasets.Dataset, collate: Callable
) -> list[ClientScore]:
    """
    The scores of some clients.

    Args:
        federation ([`~federation.Federation`]): As it is now; nothing of it changes.
        data ([`~data.FederatedDataset`]): With client tests.
        clients (`list[int]`): Their numbers; unseen ones follow the others.
        pool (`datasets.Dataset`): Its rows, with the columns that models take.
        collate (`Callable`): The data collator of evaluation.
    """
    table = []
    for client in clients:
        # Personal models live in one worker: each is scored before the next is made.
        model = federation.personal_model(client)
        tests = Subset(pool, data.client_test_indices[client].tolist())
        probabilities_NC, labels_N = _predict(model, tests, collate, federation)
        unseen, train_size = client >= data.num_clients, len(data.client_rows(client))
        scored = probabilities_NC.numpy(), labels_N.numpy()
        table.append(score_client(client, data.client_name(client), unseen, train_size, *scored))
    return table


@torch.no_grad()
def _predict(
    model: nn.Module, dataset: Dataset, collate: Callable, federation: Federation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `[N, C]` and true classes `[N]`."""
    local = federation.local_trainer
    probabilities, labels = [], []
    model.eval()
    for batch in DataLoader(dataset, local.args.eval_batch_size, collate_fn=collate):
        labels.append(batch.pop("labels"))
        batch = {name: tensor.to(local.accelerator.device) for name, tensor in batch.items()}
        with local.accelerator.autocast():
            probabilities.append(model(**batch).logits.float().softmax(-1).cpu())
    return torch.cat(probabilities), torch.cat(labels)
