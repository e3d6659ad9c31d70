"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2."""

from dataclasses import dataclass

from ..federation import Strategy
from .setting_kinds import check_setting_kinds


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
        check_setting_kinds(self)
        if self.mu < 0:
            raise ValueError(f"`mu` is {self.mu}: the proximal term needs mu >= 0 (0 is FedAvg).")

    @property
    def proximal_weight(self) -> float:
        return self.mu
