"""Nobody moves, so nothing moves: at a learning rate of 0, whatever is remembered from round to round stays still."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fedmoe.federation import Federation
from hf_fedmoe.federation.local_updates import OPTIMIZER_PREFIX
from hf_fedmoe.strategies import (
    APFL,
    QFFL,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgMovingAverage,
    FedAvgReserved,
    FedMoE,
    FedMoEGroups,
    FedMoESettings,
    FedYogi,
    Server,
    Strategy,
    Uploads,
)
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.adapters import add_adapter
from hf_fedmoe.weights import COMPRESSIONS, StateLayout
from tests.every_method import METHODS
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation, tiny_mixture


ROUNDS, CLIENTS = 3, 2
FUSIONS = ("svd", "ffa", "factors")
# Everything that has a rate of its own is set to 0 here, or has nothing to go along.
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg_reserved": lambda: FedAvgReserved(learning_rate=0.0),
    "fedmoe": lambda: FedMoE(FedMoESettings(gate_epochs=0, final_expert_epochs=0)),
    "fedmoe_groups": lambda: FedMoEGroups(calibrates=False),
    # The rounding of a new basis is multiplied by eta / tau.
    "fedadagrad": lambda: FedAdagrad(tau=0.1),
    "fedadam": lambda: FedAdam(tau=0.1),
    "fedyogi": lambda: FedYogi(tau=0.1),
    "apfl": lambda: APFL(adapt=True),  # alpha goes along v - w, which is 0
}
# What moves all the same, of the server and of the clients: none of it is a weight.
BOOKS = {
    "fedadam": {"v_P"},  # forgets where it began
    "afl": {"lambda_M"},  # goes up the losses
    "fedmoe": {"contribution_SM", "mixture_SM"},  # whose uploads an expert consists of, however equal they are
    # The E-step has no learning rate: pi moves, and with it the weights of the gradients that the optimizer sees.
    # Gradients, of whatever size the steps are, and with their corrections what the optimizer sees.
    "scaffold": {"control_D", "exp_avg", "exp_avg_sq"},
    # Clients of whom the server learns, and its gate, which knows the groups that they make.
    "fedmoe_groups": {"contribution_SM", "group_M", "count_MC", "sum_MCd", "gram_dd", "scatter_Mdd"}
    | {"gate.classifier.weight", "gate_bias_N", "input_distance"},
    "fedem": {"pi_M", "exp_avg", "exp_avg_sq"},
    "pfedmm": {"pi_M", "exp_avg", "exp_avg_sq"},
    "fedrolex": {"round"},
    "pfedmoe": {"running_mean", "running_var", "num_batches_tracked"},  # statistics of the batches seen
}


def everything_kept(strategy: Strategy) -> dict[str, Any]:
    """Settings under which as much as the method allows is remembered."""
    found = {"keep_client_optimizer": True} if strategy.keeps_optimizer else {}
    return found | ({"upload_compression": "top_k"} if strategy.compressible else {})


@torch.no_grad()
def trained_elsewhere(model: nn.Module, scale: float = 0.5, rank: int = 4) -> nn.Module:
    """Gives all adapters one B of that rank and of another size than A: nothing about them is balanced."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B" in name:
            generator = torch.Generator().manual_seed(len(parameter))
            mixed_rr = torch.randn(rank, parameter.shape[1], generator=generator)
            parameter.copy_(scale * torch.randn(len(parameter), rank, generator=generator) @ mixed_rr)
    return model


def with_adapter(model: PreTrainedModel, config: PeftConfig | None = None) -> PeftModel:
    torch.manual_seed(2)
    return add_adapter(model, config or LoraConfig(r=4))


def federation_of(tmp_path, model: nn.Module, strategy: Strategy, **changes: Any) -> Federation:
    # One batch is all that a client has: its gradient is the same in every round.
    data = tiny_federation(CLIENTS, client_size=4)
    args = tiny_args(tmp_path, **{"learning_rate": 0.0, "clients_per_round": CLIENTS} | changes)
    federation = FederatedTrainer(model, args, data, strategy)._federation()
    strategy.setup(federation.server, CLIENTS)
    return federation


