"""Each client's personal model on its own test rows."""

from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import FederatedDataset
from ..federation import Federation, balance, load_federation
from ..reporting import ClientScore, score_client, summarise_clients, write_client_table
from ..weights import release


CLIENT_TABLE_NAME = "client_metrics.csv"


class ClientEvaluation:
    """What [`FederatedTrainer`] can do besides evaluating the server's model."""

    def evaluate_clients(self) -> dict[str, float]:
        """
        Evaluates each client's personal model ([`~strategies.Strategy.personal_model`]) on its own test rows.

        The scores of the clients, unseen ones included, become `client_table` and `client_metrics.csv` in
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
        federation = self._active_federation or self._federation_of_the_last_round()
        processes, sizes = self.processes, [len(rows) for rows in [*data.client_indices, *data.unseen_indices]]
        owners = balance(sizes, processes.count)
        own = [client for client, owner in enumerate(owners) if owner == processes.index]
        try:
            parts = processes.gather(
                lambda: score_clients(federation, data, own, self._columns_of_clients(), self.data_collator)
            )
        finally:
            if self._active_federation is None:
                for module in self.strategy.server_models(self.model):
                    release(module)
                self.accelerator.free_memory()
        self.client_table = sorted((score for part in parts for score in part), key=lambda score: score.client)
        if self.is_world_process_zero():
            write_client_table(self.client_table, Path(self.args.output_dir, CLIENT_TABLE_NAME))
        metrics = {f"clients_{name}": value for name, value in summarise_clients(self.client_table).items()}
        self.log(dict(metrics))  # which adds the epoch
        return metrics

    def _federation_of_the_last_round(self) -> Federation:
        federation = self._federation()
        server, store = federation.server, federation.store
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best and not self.args.save_only_model:
            load_federation(Path(best), server, store)
        elif self._left is not None:
            server.tensors, server.integers, store.manifest = self._left
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
        predicted_N, labels_N = _predict(model, tests, collate, federation)
        unseen, train_size = client >= data.num_clients, len(data.client_rows(client))
        table.append(score_client(client, unseen, train_size, predicted_N.numpy(), labels_N.numpy()))
    return table


@torch.no_grad()
def _predict(
    model: nn.Module, dataset: Dataset, collate: Callable, federation: Federation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true classes, each of shape `[N]`."""
    local = federation.local_trainer
    predicted, labels = [], []
    model.eval()
    for batch in DataLoader(dataset, local.args.eval_batch_size, collate_fn=collate):
        labels.append(batch.pop("labels"))
        batch = {name: tensor.to(local.accelerator.device) for name, tensor in batch.items()}
        with local.accelerator.autocast():
            predicted.append(model(**batch).logits.argmax(-1).cpu())
    return torch.cat(predicted), torch.cat(labels)
