"""FedAdagrad, FedYogi, FedAdam: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..federation import Server, ServerStep, Strategy, Uploads
from .setting_kinds import check_setting_kinds


@dataclass
class FedAdagrad(Strategy):
    """
    The server takes the way from its model x to the clients' mean for a gradient, of an optimizer of its own:
    delta <- beta1 delta + (1 - beta1) (mean - x), v <- v + (mean - x)^2, x <- x + eta delta / (sqrt(v) + tau).

    Running statistics of normalisation layers are averaged as ever. All is entry by entry, adapters' entries too.

    Args:
        server_learning_rate (`float`, *optional*, defaults to 0.01): eta: about how far an entry can go in a round.
        beta1 (`float`, *optional*, defaults to 0.0): Of the running mean of the way, in [0, 1).
        tau (`float`, *optional*, defaults to 0.001): How adaptive it is, above 0; the larger, the less. v begins at
            tau^2.
    """

    server_learning_rate: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3
    name = "fedadagrad"
    needs = "mean"

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.server_learning_rate < 0:
            raise ValueError(f"`server_learning_rate` is {self.server_learning_rate}: give 0 or more.")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"`beta1` is {self.beta1}: a running mean needs 0 <= beta1 < 1.")
        if self.tau <= 0:
            raise ValueError(f"`tau` is {self.tau}: the step is divided by at least tau, give more than 0.")

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["delta_P"] = torch.zeros_like(server.bank_SP[0])
        server.tensors["v_P"] = torch.full_like(server.bank_SP[0], self.tau**2)

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        before_P = server.bank_SP[0].clone()
        report = uploads.average_into_(server)
        rows_P = (server.bank_SP[0], before_P, server.tensors["delta_P"], server.tensors["v_P"])
        named = [server.layout.views(row_P) for row_P in rows_P]
        squares = torch.zeros((), device=before_P.device)
        for name, _ in server.worker.named_parameters():
            if name not in named[0]:  # frozen: nobody sends it
                continue
            x, start, delta, v = (tensors[name] for tensors in named)
            way = x - start  # x is the clients' mean by now
            self.second_moment_(v, way.square())
            delta.lerp_(way, 1 - self.beta1)
            x.copy_(start + self.server_learning_rate * delta / (v.sqrt() + self.tau))
            squares += (x - start).square().sum()
        return report | {"server_step_norm": squares.sqrt().item()}

    def second_moment_(self, v: Tensor, squares: Tensor) -> None:
        """Takes the squares of a round into v, in place."""
        v.add_(squares)


@dataclass
class FedAdam(FedAdagrad):
    """
    [`FedAdagrad`] with v <- beta2 v + (1 - beta2) (mean - x)^2.

    Args:
        server_learning_rate, beta1, tau (*optional*): As in [`FedAdagrad`], but that `beta1` defaults to 0.9.
        beta2 (`float`, *optional*, defaults to 0.99): Of v, in [0, 1]; at 1 it stays what it was.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    name = "fedadam"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta2 <= 1:
            raise ValueError(f"`beta2` is {self.beta2}: give 0 to 1.")

    def second_moment_(self, v: Tensor, squares: Tensor) -> None:
        v.lerp_(squares, 1 - self.beta2)


@dataclass
class FedYogi(FedAdam):
    """[`FedAdam`] with v <- v - (1 - beta2) (mean - x)^2 sign(v - (mean - x)^2), which forgets more slowly."""

    name = "fedyogi"

    def second_moment_(self, v: Tensor, squares: Tensor) -> None:
        v.sub_((1 - self.beta2) * squares * (v - squares).sign())