def remembered(federation: Federation) -> dict[str, Tensor]:
    """The model, the server's tensors and all that clients keep; moments of optimizers without their bias."""
    found = {f"model.{name}": tensor for name, tensor in state(federation.server.model).items()}
    found |= {f"server.{name}": tensor.clone() for name, tensor in federation.server.tensors.items()}
    for client in range(CLIENTS):
        kept = federation.store.get(client)
        for name, tensor in kept.items():
            if name.startswith(OPTIMIZER_PREFIX):
                if name.endswith(".step"):
                    continue
                beta = 0.9 if name.endswith(".exp_avg") else 0.999
                tensor = tensor / (1 - beta ** kept[name.rpartition(".")[0] + ".step"])
            found[f"client {client}.{name}"] = tensor
    return found


def assert_nothing_moves(federation: Federation) -> dict[str, Tensor]:
    """Runs the rounds; what is there once has to stay, but for the books of the method."""
    books = BOOKS.get(federation.strategy.name, BOOKS["fedrolex"])
    seen = remembered(federation)
    for round_index in range(ROUNDS):
        report = federation.run_round(round_index, CLIENTS)
        assert not report.refused
        found = remembered(federation)
        assert seen.keys() <= found.keys()
        for name, tensor in seen.items():
            if not name.endswith(tuple(f".{book}" for book in books)):
                size = 1.0 if name.endswith("exp_avg_sq") else tensor.double().abs().max().clamp_min(1).item()
                torch.testing.assert_close(
                    found[name], tensor, rtol=0, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
                )
        seen = found | seen
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_whole_models(tmp_path, name):
    strategy = STRATEGIES.get(name, METHODS[name].strategy)()
    federation = federation_of(tmp_path, METHODS[name].model(), strategy, **everything_kept(strategy))
    seen = assert_nothing_moves(federation)
    assert any("exp_avg" in key for key in seen) == strategy.keeps_optimizer
    uploads = strategy.shared(federation.server, 1) != set()
    assert any("residual" in key for key in seen) == (strategy.compressible and uploads)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.adapters])
def test_adapters(tmp_path, name, fusion):
    strategy = STRATEGIES.get(name, METHODS[name].strategy)()
    model = trained_elsewhere(with_adapter(METHODS[name].model()))
    changes = everything_kept(strategy)
    assert_nothing_moves(federation_of(tmp_path, model, strategy, lora_fusion=fusion, **changes))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_uploads_of_every_code(tmp_path, compression, fusion):
    model = trained_elsewhere(with_adapter(tiny_expert()))
    assert_nothing_moves(federation_of(tmp_path, model, FedAvg(), lora_fusion=fusion, upload_compression=compression))


@pytest.mark.parametrize(
    "settings, fusion",
    [
        ({"server_iterations": 2}, "svd"),
        ({"synchronisation": "download_mixture"}, "svd"),
        ({"synchronisation": "download_mixture", "main_fusion_rate": 0.3}, "factors"),
        ({"preset": "paper", "gate_epochs": 0}, "svd"),
        ({"preset": "paper", "gate_epochs": 0}, "factors"),
        ({"synchronisation": "none"}, "svd"),
        ({"main_fusion_rate": 0.3}, "ffa"),
    ],
)
def test_mixtures_of_adapters(tmp_path, settings, fusion):
    model = trained_elsewhere(tiny_mixture(peft_config=LoraConfig(r=4)))
    strategy = FedMoE(FedMoESettings(**{"gate_epochs": 0, "final_expert_epochs": 0} | settings))
    changes = everything_kept(strategy)
    assert_nothing_moves(federation_of(tmp_path, model, strategy, lora_fusion=fusion, **changes))


@pytest.mark.parametrize("strategy", [FedAvg, QFFL, lambda: FedMoE(FedMoESettings(preset="paper", gate_epochs=0))])
@pytest.mark.parametrize("start", [0, 2])
def test_clients_of_smaller_ranks(tmp_path, start, strategy):
    """
    Takes adapters that the smallest rank holds whole. What narrow clients leave out of others is missing in their
    uploads, so that it fades by their share: that is no standstill.
    """
    strategy, config = strategy(), LoraConfig(r=4)
    model = with_adapter(tiny_expert(), config) if strategy.name != "fedmoe" else tiny_mixture(peft_config=config)
    trained_elsewhere(model, rank=start)
    changes = {"client_ranks": [4, 2], "keep_client_optimizer": True}
    assert_nothing_moves(federation_of(tmp_path, model, strategy, **changes))


