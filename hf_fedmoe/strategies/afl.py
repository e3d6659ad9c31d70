"""AFL: Mohri, Sivek and Suresh 2019, "Agnostic Federated Learning"."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..weights import Payload
from .mixing import fault_of_reports, move_global_
from .setting_kinds import check_setting_kinds


@dataclass
class AFL(Strategy):
    """
    The global model is trained for the worst mixture lambda of the clients: the server steps along sum_c lambda_c g_c,
    and lambda goes up the clients' losses, projected to the simplex.

    g_c is the client's local training, w - w_c: with one SGD step on all its examples this is the gradient of the
    paper. Of a round's participants lambda is divided by its sum over them.

    Args:
        lambda_rate (`float`, *optional*, defaults to 0.1): Learning rate of lambda; 0 keeps it uniform.
    """

    lambda_rate: float = 0.1
    name = "afl"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.lambda_rate < 0:
            raise ValueError(f"`lambda_rate` is {self.lambda_rate}: lambda goes up the losses, give 0 or more.")

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["lambda_M"] = torch.full((num_clients,), 1 / num_clients, dtype=torch.float64)

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        start_loss = local.mean_loss(task.dataset, task.received_P, task.integers, task.seed)
        payload, kept = super().train_client(local, task)
        payload.metrics["start_loss"] = start_loss
        return payload, kept

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """Refuses reports by which clients cannot be weighed."""
        return fault_of_reports(payload, "start_loss")

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        lambda_M = server.tensors["lambda_M"]
        lambda_m = lambda_M[uploads.clients]
        # Participants who weigh nothing teach the server nothing.
        if lambda_m.sum() > 0:
            move_global_(server, uploads, (lambda_m / lambda_m.sum()).to(server.bank_SP))
        losses = [metrics["start_loss"] for metrics in uploads.metrics]
        losses_m = torch.tensor(losses, dtype=lambda_M.dtype, device=lambda_M.device)
        lambda_M[uploads.clients] += self.lambda_rate * losses_m
        lambda_M.copy_(project_to_simplex(lambda_M))
        return {"lambda_max": lambda_M.max().item(), "worst_start_loss": losses_m.max().item()}


def project_to_simplex(point_M: Tensor) -> Tensor:
    """The nearest point with entries of 0 or more that sum to 1 (Duchi et al. 2008, Figure 1)."""
    # The same for all changes nothing, and beside one that is huge a 1 would be lost.
    point_M = point_M - point_M.max()
    sorted_M = point_M.sort(descending=True).values
    excess_M = (sorted_M.cumsum(0) - 1) / torch.arange(1, len(point_M) + 1, device=point_M.device)
    threshold = excess_M[(sorted_M > excess_M).nonzero().max()]
    return (point_M - threshold).clamp_min(0)
