"""FedAvg+: FedAvg whose model is fine-tuned at each client before it is used.

Jiang et al. 2019, "Improving Federated Learning Personalization via Model Agnostic Meta Learning".
"""

from dataclasses import dataclass

from torch import nn

from ..federation import ClientTask, LocalTrainer, Server, Strategy
from .setting_kinds import check_setting_kinds


@dataclass
class FedAvgPlus(Strategy):
    """
    FedAvg; what is evaluated for a client is a copy of the global model tuned on the client's training examples.

    Args:
        tuning_epochs (`float`, *optional*, defaults to 1.0): Local epochs of that tuning.
    """

    tuning_epochs: float = 1.0
    name = "fedavg_plus"

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if self.tuning_epochs <= 0:
            raise ValueError(
                f"`tuning_epochs` is {self.tuning_epochs}: give more than 0; `FedAvg` is the method without tuning."
            )

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        local.train(task.dataset, task.received_P, task.integers, task.out_P, task.seed, epochs=self.tuning_epochs)
        return local.worker
