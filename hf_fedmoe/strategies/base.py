"""The hooks in which federated methods differ. Everything else about a round is in `hf_fedmoe.federation`.

Shape suffixes: m participants of a round, P elements of a model's row, S rows of the server.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import ReservedSet
from ..models import as_expert
from ..weights import StateLayout, fuse_integers, fuse_models_


@dataclass
class Server:
    """
    What the server holds between rounds.

    Args:
        model ([`~transformers.PreTrainedModel`]): What is evaluated, saved and pushed.
        worker (`nn.Module`): One client model on the training device: clients train in it, the server probes with it.
        layout ([`StateLayout`]): Of a client model.
        bank_SP (`Tensor` of shape `[S, P]`): The server's models as rows. `model`'s tensors are views of them.
        integers (`list[dict[str, Tensor]]`): Integer buffers of each row.
        tensors (`dict[str, Tensor]`): Whatever else the strategy must find again after a resume.
        weight_decay (`float`): Of every optimizer that runs on the server, as on the clients.
        cache (`dict[str, Any]`): What the strategy can compute again; gone after a resume.
    """

    model: PreTrainedModel
    worker: nn.Module
    layout: StateLayout
    bank_SP: Tensor
    integers: list[dict[str, Tensor]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight_decay: float = 0.0
    cache: dict[str, Any] = field(default_factory=dict)


@dataclass
class Uploads:
    """
    The sound uploads of one round.

    Args:
        clients (`list[int]`): The participants, in the order of the draw.
        rows_mP (`Tensor` of shape `[m, P]`): Their models.
        integers (`list[dict[str, Tensor]]`): Their integer buffers.
        num_examples_m (`Tensor` of shape `[m]`): Their training examples.
    """

    clients: list[int]
    rows_mP: Tensor
    integers: list[dict[str, Tensor]]
    num_examples_m: Tensor

    @property
    def weights_m(self) -> Tensor:
        """n_c / sum(n)."""
        return self.num_examples_m / self.num_examples_m.sum()


class Strategy:
    """
    A federated method. This base class is plain federated averaging; a method overrides the hooks in which it differs.

    A strategy keeps no state of its own between rounds: what must survive a resume goes into `server.tensors`.
    """

    name: str = "fedavg"

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        """The modules that become the rows of the server's bank; clients have the architecture of the first."""
        return [as_expert(model)]

    def setup(self, server: Server, num_clients: int) -> None:
        """Called once before the first round (not after a resume): fills `server.tensors`."""

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        """
        The row `[P]` that `client` starts from. `kept_P` is what [`Strategy.synchronise`] left with the client after
        its last round, `None` if it never took part.
        """
        return server.bank_SP[0]

    def loss(self, model: nn.Module, batch: dict[str, Tensor], received: dict[str, Tensor]) -> Tensor:
        """The local objective on one batch; `received` holds the downloaded parameters by name."""
        return model(**batch).loss

    def update(
        self, server: Server, uploads: Uploads, reserved: ReservedSet | None, round_index: int, seed: int
    ) -> dict[str, float]:
        """The server's step: changes `server` in place and returns what is worth logging."""
        return average_into_(server, uploads)

    def finish(self, server: Server, reserved: ReservedSet | None, seed: int) -> None:
        """Called once after the last round."""

    def synchronise(self, server: Server, uploads: Uploads) -> dict[int, Tensor]:
        """Rows `[P]` that stay with the participants until their next round; by default nothing stays."""
        return {}

    def needs_reserved_set(self) -> bool:
        """Whether [`Strategy.update`] or [`Strategy.finish`] reads the reserved set."""
        return False


def average_into_(server: Server, uploads: Uploads) -> dict[str, float]:
    """bank[0] <- sum_c n_c / n M_c (McMahan et al. 2017, Algorithm 1), and what there is to log of it."""
    keep_S = torch.zeros(1, device=server.bank_SP.device)
    lost_S = fuse_models_(server.bank_SP[:1], uploads.rows_mP, uploads.weights_m[None], keep_S, server.layout)
    server.integers[0] = fuse_integers(uploads.integers, uploads.weights_m)
    return {"discarded_energy": lost_S.item()} if server.layout.lora else {}


def warmed_up(rate: float, round_index: int) -> float:
    """
    The rate of a moving average in round `round_index` (from 0): a plain running mean until its horizon is filled, so
    that the common start, which no client has trained, has no part in it.
    """
    return max(rate, 1 / (round_index + 1))
