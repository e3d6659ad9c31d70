"""APFL: Deng, Kamani and Mahdavi 2020, "Adaptive Personalized Federated Learning", Algorithm 1."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import ClientTask, Server, Strategy
from .local import kept_or_trained


if TYPE_CHECKING:  # a room above this one
    from ..federation import LocalTrainer
    from ..weights import Payload


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

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` is {self.alpha}: give a share in [0, 1], 0 evaluates w and 1 a local model.")
        if self.alpha_rate <= 0:
            raise ValueError(f"`alpha_rate` is {self.alpha_rate}: give more than 0, or set adapt=False.")

    def train_client(self, local: "LocalTrainer", task: ClientTask) -> "tuple[Payload, dict[str, Tensor]]":
        w, v = local, local.twins(1)[0]
        alpha = task.kept.get("alpha", torch.tensor(self.alpha)).to(task.received_P.device)
        plan = local.plan(task.dataset, task.seed)
        w.begin(task.received_P, task.integers, len(plan), task.kept_optimizer)
        v.begin(task.kept.get("v_P", task.received_P).to(task.received_P.device), task.integers, len(plan))
        of_w, of_v = ({name: p for name, p in model.worker.named_parameters() if p.requires_grad} for model in (w, v))
        alpha_gradient = torch.zeros_like(alpha)

        def mixture_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            share = alpha.clone().requires_grad_(self.adapt)
            v_bar = {name: share * of_v[name] + (1 - share) * of_w[name].detach() for name in of_v}
            loss = functional_call(model, v_bar, kwargs=batch).loss
            if self.adapt:
                scaler = local.accelerator.scaler
                share.register_hook(lambda grad: alpha_gradient.add_(grad / (scaler.get_scale() if scaler else 1)))
            return loss

        total = torch.zeros((), device=alpha.device)
        for batches in local.steps(task.dataset, plan, task.seed):
            batches = list(batches)
            v.step(batches, mixture_loss)  # at the w of this step's beginning
            total += w.step(batches, lambda model, batch: model(**batch).loss)
            if self.adapt:
                alpha = (alpha - self.alpha_rate * alpha_gradient).clamp(0, 1)
                alpha_gradient.zero_()
        payload = w.payload(task.out_P, len(task.dataset), total, len(plan))
        return payload, {"v_P": v.layout.read(v.worker), "alpha": alpha}

    def personal_model(self, server: Server, local: "LocalTrainer", task: ClientTask) -> nn.Module:
        """alpha v + (1 - alpha) w, with today's w."""
        kept = kept_or_trained(self, local, task)
        return local.load(self.mixture(local, kept, task.received_P), task.integers)

    def mixture(self, local: "LocalTrainer", kept: dict[str, Tensor], w_P: Tensor) -> Tensor:
        """v_bar as a row."""
        v_bar_P = kept["v_P"].to(w_P.device, copy=True)
        of_w, of_v_bar = local.layout.views(w_P), local.layout.views(v_bar_P)
        for name, parameter in local.worker.named_parameters():
            if name in of_v_bar and parameter.requires_grad:
                of_v_bar[name].lerp_(of_w[name], 1 - kept["alpha"].to(w_P))
        return v_bar_P
