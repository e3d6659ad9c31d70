"""Defences in whole runs: the limits in which they are nothing, what they hold off, and what cannot be had."""

import pytest
import torch

from hf_fedmoe.federation import ROBUST_FUSIONS
from hf_fedmoe.strategies import QFFL, Decentralised, FedAvg, FedMoE, FedMoESettings, Scaffold, Strategy
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.run_facts import run_facts
from tests.every_method import image_model, lora
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation, tiny_mixture
from tests.tiny_images import tiny_image_federation, tiny_processor


NUM_CLIENTS = 5


def trainer(folder, strategy, model=None, peft_config=None, **changes) -> FederatedTrainer:
    settings = {"rounds": 1, "clients_per_round": NUM_CLIENTS, "num_train_epochs": 0.3}
    args = tiny_args(folder, **settings | changes)
    data = tiny_federation(NUM_CLIENTS)
    return FederatedTrainer(model or tiny_expert(), args, data, strategy=strategy, peft_config=peft_config)


def run(folder, strategy, model=None, peft_config=None, **changes) -> FederatedTrainer:
    done = trainer(folder, strategy, model, peft_config, **changes)
    done.train()
    return done


def fedmoe(**settings) -> FedMoE:
    return FedMoE(FedMoESettings(final_expert_epochs=0, **settings))


class Flipped(FedAvg):
    """Client 0 sends the start less ten times its update."""

    def train_client(self, local, task):
        payload, kept = super().train_client(local, task)
        if task.client == 0:
            payload.row_P.copy_(task.received_P - 10 * (payload.row_P - task.received_P))
        return payload, kept


class FlippedFedMoE(FedMoE):
    def train_client(self, local, task):
        return Flipped().train_client(local, task)


def test_krum_with_nobody_hostile_is_fedavg_to_the_bit(tmp_path):
    plain = run(tmp_path / "plain", FedAvg())
    krum = run(tmp_path / "krum", FedAvg(), robust_fusion="multi_krum", expected_attackers=0.0)
    assert_equal_states(state(krum.model), state(plain.model))
    ratio = run(tmp_path / "ratio", FedAvg(), max_update_norm_ratio=1e6)
    assert_equal_states(state(ratio.model), state(plain.model))
    assert ratio.rounds[0].metrics == {"shortened_updates": 0.0}


@pytest.mark.parametrize("method", ["fedavg", "fedmoe"])
def test_trimming_nothing_is_the_mean_but_for_rounding(method, tmp_path):
    def make(name, **changes):
        strategy, model = (FedAvg(), tiny_expert()) if method == "fedavg" else (fedmoe(gate_epochs=0), tiny_mixture())
        return state(run(tmp_path / name, strategy, model, **changes).model)

    trimmed = make("trimmed", robust_fusion="trimmed_mean", expected_attackers=0.0)
    assert_equal_states(trimmed, make("plain"), rtol=1e-5, atol=1e-6)
    median = make("median", robust_fusion="median")
    assert any(not torch.allclose(median[name], trimmed[name], atol=1e-4) for name in median)


