"""Equalities between methods at the settings where they coincide."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.federation import Stream, seed_of
from hf_fedmoe.strategies import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgAdjusted,
    FedAvgMovingAverage,
    FedAvgReserved,
    FedProx,
    FedYogi,
    Scaffold,
)
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation, tiny_mixture


def run(output_dir, strategy=None, data=None, **changes):
    trainer = FederatedTrainer(
        tiny_expert(), tiny_args(output_dir, **changes), data or tiny_federation(), strategy=strategy
    )
    trainer.train()
    return trainer


class SameOrder(Trainer):
    """The equality is about the training, not about which generator shuffles: each epoch gets the client's order."""

    def __init__(self, *args, epochs, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs = epochs
        # BERT takes `num_items_in_batch` and ignores it, so that Trainer would leave the accumulated loss unscaled.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset=None):
        epochs = iter(self.epochs)

        class Order(torch.utils.data.Sampler):
            def __len__(self):
                return len(train_dataset)

            def __iter__(self):
                return iter(next(epochs))

        return Order()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "weight_decay": 0.1},
        {"num_train_epochs": 1.5, "optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 1},
        {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    ],
)
def test_one_client_and_one_round_of_fedavg_is_a_plain_trainer(tmp_path, settings):
    data = tiny_federation(num_clients=1, client_size=14)
    federated = run(tmp_path, data=data, rounds=1, clients_per_round=1, **settings)
    generator = torch.Generator().manual_seed(seed_of(11, Stream.LOCAL_TRAINING, 0, 0))
    epochs = [torch.randperm(14, generator=generator).tolist() for _ in range(2)]
    plain_args = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **{"num_train_epochs": 1, **settings},
    )
    plain = SameOrder(tiny_expert(), plain_args, train_dataset=data.client(0), epochs=epochs)
    plain.train()
    assert_equal_states(state(federated.model), state(plain.model), atol=1e-7, rtol=0)


def test_fedprox_with_mu_zero_is_fedavg(tmp_path):
    assert_equal_states(
        state(run(tmp_path, FedProx(mu=0.0)).model), state(run(tmp_path, FedAvg()).model), atol=1e-7, rtol=0
    )


def test_fedprox_holds_clients_near_the_start(tmp_path):
    start = state(tiny_expert())

    def distance(model):
        return sum((tensor - start[name]).square().sum() for name, tensor in state(model).items())

    free, held = run(tmp_path, FedProx(mu=0.0)), run(tmp_path, FedProx(mu=10.0))
    assert distance(held.model) < 0.5 * distance(free.model)


@pytest.mark.parametrize(
    "strategy",
    [
        FedAdagrad(server_learning_rate=2e3, tau=1e3),
        FedAdam(server_learning_rate=2.0, beta1=0.0, beta2=1.0, tau=1.0),
        FedYogi(server_learning_rate=2.0, beta1=0.0, beta2=1.0, tau=1.0),
    ],
    ids=lambda strategy: strategy.name,
)
def test_server_optimizers_that_are_not_adaptive_are_fedavg(tmp_path, strategy):
    """
    v stays tau^2, so that the step is eta / (2 tau) of the way to the mean: all of it. (By SGD: AdamW makes the
    rounding of a gradient of 0 as large as any other.)
    """
    settings = {"optim": "sgd", "learning_rate": 0.1}
    averaged = state(run(tmp_path / "fedavg", FedAvg(), **settings).model)
    assert_equal_states(state(run(tmp_path / "own", strategy, **settings).model), averaged, atol=1e-6, rtol=0)


class NoControl(Scaffold):
    """SCAFFOLD whose control variates stay 0."""

    def train_client(self, local, task):
        payload, _ = super().train_client(local, task)
        payload.tensors["control_D"].zero_()
        return payload, {}


def test_scaffold_without_control_variates_is_fedavg(tmp_path):
    averaged = state(run(tmp_path / "fedavg", FedAvg()).model)
    assert_equal_states(state(run(tmp_path / "own", NoControl()).model), averaged)
    # With them the first round is one of FedAvg, the second is not.
    for rounds, equal in ((1, True), (2, False)):
        first, second = (
            state(run(tmp_path / f"{kind.name}{rounds}", kind(), rounds=rounds).model) for kind in (FedAvg, Scaffold)
        )
        assert all(torch.equal(first[name], second[name]) for name in first) == equal


def test_updates_that_are_clipped_to_any_norm_are_those_of_fedavg(tmp_path):
    averaged = state(run(tmp_path / "fedavg", FedAvg()).model)
    clipped = state(run(tmp_path / "clipped", FedAvg(), max_update_norm=float("inf")).model)
    assert_equal_states(clipped, averaged)


def test_moving_average_of_rate_one_is_fedavg(tmp_path):
    averaged = run(tmp_path, FedAvgMovingAverage(rate=1.0))
    assert_equal_states(state(averaged.model), state(run(tmp_path, FedAvg()).model))


def test_clients_of_the_moving_average_are_those_of_fedavg(tmp_path):
    class KeepLastMean(FedAvgMovingAverage):
        def finish(self, server, step):
            self.last = state_of_row(server.layout, server.tensors["mean_P"])

    def state_of_row(layout, row_P):
        return {name: view.clone() for name, view in layout.views(row_P).items()}

    strategy = KeepLastMean(rate=0.3)
    run(tmp_path, strategy)
    assert_equal_states(strategy.last, state(run(tmp_path, FedAvg()).model))


def test_fine_tuning_on_the_reserved_set_for_no_epoch_at_rate_zero_is_fedavg(tmp_path):
    for when in ("round", "end"):
        tuned = run(tmp_path, FedAvgReserved(when=when, learning_rate=0.0))
        assert_equal_states(state(tuned.model), state(run(tmp_path, FedAvg()).model))


def test_adjustment_of_strength_zero_is_fedavg_tuned_at_the_end(tmp_path):
    adjusted = state(run(tmp_path / "adjusted", FedAvgAdjusted(strength=0.0)).model)
    assert_equal_states(adjusted, state(run(tmp_path / "tuned", FedAvgReserved(when="end")).model))


def test_fed_moe_of_identical_clients_is_fedavg_of_them(tmp_path):
    rows = tiny_federation(num_clients=1, client_size=6)
    # Identical clients: the same rows, and one batch, so that the order of the data does not tell them apart.
    clients = [rows.client(0)] * 3
    data = FederatedDataset.from_clients(clients, reserved=rows.reserved, validation=rows.validation)
    # SGD: where a gradient is nearly zero, Adam blows the rounding of a reordered sum up to a whole step.
    settings = dict(rounds=2, clients_per_round=3, per_device_train_batch_size=6, optim="sgd")
    average = run(tmp_path, FedAvg(), data, **settings)
    mixture = FedMoETrainer(
        tiny_mixture(num_routed_experts=3),
        tiny_args(tmp_path, fusion_rate=1.0, final_expert_epochs=0, **settings),
        train_dataset=data,
    )
    mixture.train()
    for expert in mixture.model.experts:
        assert_equal_states(state(expert), state(average.model), atol=1e-6, rtol=0)


def test_main_expert_of_the_default_fed_moe_is_fedavg(tmp_path):
    average = run(tmp_path, FedAvg())
    mixture = FedMoETrainer(
        tiny_mixture(), tiny_args(tmp_path, final_expert_epochs=0), train_dataset=tiny_federation()
    )
    mixture.train()
    assert_equal_states(state(mixture.model.main_experts[0]), state(average.model), atol=1e-6, rtol=0)