@pytest.mark.parametrize("config", [LoraConfig(r=4, target_modules=["word_embeddings", "query"]), IA3Config()])
def test_other_adapters(tmp_path, config):
    model = trained_elsewhere(with_adapter(tiny_expert(), config))
    strategy = FedAvgMovingAverage()
    changes = everything_kept(strategy)
    assert_nothing_moves(federation_of(tmp_path, model, strategy, **changes))


@dataclass
class Momentum(FedAvg):
    """The worked example of docs/strategies.md."""

    momentum: float = 0.9
    still_a: bool = False
    needs = "rows"

    def setup(self, server: Server, num_clients: int) -> None:
        server.tensors["velocity_P"] = torch.zeros_like(server.bank_SP[0])

    def learning_rate_factors(self, model: nn.Module) -> dict[str, float]:
        return {name: 0.0 for name, _ in model.named_parameters() if self.still_a and ".lora_A." in name}

    def update(self, server: Server, uploads: Uploads, *rest: Any) -> dict[str, float]:
        row_P, velocity_P = server.bank_SP[0], server.tensors["velocity_P"]
        before_P = row_P.clone()
        uploads.average_into_(server)
        row_P.add_(velocity_P, alpha=self.momentum)
        velocity_P.copy_(row_P - before_P)
        return {"velocity_norm": velocity_P.norm().item()}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_momentum_of_the_server(tmp_path, scale, fusion):
    model = trained_elsewhere(with_adapter(tiny_expert()), scale)
    seen = assert_nothing_moves(federation_of(tmp_path, model, Momentum(), lora_fusion=fusion))
    assert not seen["server.velocity_P"].any()


def test_momentum_of_products_is_that_of_b_where_a_stays(tmp_path):
    """From PEFT's start on: FFA-LoRA averages B exactly, and its entries have one meaning."""
    ends = []
    for fusion in ("svd", "ffa"):
        strategy = Momentum(still_a=fusion == "svd")
        model = with_adapter(tiny_expert())
        # Clipping would count the gradient of A.
        changes = dict(learning_rate=1e-2, max_grad_norm=0.0, lora_fusion=fusion, keep_client_optimizer=True)
        federation = federation_of(tmp_path / fusion, model, strategy, **changes)
        reports = [federation.run_round(round_index, CLIENTS) for round_index in range(4)]
        ends.append((state(model), [report.metrics["velocity_norm"] for report in reports]))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert_equal_states(ends[0][0], ends[1][0], atol=1e-5, rtol=0)


def test_what_top_k_holds_back_means_the_same_a_round_later(tmp_path):
    """As a change of B A; in another basis it pointed anywhere."""
    received: list[dict[int, Tensor]] = []

    class Watch(FedAvg):
        def train_client(self, local, task):
            received[-1][task.client] = task.received_P.clone()
            return super().train_client(local, task)

    model = with_adapter(tiny_expert())
    changes = dict(learning_rate=1e-2, upload_compression="top_k", top_k_share=0.1)
    federation = federation_of(tmp_path, model, Watch(), **changes)
    layout, cosines = federation.server.layout, []
    for round_index in range(5):
        received.append({})
        held_back = {client: federation.store.get(client).get("residual_U") for client in range(CLIENTS)}
        federation.run_round(round_index, CLIENTS)
        for client, residual_U in held_back.items():
            if residual_U is not None:
                then, now = (meant(layout, received[place][client], residual_U) for place in (-2, -1))
                cosines += torch.cosine_similarity(then, now, dim=1).tolist()
    assert len(cosines) == 4 * CLIENTS * len(layout.lora) and min(cosines) > 0.95


def meant(layout: StateLayout, row_P: Tensor, residual_U: Tensor) -> Tensor:
    """Returns what a residual would change of each product B A of a row, a row for each."""
    moved_P = row_P.clone()
    views = layout.views(moved_P)
    for view, part in zip(views.values(), residual_U.split([view.numel() for view in views.values()]), strict=True):
        view += part.view_as(view)
    products = [
        torch.stack([(v[B.name] @ v[A.name]).flatten() for A, B in layout.lora]) for v in (views, layout.views(row_P))
    ]
    return products[0] - products[1]
