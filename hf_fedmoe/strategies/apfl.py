"""APFL: Deng, Kamani and Mahdavi 2020, "Adaptive Personalized Federated Learning", Algorithm 1."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, StepBatches, Strategy
from ..weights import Payload
from .local import kept_or_trained
from .setting_kinds import check_setting_kinds


@dataclass
class APFL(Strategy):
    """
    Each client trains the global model w and, in the same steps, a model v of its own by the gradient of the mixture
    v_bar = alpha v + (1 - alpha) w, which it uses. Only w travels.

    Running statistics are no weights: the mixture has those of v, which it fills itself. The optimizer of v is fresh
    in each round.

    Args:
        alpha (`float`, *optional*, defaults to 0.5): Share of v in the mixture, where it starts if it adapts.
        adapt (`bool`, *optional*, defaults to `False`): Whether each client moves its own alpha down its gradient,
            <v - w, gradient at v_bar>, in every step.
        alpha_rate (`float`, *optional*, defaults to 0.1): Learning rate of alpha.
    """

    alpha: float = 0.5
    adapt: bool = False
    alpha_rate: float = 0.1
    name = "apfl"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` is {self.alpha}: give a share in [0, 1], 0 evaluates w and 1 a local model.")
        if self.alpha_rate <= 0:
            raise ValueError(f"`alpha_rate` is {self.alpha_rate}: give more than 0, or set adapt=False.")

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        w, v = local, local.twins(1)[0]
        device = task.received_P.device
        alpha = task.kept.get("alpha", torch.tensor(self.alpha)).to(device)
        plan = local.plan(task.dataset, task.seed)
        w.begin(task.received_P, task.integers, len(plan), task.kept_optimizer)
        v.begin(task.kept.get("v_P", task.received_P).to(device), task.integers, len(plan))
        total = torch.zeros((), device=device)
        for batches in local.steps(task.dataset, plan, task.seed):
            batches = batches.kept()
            alpha = self._step_of_v(v, w, alpha, batches)  # at the w of this step's beginning
            total += w.step(batches, w.objective)
        payload = w.payload(task.out_P, len(task.dataset), total, len(plan))
        return payload, {"v_P": v.layout.read(v.worker), "alpha": alpha}

    def _step_of_v(self, v: LocalTrainer, w: LocalTrainer, alpha: Tensor, batches: StepBatches) -> Tensor:
        """v <- v - eta alpha g with g the gradient at v_bar, of which d v_bar / d v = alpha; returns the new alpha."""
        of_w = dict(w.worker.named_parameters())
        of_v = {name: p for name, p in v.worker.named_parameters() if p.requires_grad}
        own = {name: parameter.detach().clone() for name, parameter in of_v.items()}
        with torch.no_grad():
            for name, parameter in of_v.items():
                parameter.lerp_(of_w[name], (1 - alpha).to(parameter))
        v.backward(batches, v.objective)
        slope = torch.zeros_like(alpha)
        with torch.no_grad():
            for name, parameter in of_v.items():
                if parameter.grad is not None:
                    slope += ((own[name] - of_w[name]) * parameter.grad).sum(dtype=alpha.dtype)
                    parameter.grad.mul_(alpha.to(parameter))
                parameter.copy_(own[name])
        v.apply_gradients()
        if not self.adapt:
            return alpha
        scaler = v.accelerator.scaler
        return (alpha - self.alpha_rate * slope / (scaler.get_scale() if scaler else 1)).clamp(0, 1)

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        """alpha v + (1 - alpha) w, with today's w."""
        kept = kept_or_trained(self, local, task)
        return local.load(self.mixture(local, kept, task.received_P), task.integers)

    def mixture(self, local: LocalTrainer, kept: dict[str, Tensor], w_P: Tensor) -> Tensor:
        """v_bar as a row."""
        v_bar_P = kept["v_P"].to(w_P.device, copy=True)
        of_w, of_v_bar = local.layout.views(w_P), local.layout.views(v_bar_P)
        for name, parameter in local.worker.named_parameters():
            if name in of_v_bar and parameter.requires_grad:
                of_v_bar[name].lerp_(of_w[name], 1 - kept["alpha"].to(w_P))
        return v_bar_P
