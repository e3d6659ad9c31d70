"""IFCA: Ghosh et al. 2020, "An Efficient Framework for Clustered Federated Learning", Algorithm 1, averaging models.

Shape suffixes: K models, one for each cluster, m participants, P elements of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import EnsemblePreTrainedModel
from ..weights import Payload, fuse_integers


@dataclass
class IFCA(Strategy):
    """
    K models, one for each cluster of clients, who find themselves where they belong.

    Each participant is sent all K, takes the one with the least loss on its examples, trains that one, and says which
    it was; the server averages each over those who took it. What nobody took stays. A client is evaluated with the
    model that has the least loss on its training examples, the server's model is the mean of all K's probabilities.

    Models that start too much alike, or one that is better for all, leave the others to nobody: the paper starts from
    several draws and keeps the best. Here all but the first have a head drawn anew.
    """

    name = "ifca"
    trains = "ensemble"
    needs = "fusion"
    compressible = False

    def server_models(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        if not isinstance(model, EnsemblePreTrainedModel):
            raise ValueError(
                f"IFCA trains a model for each cluster, `model` is a {type(model).__name__}: build an ensemble around "
                "it with `EnsembleForSequenceClassification.from_classifier(model, num_models=4)`."
            )
        return list(model.models)

    def download_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        """All models but the first, which travels as the model: rows, and their integer buffers."""
        counts = {
            _of(k, name): tensor
            for k, integers in enumerate(server.integers[1:], start=1)
            for name, tensor in integers.items()
        }
        return {"others_KP": server.bank_SP[1:], **counts}

    def upload_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        return {"cluster": torch.zeros((), dtype=torch.int64)}

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        cluster, num_clusters = int(payload.tensors["cluster"]), len(server.bank_SP)
        return None if 0 <= cluster < num_clusters else f"it trained cluster {cluster}, of {num_clusters}"

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        models_KP = torch.cat([task.received_P[None], task.received.tensors["others_KP"]])
        cluster = local.least_loss(task.dataset, models_KP, task.integers, task.seed)
        integers = task.integers
        if cluster:
            integers = {name: task.received.tensors[_of(cluster, name)] for name in integers}
        payload = local.train(task.dataset, models_KP[cluster], integers, task.out_P, task.seed)
        payload.tensors = {"cluster": torch.tensor(cluster)}
        return payload, {}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        cluster_m = torch.stack([tensors["cluster"] for tensors in uploads.tensors]).to(server.bank_SP.device)
        member_Km = torch.stack([cluster_m == k for k in range(len(server.bank_SP))])
        examples_Km = member_Km * uploads.num_examples_m
        empty_K = ~member_Km.any(1)
        weights_Km = examples_Km / examples_Km.sum(1, keepdim=True).clamp_min(1)
        uploads.fuse_into_(server, weights_Km, empty_K.to(weights_Km))
        for k in (~empty_K).nonzero()[:, 0].tolist():
            server.integers[k] = fuse_integers(uploads.integers, weights_Km[k])
        return {f"cluster_{k}_clients": float(count) for k, count in enumerate(member_Km.sum(1).tolist())}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        cluster = local.least_loss(task.dataset, server.bank_SP, task.integers, task.seed)
        return local.load(server.bank_SP[cluster], server.integers[cluster])


def _of(cluster: int, name: str) -> str:
    """Names an integer buffer of a model beside those of the first."""
    return f"cluster_{cluster}.{name}"
