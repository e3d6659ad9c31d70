"""pFedMe: Dinh, Tran and Nguyen 2020, "Personalized Federated Learning with Moreau Envelopes", Algorithm 1."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads, held_near
from ..weights import Payload
from .local import kept_or_trained
from .mixing import move_global_
from .setting_kinds import check_setting_kinds


@dataclass
class PFedMe(Strategy):
    """
    Each client has a personal model theta near its local copy w of the global one: per batch, some steps of the
    optimizer bring theta near argmin F(theta) + lambda / 2 ||theta - w||^2, and then w <- w - eta lambda (w - theta).

    theta begins a round at the received w, and each batch where the last one left it.

    Args:
        penalty (`float`, *optional*, defaults to 15.0): lambda.
        inner_steps (`int`, *optional*, defaults to 5): Steps of the optimizer on each batch, K.
        outer_rate (`float`, *optional*, defaults to 0.02): eta; the share `outer_rate * penalty` of the way from w to
            theta that w goes must not exceed 1.
        beta (`float`, *optional*, defaults to 1.0): The server's model becomes (1 - beta) of itself and beta of the
            clients' mean, in which all count alike.
    """

    penalty: float = 15.0
    inner_steps: int = 5
    outer_rate: float = 0.02
    beta: float = 1.0
    name = "pfedme"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.penalty <= 0:
            raise ValueError(f"`penalty` is {self.penalty}: theta is held near w by a penalty above 0.")
        if self.inner_steps < 1:
            raise ValueError(f"`inner_steps` is {self.inner_steps}: give at least 1.")
        if not 0 < self.outer_rate * self.penalty <= 1:
            raise ValueError(
                f"`outer_rate` is {self.outer_rate}: w goes the share outer_rate * penalty = "
                f"{self.outer_rate * self.penalty:g} of the way to theta, which must lie in (0, 1]."
            )
        if not 0 < self.beta <= 1:
            raise ValueError(f"`beta` is {self.beta}: give a share in (0, 1], 1 takes the clients' mean.")

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        w_P = task.received_P.clone()
        w = local.layout.views(w_P)

        def loss(theta: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return local.objective(theta, batch) + held_near(theta, w, self.penalty)

        plan = local.plan(task.dataset, task.seed)
        local.begin(task.received_P, task.integers, self.inner_steps * len(plan), task.kept_optimizer)
        total = torch.zeros((), device=w_P.device)
        for batches in local.steps(task.dataset, plan, task.seed):
            batches = batches.kept()
            for _ in range(self.inner_steps):
                total += local.step(batches, loss)
            # A weight in [0, 1]: running statistics stay those of a moving average.
            w_P.lerp_(local.layout.read(local.worker, out=task.out_P), self.outer_rate * self.penalty)
        payload = local.payload(task.out_P, len(task.dataset), total, self.inner_steps * len(plan))
        theta_P = payload.row_P.clone()
        payload.row_P.copy_(w_P)
        return payload, {"theta_P": theta_P}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        """w <- (1 - beta) w + beta / m sum_c w_c."""
        share = self.beta / len(uploads.clients)
        move_global_(server, uploads, torch.full_like(uploads.weights_m, share))
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        return local.load(kept_or_trained(self, local, task)["theta_P"], task.integers)
