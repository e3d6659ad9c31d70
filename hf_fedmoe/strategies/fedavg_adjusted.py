"""
FedAvg whose clients allow for how many of each class they have: a control where clients lack classes.

Menon et al. 2021, "Long-tail learning via logit adjustment", Eq. 10, with each client's own proportions of classes, as
in Zhang et al. 2022, "Federated Learning with Label Distribution Skew via Logits Calibration", which has powers of
the counts in the place of logarithms.

Shape suffixes: N examples of a client, B batch, C classes.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..federation import ClientTask, LocalTrainer
from ..weights import Payload
from .fedavg import FedAvgReserved


# Of a class that a client has no example of, as if it had a millionth of one.
ABSENT = 1e-6


@dataclass
class FedAvgAdjusted(FedAvgReserved):
    """
    [`FedAvgReserved`] whose clients train on the cross-entropy of their scores plus `strength` times the logarithm of
    their proportions of classes. What is frequent at a client then needs no high score of its own, and scores of what
    it lacks are left alone.

    Args:
        when (`str`, *optional*, defaults to `"end"`): When the server trains on the reserved set: `"round"` or
            `"end"`.
        epochs (`int`), learning_rate (`float`), batch_size (`int`), *optional*: As in [`FedAvgReserved`].
        strength (`float`, *optional*, defaults to 1.0): tau of the paper; 0 is [`FedAvgReserved`].
    """

    when: str = "end"
    strength: float = 1.0
    name = "fedavg_adjusted"
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"`strength` is {self.strength}: give 0 or more.")

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        labels_N = torch.cat([batch["labels"] for batch in local.in_order(task.dataset, task.seed)])

        @cache
        def adjustment(num_classes: int) -> Tensor:
            count_C = torch.bincount(labels_N, minlength=num_classes).float().clamp_min(ABSENT)
            return self.strength * count_C.log()

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            logits_BC = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
            return cross_entropy(logits_BC + adjustment(logits_BC.shape[1]), batch["labels"])

        args = (task.dataset, task.received_P, task.integers, task.out_P, task.seed, task.kept_optimizer)
        return local.train(*args, loss=loss), {}