def apart(first, second):
    """The distance between the models of two runs."""
    first, second = state(first.model), state(second.model)
    return sum((first[name] - second[name]).square().sum().item() for name in first) ** 0.5


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Runs with a flipped client, by defence, and how far they end from one in which all are honest."""
    folder = tmp_path_factory.mktemp("moved")
    honest = run(folder / "honest", FedAvg())

    def flipped(name, **changes):
        done = run(folder / name, Flipped(), expected_attackers=0.2, **changes)
        return apart(done, honest), done

    defences = {name: {"robust_fusion": name} for name in ROBUST_FUSIONS} | {"ratio": {"max_update_norm_ratio": 1.0}}
    return {name: flipped(name, **changes) for name, changes in {"undefended": {}, **defences}.items()}


@pytest.mark.parametrize("name", [*ROBUST_FUSIONS, "ratio"])
def test_one_flipped_client_of_five_moves_the_server_far_less(name, moved):
    assert 0 < moved[name][0] < 0.5 * moved["undefended"][0]


def test_who_is_dropped_is_refused_with_the_reason(moved):
    [report] = moved["multi_krum"][1].rounds
    assert list(report.refused) == [0] and report.refused[0].startswith("its update is too far from the others': Kr")
    assert report.num_examples == 48
    assert len(moved["krum"][1].rounds[0].refused) == 4
    assert moved["ratio"][1].rounds[0].metrics["shortened_updates"] >= 1.0


def test_each_expert_has_its_own_location(tmp_path):
    """A hostile client that would take the experts with it does not, whatever rows of W it wins."""
    settings = FedMoESettings(final_expert_epochs=0, gate_epochs=0, download_epochs=0)
    honest = run(tmp_path / "honest", FedMoE(settings), tiny_mixture())
    undefended = run(tmp_path / "none", FlippedFedMoE(settings), tiny_mixture())
    defended = run(tmp_path / "median", FlippedFedMoE(settings), tiny_mixture(), robust_fusion="geometric_median")
    assert 0 < apart(defended, honest) < 0.5 * apart(undefended, honest)


@pytest.mark.parametrize("name", ROBUST_FUSIONS)
@pytest.mark.parametrize("method", ["fedavg", "fedmoe"])
def test_models_with_running_statistics_stay_sound(method, name, tmp_path):
    args = tiny_args(tmp_path, rounds=1, clients_per_round=NUM_CLIENTS, robust_fusion=name, max_update_norm_ratio=1.0)
    strategy: Strategy = FedAvg() if method == "fedavg" else fedmoe(gate_epochs=1)
    data, processor = tiny_image_federation(NUM_CLIENTS), tiny_processor()
    done = FederatedTrainer(image_model(method), args, data, strategy, processing_class=processor)
    done.train()
    assert done.state.global_step == 1


@pytest.mark.parametrize(
    ("fusion", "changes"),
    [
        ("svd", {"robust_fusion": "geometric_median"}),
        ("svd", {"robust_fusion": "multi_krum", "expected_attackers": 0.1}),
        ("ffa", {"robust_fusion": "median"}),
        ("factors", {"robust_fusion": "trimmed_mean", "max_update_norm_ratio": 1.0}),
    ],
)
def test_adapters_are_fused_robustly_where_that_means_something(fusion, changes, tmp_path):
    assert run(tmp_path, FedAvg(), peft_config=lora(), lora_fusion=fusion, **changes).state.global_step == 1


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (FedAvg, {"robust_fusion": "mean"}, "`robust_fusion` is 'mean': choose one of 'median', 'trimmed_mean', 'ge"),
        (FedAvg, {"expected_attackers": 0.5}, "`expected_attackers` is 0.5: give a share of 0 or more, below a half"),
        (FedAvg, {"max_update_norm_ratio": 0.5}, "`max_update_norm_ratio` is 0.5: give 1 or more"),
        (
            FedAvg,
            {"robust_fusion": "median", "client_parallelism": "sums"},
            "`robust_fusion` is 'median', which compares single uploads, but with `client_parallelism` = 'sums'",
        ),
        (
            FedAvg,
            {"max_update_norm_ratio": 2.0, "client_parallelism": "sums"},
            "`max_update_norm_ratio` is 2.0, which compares single uploads",
        ),
        (QFFL, {"robust_fusion": "median"}, "`robust_fusion` is 'median', but 'qffl' fuses uploads by itself"),
        (
            Decentralised,
            {"max_update_norm_ratio": 2.0},
            "`max_update_norm_ratio` is 2.0, but in 'decentralised' no receiver knows the model",
        ),
        (
            FedAvg,
            {"robust_fusion": "krum", "expected_attackers": 0.3},
            r"of `clients_per_round` = 5 with `expected_attackers` = 0.3 there may be f = 2 hostile, for which Krum "
            r"needs 2 f \+ 3 = 7 clients",
        ),
        (Scaffold, {"robust_fusion": "median"}, "`robust_fusion` is 'median', but control variates move the server"),
        (Scaffold, {"max_update_norm_ratio": 2.0}, "`max_update_norm_ratio` is 2.0, but control variates"),
    ],
)
def test_what_cannot_be_had_is_refused_before_training(make, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, make(), **changes)


def test_products_have_no_entries(tmp_path):
    message = "`robust_fusion` is 'median', which takes each entry by itself, but with `lora_fusion` = 'svd'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FedAvg(), peft_config=lora(), robust_fusion="median")
    with pytest.raises(
        ValueError, match=r"`client_ranks` is \[2\] and `robust_fusion` is 'krum': only one of them at a"
    ):
        trainer(tmp_path, FedAvg(), peft_config=lora(), robust_fusion="krum", client_ranks=[2])


def test_the_card_tells_the_defences_that_are_set(tmp_path):
    done = trainer(tmp_path, FedAvg(), robust_fusion="median", max_update_norm_ratio=3.0)
    facts = run_facts(done.args, done.strategy, {}, done.federated_dataset, done.state, [])
    assert facts.settings == {"max_update_norm_ratio": 3.0, "robust_fusion": "median", "expected_attackers": 0.2}
    done = trainer(tmp_path, FedAvg())
    assert run_facts(done.args, done.strategy, {}, done.federated_dataset, done.state, []).settings == {}
