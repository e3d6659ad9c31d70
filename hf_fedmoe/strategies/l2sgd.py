"""L2SGD: Hanzely and Richtárik 2020, "Federated Learning of a Mixture of Global and Local Models", Algorithm 1."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..weights import Payload
from .mixing import mix_, move_global_
from .setting_kinds import check_setting_kinds


@dataclass
class L2SGD(Strategy):
    """
    Each client has a model x_c of its own. A coin decides on each round: with probability `mixing_probability` the
    participants' models move towards their mean, weighted by examples, x_c <- (1 - a) x_c + a mean(x), otherwise each
    trains by itself and nothing travels. The server's model is the last mean.

    Args:
        mixing_probability (`float`, *optional*, defaults to 0.5): p.
        pull (`float`, *optional*, defaults to 0.5): a.
        coin_seed (`int`, *optional*, defaults to 0): Seed of the coin.
    """

    mixing_probability: float = 0.5
    pull: float = 0.5
    coin_seed: int = 0
    name = "l2sgd"
    # A client's own model, which an update would be measured from, is unknown to the server.
    compressible = False
    keeps_optimizer = True
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        for name in ("mixing_probability", "pull"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a number in [0, 1], 0 never mixes.")

    def mixes(self, round_index: int) -> bool:
        """The coin of a round; clients and server find the same."""
        return bool(np.random.default_rng((self.coin_seed, round_index)).random() < self.mixing_probability)

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["start_P"] = server.bank_SP[0].clone()

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        return server.tensors["start_P"] if kept_P is None else kept_P

    def shared(self, server: Server, round_index: int) -> frozenset[str] | None:
        return None if self.mixes(round_index) else frozenset()

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        if self.mixes(task.round_index):
            # No step, but the optimizer is this client's.
            local.begin(task.received_P, task.integers, 1, task.kept_optimizer)
            loss = local.mean_loss(task.dataset, task.received_P, task.integers, task.seed)
            return local.payload(task.out_P, len(task.dataset), torch.tensor(loss), 1), {}
        payload, _ = super().train_client(local, task)
        return payload, {"row_P": payload.row_P.clone()}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        server.cache["mixed"] = self.mixes(step.round_index)
        if server.cache["mixed"]:
            move_global_(server, uploads, uploads.weights_m)
        return {"mixed": float(server.cache["mixed"])}

    def synchronise(self, server: Server, uploads: Uploads) -> dict[int, Tensor]:
        if not server.cache["mixed"]:
            return {}
        rows_mP = uploads.rows_mP.clone()
        mix_(server, rows_mP, server.bank_SP[:1], rows_mP.new_full((len(rows_mP), 1), self.pull))
        return dict(zip(uploads.clients, rows_mP, strict=True))

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        if "row_P" in task.kept:
            return local.load(task.kept["row_P"], task.integers)
        # One that never took part starts from the last mean.
        local.train(task.dataset, task.received_P, task.integers, task.out_P, task.seed)
        return local.worker
