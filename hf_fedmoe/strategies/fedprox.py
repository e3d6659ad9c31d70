"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2."""

from dataclasses import dataclass

from torch import Tensor, nn

from .base import Strategy


@dataclass
class FedProx(Strategy):
    """
    FedAvg whose clients are held near the model they received: h(w) = F(w) + mu / 2 ||w - w_received||^2.

    Args:
        mu (`float`, *optional*, defaults to 0.1): Strength of the proximal term; 0 is FedAvg.
    """

    mu: float = 0.1
    name = "fedprox"
    shares_batches = True

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise ValueError(f"`mu` is {self.mu}: the proximal term needs mu >= 0 (0 is FedAvg).")

    @property
    def pull(self) -> float:
        return self.mu

    def loss(self, model: nn.Module, batch: dict[str, Tensor], received: dict[str, Tensor]) -> Tensor:
        distance = sum(
            (parameter - received[name]).square().sum()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
        return model(**batch).loss + self.mu / 2 * distance


def has_plain_clients(strategy: Strategy) -> bool:
    """Tells whether clients only train, by the model's own loss and [`Strategy.pull`]: whoever computes them may."""
    kind = type(strategy)
    return kind.train_client is Strategy.train_client and kind.loss in (Strategy.loss, FedProx.loss)
