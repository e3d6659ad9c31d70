"""
pFedMoE: Yi et al. 2024, "pFedMoE: Data-Level Personalization with Mixture of Experts for Model-Heterogeneous
Personalized Federated Learning".
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..federation import ClientTask, LocalTrainer, Server, ServerStep, Strategy, Uploads
from ..models import (
    PairedExpertsConfig,
    PairedExpertsForImageClassification,
    PairedExpertsForSequenceClassification,
    PairedExpertsPreTrainedModel,
    SmallCNNConfig,
    classification_head,
)
from ..weights import Payload, StateLayout
from .fedrep import average_body_into_
from .local import kept_or_trained
from .narrowing import as_whole
from .setting_kinds import check_setting_kinds


@dataclass
class PFedMoE(Strategy):
    """
    Each client has an own extractor F and header, of any architecture, and a gate. The clients share one small
    extractor G, the only part that travels: all of the server's model but its last linear layer. With
    [a_G, a_F] = gate(x) a client classifies by header(a_G G(x) + a_F F(x)), see [`PairedExpertsConfig`]; one loss
    trains all four parts in the same steps. The server averages G.

    The server's model keeps the last layer that it starts with, so that evaluating it says nothing:
    `evaluate_clients` evaluates the clients' models.

    Args:
        client_models (`list[PreTrainedConfig]`): Configurations of the clients' own classifiers, over and over: client
            k has `client_models[k % len(client_models)]`. All start from the run's seed. They are held as `dict`s.
        gate_hidden_size (`int`, *optional*, defaults to 64): Width of the gate's hidden layer.
        gate_input_size (`int`, *optional*): Of images: num_channels * height * width, needed where the configuration
            of the server's model has no `image_size`.
        shared_rate (`float`, *optional*, defaults to 1.0): The learning rate of G as a multiple of that of the
            arguments, which F and the header have.
        gate_rate (`float`, *optional*, defaults to 1.0): That of the gate.
    """

    client_models: list[PreTrainedConfig | dict[str, Any]]
    gate_hidden_size: int = 64
    gate_input_size: int | None = None
    shared_rate: float = 1.0
    gate_rate: float = 1.0
    name = "pfedmoe"
    needs = "mean"

    def __post_init__(self) -> None:
        check_setting_kinds(self)
        if not isinstance(self.client_models, Sequence) or not all(
            isinstance(config, PreTrainedConfig | dict) for config in self.client_models
        ):
            raise ValueError(f"`client_models` is {self.client_models!r}: give a list of configurations of models.")
        if not self.client_models:
            raise ValueError("`client_models` is empty: give the configuration of at least one own model.")
        for name, rate in (("shared_rate", self.shared_rate), ("gate_rate", self.gate_rate)):
            if not 0 <= rate < float("inf"):
                raise ValueError(f"`{name}` is {rate}: give a number of 0 or more.")
        # A checkpoint's identity is written as JSON, and must not change with the version that writes it.
        self.client_models = [
            {key: value for key, value in json.loads(config.to_json_string()).items() if key != "transformers_version"}
            if isinstance(config, PreTrainedConfig)
            else config
            for config in self.client_models
        ]

    def server_models(self, model: PreTrainedModel) -> list[nn.Module]:
        whole = isinstance(model, PreTrainedModel) and all(p.requires_grad for p in model.parameters())
        if not whole or classification_head(model) is None:
            raise ValueError(
                f"pFedMoE shares all but the last linear layer of a model, `model` is a {type(model).__name__} that "
                "has none or is frozen in parts: give a whole classifier, without adapters."
            )
        for index in range(len(self.client_models)):
            self.pair_config(model, index)
        return [model]

    def setup(self, server: Server, num_clients: int) -> None:
        with torch.device("meta"):
            for index in range(len(self.client_models)):
                self.make_pair(as_whole(server.worker), index, seed=0)  # raises where two do not go together

    def pair_config(self, model: PreTrainedModel, index: int) -> PairedExpertsConfig:
        """The configuration of the clients of `client_models[index]` under a server's `model`."""
        return PairedExpertsConfig(
            shared_config=model.config,
            own_config=self.client_models[index],
            gate_hidden_size=self.gate_hidden_size,
            gate_input_size=self.gate_input_size,
        )

    def make_pair(self, model: PreTrainedModel, index: int, seed: int) -> PairedExpertsPreTrainedModel:
        """The start of the clients of `client_models[index]`, but for G: the same bits for one `seed`."""
        images = model.main_input_name == "pixel_values"
        kind = PairedExpertsForImageClassification if images else PairedExpertsForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Configurations of models that were stored in half precision say so.
            pair = kind(self.pair_config(model, index))
            return pair.to(model.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method

    def body(self, layout: StateLayout, model: PreTrainedModel) -> set[str]:
        """Names of the tensors of G in the server's model."""
        head = classification_head(model)
        names = {slot.name for slot in layout.slots} | set(layout.integers)
        return {name for name in names if not name.startswith(f"{head}.")}

    def shared(self, server: Server, round_index: int) -> set[str]:
        return self.body(server.layout, as_whole(server.worker))

    def learning_rate_factors(self, model: nn.Module) -> dict[str, float]:
        if not isinstance(model, PairedExpertsPreTrainedModel):
            return {}
        rates = {"shared": self.shared_rate, "gate": self.gate_rate}
        return {name: rates.get(name.split(".")[0], 1.0) for name, _ in model.named_parameters()}

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        pair, row_P, integers = self._pair(local, task, task.kept)
        trained = pair.train(task.dataset, row_P, integers, row_P, task.seed)
        state = pair.layout.views(row_P) | trained.integers
        task.out_P.copy_(task.received_P)
        views, counts = local.layout.views(task.out_P), dict(task.integers)
        for name in self.body(local.layout, as_whole(local.worker)):
            if name in views:
                views[name].copy_(state[f"shared.{name}"])
            else:
                counts[name] = state[f"shared.{name}"]
        retained = {name: tensor.clone() for name, tensor in state.items() if not name.startswith("shared.")}
        return Payload(task.out_P, counts, trained.num_examples, trained.metrics), retained

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        names = {slot.name for slot in server.layout.slots}
        average_body_into_(server, uploads, names - self.shared(server, step.round_index))
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        pair, row_P, integers = self._pair(local, task, kept_or_trained(self, local, task))
        return pair.load(row_P, integers)

    def _pair(
        self, local: LocalTrainer, task: ClientTask, kept: dict[str, Tensor]
    ) -> tuple[LocalTrainer, Tensor, dict[str, Tensor]]:
        """The client's trainer, and its model with the received G as a row and integers."""
        index = task.client % len(self.client_models)

        def make() -> PairedExpertsPreTrainedModel:
            return self.make_pair(as_whole(local.worker), index, local.args.seed)

        pair = local.of(str(index), make)
        state = dict(kept or make().state_dict())
        for name, tensor in (local.layout.views(task.received_P) | task.integers).items():
            state[f"shared.{name}"] = tensor
        row_P = torch.zeros(pair.layout.size, dtype=pair.layout.dtype, device=task.received_P.device)
        for name, view in pair.layout.views(row_P).items():
            view.copy_(state[name])
        return pair, row_P, {name: state[name] for name in pair.layout.integers}


def pfedmoe_cnns(num_labels: int = 10, image_size: int = 32, num_channels: int = 3) -> list[SmallCNNConfig]:
    """
    Configurations of the paper's five client models, CNN-1 to CNN-5 (2.6 to 0.7 million parameters). The body of the
    last is its shared extractor.

    Args:
        num_labels (`int`, *optional*, defaults to 10): Number of classes.
        image_size (`int`, *optional*, defaults to 32): Height and width of the images.
        num_channels (`int`, *optional*, defaults to 3): Their colour channels.
    """
    sizes = [((16, 32), 2000), ((16, 16), 2000), ((16, 32), 1000), ((16, 32), 800), ((16, 32), 500)]
    return [
        SmallCNNConfig(  # type: ignore[call-arg]  # `num_labels` is one that transformers takes without a field
            num_labels=num_labels,
            image_size=image_size,
            num_channels=num_channels,
            padding=0,
            channels=channels,
            hidden_size=(hidden_size, 500),
        )
        for channels, hidden_size in sizes
    ]
