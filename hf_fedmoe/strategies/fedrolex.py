"""FedRolex: Alam et al. 2022, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
Algorithm 1. HeteroFL: Diao, Ding and Tarokh 2021, "HeteroFL: Computation and Communication Efficient Federated
Learning for Heterogeneous Clients".
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import AdapterExpert
from ..weights import (
    Payload,
    StateLayout,
    average_held_,
    copy_module,
    fold_scales_,
    fuse_integers,
    narrow_config,
    narrow_layout,
    narrow_model,
    put_held_,
    sub_places,
    take_held,
)
from ..weights.sub_models import Places
from .narrowing import as_whole
from .setting_kinds import check_setting_kinds


@dataclass
class FedRolex(Strategy):
    """
    Weak clients train narrower models: a window of the channels of each layer, which moves on by one in each round.

    Client k has the share `capacities[k % len(capacities)]` of each layer's channels, rounded up; attention heads stay
    whole, and so do the classes. The server takes the plain mean of each element over the participants that hold it.
    A weight between two channels of equally wide layers is held only where one window has both: if every client is
    narrow, some are never trained.

    Running statistics of BatchNorm depend on how many channels are summed: the server has those of the clients of the
    largest capacity, which should be 1. A narrower client is evaluated with its window of the last round and with
    statistics measured on its own training examples.

    Args:
        capacities (`tuple[float]`, *optional*, defaults to `(1, 1/2, 1/4, 1/8, 1/16)`): Of the clients, over and
            over; `(1,)` is FedAvg of clients of one size.
    """

    capacities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    name = "fedrolex"
    compressible = False
    shares_batches = True

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not self.capacities or not all(0 < capacity <= 1 for capacity in self.capacities):
            raise ValueError(
                f"`capacities` is {self.capacities}: give shares above 0 and up to 1, for example (1, 0.5)."
            )

    def shift(self, round_index: int) -> int:
        """Returns where the windows of a round start."""
        return round_index

    def capacity(self, client: int) -> float:
        return self.capacities[client % len(self.capacities)]

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        (module,) = super().server_models(model)
        if isinstance(module, AdapterExpert):
            raise ValueError(f"{type(self).__name__} cuts whole models, `model` is one with an adapter: leave it out.")
        if any(not parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"{type(self).__name__} sends narrower models whole, but `model` has frozen parameters: let all learn."
            )
        for capacity in self.capacities:
            narrow_config(as_whole(module).config, capacity)
        return [module]

    def setup(self, server: Server, num_clients: int) -> None:
        if num_clients < len(self.capacities):
            raise ValueError(
                f"`capacities` has {len(self.capacities)} entries for {num_clients} clients: give each client one, or "
                "fewer that are used over and over."
            )
        for capacity in self.capacities:
            self.narrow_layout(server, capacity)
        server.tensors["round"] = torch.tensor(0)

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        sub, places = self.sub_model(local, task.client, task.round_index)
        received_P = take_held(task.received_P, local.layout, sub.layout, places)
        task.received.weigh(sub.layout)
        payload = sub.train(task.dataset, received_P, task.integers, torch.zeros_like(received_P), task.seed)
        task.out_P.copy_(task.received_P)
        put_held_(task.out_P, payload.row_P, local.layout, sub.layout, places)
        payload.row_P = task.out_P
        return payload, {}

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        config = as_whole(server.worker).config
        places_m = []
        for capacity in map(self.capacity, uploads.clients):
            narrow, shift = self.narrow_layout(server, capacity), self.shift(step.round_index)
            places = sub_places(config, server.layout, narrow, shift, server.bank_SP.device)
            if capacity < max(self.capacities):
                places = {name: place for name, place in places.items() if name not in server.layout.statistics}
            places_m.append(places)
        counts_P = average_held_(server.bank_SP[0], uploads.rows_mP, places_m, server.layout)
        server.integers[0] = fuse_integers(uploads.integers, uploads.weights_m)
        server.tensors["round"].fill_(step.round_index)
        return {"held_share": (counts_P > 0).sum().item() / server.layout.num_elements}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        sub, places = self.sub_model(local, task.client, int(server.tensors["round"]))
        model = sub.load(take_held(task.received_P, local.layout, sub.layout, places), task.integers)
        if self.capacity(task.client) == 1:
            return model
        if sub.layout.batchnorm:
            with local.accelerator.autocast():
                measure_statistics(model, sub.in_order(task.dataset, task.seed))
        own = as_whole(copy_module(model))  # the trainer's own needs its scales in the next round
        fold_scales_(own, as_whole(local.worker))
        return own

    def sub_model(self, local: LocalTrainer, client: int, round_index: int) -> tuple[LocalTrainer, Places]:
        """The trainer of a client's narrower model, and where the model stands in the server's."""
        capacity, model = self.capacity(client), as_whole(local.worker)
        sub = local.of(f"capacity {capacity}", lambda: narrow_model(model, capacity))
        shift, device = self.shift(round_index), local.accelerator.device
        return sub, sub_places(model.config, local.layout, sub.layout, shift, device)

    def narrow_layout(self, server: Server, capacity: float) -> StateLayout:
        layouts = server.cache.setdefault("layouts", {})
        if capacity not in layouts:
            layouts[capacity] = narrow_layout(as_whole(server.worker), capacity)
        return layouts[capacity]


@dataclass
class HeteroFL(FedRolex):
    """[`FedRolex`] whose windows stay at the first channels: what only wide clients hold, only they train."""

    name = "heterofl"

    def shift(self, round_index: int) -> int:
        return 0


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """The running statistics of BatchNorm layers become their means over these batches."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    model.train()
    for batch in batches:
        model(**batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
