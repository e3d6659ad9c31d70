"""Each client's personal model on its own test rows."""

from collections.abc import Callable

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import FederatedDataset
from ..federation import Federation
from ..reporting import ClientScore, score_client


def score_clients(
    federation: Federation, data: FederatedDataset, pool: datasets.Dataset, collate: Callable
) -> list[ClientScore]:
    """
    The scores of all clients, then of the unseen ones.

    Args:
        federation ([`~federation.Federation`]): As it is now; nothing of it changes.
        data ([`~data.FederatedDataset`]): With client tests.
        pool (`datasets.Dataset`): Its rows, with the columns that models take.
        collate (`Callable`): The data collator of evaluation.
    """
    table = []
    for client, rows in enumerate(data.client_test_indices):
        # Personal models live in one worker: each is scored before the next is made.
        model = federation.personal_model(client)
        predicted_N, labels_N = _predict(model, Subset(pool, rows.tolist()), collate, federation)
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
