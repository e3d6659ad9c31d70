"""Federated averaging, and the three controls without which no comparison with Fed-MoE is fair.

FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", Algorithm 1.
The controls give FedAvg what Fed-MoE has besides its mixture: the server's reserved set, and a memory of past rounds.
"""

from dataclasses import dataclass

import torch

from ..federation import Server, ServerStep, Strategy, Uploads, warmed_up
from ..weights import fuse_models_
from .narrowing import reserved_of
from .server_training import fine_tune
from .setting_kinds import check_setting_kinds


class FedAvg(Strategy):
    """Every round, the mean of the participants' models, weighted by their examples."""

    name = "fedavg"


@dataclass
class FedAvgReserved(Strategy):
    """
    FedAvg whose server also trains on the reserved set.

    Args:
        when (`str`, *optional*, defaults to `"round"`): `"round"` (after every mean) or `"end"` (after the last).
        epochs (`int`, *optional*, defaults to 1): Passes over the reserved set each time.
        learning_rate (`float`, *optional*, defaults to 1e-4): Of AdamW on the server.
        batch_size (`int`, *optional*, defaults to 32): Reserved examples per step.
    """

    when: str = "round"
    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 32
    name = "fedavg_reserved"
    needs = "mean"

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.when not in ("round", "end"):
            raise ValueError(f'`when` is {self.when!r}: choose "round" or "end".')
        for name in ("epochs", "batch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least 1.")
        if self.learning_rate < 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}: give 0 or more.")

    def needs_reserved_set(self) -> bool:
        return True

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        report = uploads.average_into_(server)
        if self.when == "end":
            return report
        return report | {"reserved_loss": self.fine_tune(server, step)}

    def finish(self, server: Server, step: ServerStep) -> None:
        if self.when == "end":
            self.fine_tune(server, step)

    def fine_tune(self, server: Server, step: ServerStep) -> float:
        """The server's training by itself; returns its mean loss."""
        settings = (self.epochs, self.learning_rate, server.weight_decay, self.batch_size, step.seed)
        return fine_tune(server.model, reserved_of(step), *settings, track=step.track, captured=step.captured)


@dataclass
class FedAvgMovingAverage(Strategy):
    """
    FedAvg that evaluates and saves a moving average of the server's weights; clients still start from the last mean.

    Args:
        rate (`float`, *optional*, defaults to 0.3): Weight of the newest mean, as Fed-MoE's `fusion_rate`.
    """

    rate: float = 0.3
    name = "fedavg_moving_average"
    needs = "mean"
    compressible = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not 0 < self.rate <= 1:
            raise ValueError(f"`rate` is {self.rate}: a moving average needs 0 < rate <= 1.")

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["mean_P"] = server.bank_SP[0].clone()

    def download(self, server: Server, client: int, kept_P: torch.Tensor | None) -> torch.Tensor:
        return server.tensors["mean_P"]

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        average_SP = server.bank_SP.clone()
        server.bank_SP[0].copy_(server.tensors["mean_P"])  # the mean goes on from what the clients received
        report = uploads.average_into_(server)
        server.tensors["mean_P"].copy_(server.bank_SP[0])
        rate_1 = torch.full((1,), warmed_up(self.rate, step.round_index), device=average_SP.device)
        fuse_models_(average_SP, server.bank_SP, rate_1[None], 1 - rate_1, server.layout)
        server.bank_SP.copy_(average_SP)
        return report
