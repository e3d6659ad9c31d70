"""
SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1.

Shape suffix: D elements of the parameters that clients train.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..weights import Payload


# The name of c on its way down, of the change of c_i on its way up, and of c_i where it stays with a client.
CONTROL = "control_D"


class Scaffold(Strategy):
    """
    Client i corrects each of its gradients g by c - c_i, what the gradients of all are more than its own, so that it
    does not drift to its own optimum. Its control variate c_i is the mean of its gradients of the last round that it
    took part in, zero before; c is the mean of all clients' c_i, weighted by examples as the models are.

    Of the paper's two options for c_i this is the second, c_i - c + (x - y_i) / (K eta), which for plain SGD is the
    mean of the gradients that were taken on the way; as that mean it serves any optimizer and schedule. The server's
    step is the mean of the models (eta_g = 1).

    It sends and keeps as many numbers again as clients train, and cannot be trained with `fp16=True`.
    """

    name = "scaffold"
    keeps_optimizer = True
    shares_batches = True
    needs = "mean"

    def check_arguments(self, args: TrainingArguments) -> None:
        if args.fp16:
            raise ValueError("`fp16` is True, which scales the gradients that SCAFFOLD compares: choose `bf16=True`.")
        for name in ("max_update_norm", "max_update_norm_ratio", "robust_fusion"):
            if (value := vars(args).get(name)) is not None:
                raise ValueError(
                    f"`{name}` is {value!r}, but control variates move the server too, and are no updates: leave it "
                    "out."
                )

    def setup(self, server: Server, num_clients: int) -> None:
        sizes = [parameter.numel() for parameter in server.worker.parameters() if parameter.requires_grad]
        server.tensors[CONTROL] = server.bank_SP.new_zeros(sum(sizes))

    def download_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        return {CONTROL: server.tensors[CONTROL]}

    def upload_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        return {CONTROL: server.tensors[CONTROL]}

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        c_D = task.received.tensors[CONTROL]
        own_D = task.kept.get(CONTROL, torch.zeros_like(c_D)).to(c_D.device)
        mean_D, correction_D = torch.zeros_like(c_D), c_D - own_D
        plan, loss = local.plan(task.dataset, task.seed), local.loss_near(task.received_P)
        local.begin(task.received_P, task.integers, len(plan), task.kept_optimizer)
        total = torch.zeros((), device=c_D.device)
        for batches in local.steps(task.dataset, plan, task.seed):
            total += local.backward(batches, loss)
            for gradient, mean, correction in by_parameter(local.worker, mean_D, correction_D):
                mean.add_(gradient, alpha=1 / len(plan))
                gradient.add_(correction)
            local.apply_gradients()
        payload = local.payload(task.out_P, len(task.dataset), total, len(plan))
        payload.tensors[CONTROL] = len(task.dataset) * (mean_D - own_D)
        return payload, {CONTROL: mean_D}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        report = uploads.average_into_(server)
        # Those who did not take part keep their c_i, and with it their part of c.
        server.tensors[CONTROL].add_(uploads.sum_of(CONTROL), alpha=1 / server.num_examples)
        return report | {"control_norm": server.tensors[CONTROL].norm().item()}


def by_parameter(model: nn.Module, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Gives the gradient of each parameter that has one, with the parts of vectors `[D]` that belong to it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, *parts in zip(parameters, *(vector.split(sizes) for vector in vectors), strict=True):
        if parameter.grad is not None:
            yield parameter.grad, *(part.view_as(parameter) for part in parts)
