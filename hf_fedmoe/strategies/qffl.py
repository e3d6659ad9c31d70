"""q-FFL: Li et al. 2020, "Fair Resource Allocation in Federated Learning", Algorithm 2 (q-FedAvg)."""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..weights import Payload
from .mixing import fault_of_reports, move_global_, parameter_rows
from .setting_kinds import check_setting_kinds


@dataclass
class QFFL(Strategy):
    """
    Clients with a high loss weigh more, and the step adapts to how far they moved: with eta the local learning rate, F
    a client's loss at the received model w, and w_c its trained model, w <- w - sum_c delta_c / sum_c h_c, where
    delta_c = F^q (w - w_c) / eta and h_c = q F^(q - 1) ||(w - w_c) / eta||^2 + F^q / eta.

    Args:
        q (`float`, *optional*, defaults to 1.0): How much fairness counts; 0 is the unweighted mean.
    """

    q: float = 1.0
    name = "qffl"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not 0 <= self.q < float("inf"):
            raise ValueError(f"`q` is {self.q}: give 0 (the mean of the clients) or more, and no infinity.")

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        start_loss = local.mean_loss(task.dataset, task.received_P, task.integers, task.seed)
        payload, kept = super().train_client(local, task)
        payload.metrics |= {"start_loss": start_loss, "learning_rate": local.args.learning_rate}
        return payload, kept

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """Refuses reports by which the step cannot be weighed."""
        if fault := fault_of_reports(payload, "start_loss", "learning_rate"):
            return fault
        rate = payload.metrics["learning_rate"]
        return f"it reports learning_rate = {rate}, where 0 or more is due" if rate < 0 else None

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        eta = median(metrics["learning_rate"] for metrics in uploads.metrics)  # one for all but for who lies
        losses = [metrics["start_loss"] for metrics in uploads.metrics]
        # A loss of 0 to a negative power would be infinite.
        F_m = torch.tensor(losses, dtype=torch.float64).clamp_min(1e-10)
        moved_mU = parameter_rows(server, uploads.rows_mP) - parameter_rows(server, server.bank_SP[:1])
        square_m = moved_mU.square().sum(1).double().cpu()
        # All in units of the largest loss to the power of q, which could overflow.
        share_m, largest = F_m / F_m.max(), F_m.max()
        # All times eta: at a learning rate of 0 nobody moves, and the second term alone is left.
        h_m = share_m**self.q + (self.q * share_m ** (self.q - 1) / largest * square_m / eta if eta else 0)
        # A weighted mean of w and the w_c: the weights of the w_c sum to at most 1.
        weights_m = share_m**self.q / h_m.sum()
        move_global_(server, uploads, weights_m.to(server.bank_SP))
        return {"qffl_step": weights_m.sum().item(), "worst_start_loss": F_m.max().item()}
