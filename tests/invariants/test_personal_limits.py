"""Equalities between personalised methods and simpler ones at the settings where they coincide."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.federation import LocalTrainer
from hf_fedmoe.strategies import (
    AFL,
    APFL,
    L2SGD,
    QFFL,
    ClusteredFL,
    Decentralised,
    FedAvg,
    FedAvgPlus,
    FedEM,
    FedRep,
    FedRolex,
    HeteroFL,
    Local,
    PFedMe,
    PFedMM,
)
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_federation,
    tiny_multi_head,
)


SGD = dict(optim="sgd", learning_rate=0.1)


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    """Several methods end like it."""
    return run(tmp_path_factory.mktemp("fedavg"), FedAvg())


@pytest.fixture(scope="module")
def fedavg_by_sgd(tmp_path_factory):
    # SGD: where a gradient is nearly zero, Adam blows the rounding of a reordered sum up to a whole step.
    return run(tmp_path_factory.mktemp("fedavg_by_sgd"), FedAvg(), **SGD)


@pytest.fixture(scope="module")
def local_of_everybody(tmp_path_factory):
    return run(tmp_path_factory.mktemp("local"), Local(), clients_per_round=4)


def run(output_dir, strategy, data=None, **changes):
    # A run whose clients keep something has its folder for as long as its trainer lives.
    output_dir = Path(output_dir, type(strategy).__name__)
    trainer = FederatedTrainer(
        tiny_expert(), tiny_args(output_dir, **changes), data or tiny_federation(), strategy=strategy
    )
    trainer.train()
    return trainer


def kept(trainer) -> list[dict[str, torch.Tensor]]:
    """Returns what stays with each client after the run."""
    store = trainer._federation_of_the_last_round().store
    return [store.get(client) for client in range(trainer.federated_dataset.num_clients)]


def assert_rows_are(trainer, rows, model, **tolerance):
    views = trainer._federation_of_the_last_round().server.layout.views
    for row_P in rows:
        assert_equal_states(views(row_P), {name: state(model)[name] for name in views(row_P)}, **tolerance)


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvgPlus(),
        FedRep(head=()),
        PFedMe(penalty=4.0, outer_rate=0.25, inner_steps=1, beta=1.0),
        APFL(alpha=0.3),
        APFL(alpha=0.3, adapt=True),
        ClusteredFL(eps1=0.0),
    ],
    ids=lambda strategy: strategy.name,
)
def test_global_models_that_are_those_of_fedavg_bitwise(tmp_path, strategy, fedavg):
    assert_equal_states(state(run(tmp_path, strategy).model), state(fedavg.model))


@pytest.mark.parametrize(
    "strategy",
    [QFFL(q=0.0), AFL(lambda_rate=0.0), L2SGD(mixing_probability=0.0)],
    ids=lambda strategy: strategy.name,
)
def test_one_round_of_a_federation_of_one_is_local_training(tmp_path, strategy):
    data = tiny_federation(num_clients=1)
    settings = dict(rounds=1, clients_per_round=1)
    fedavg = run(tmp_path, FedAvg(), data, **settings)
    other = run(tmp_path, strategy, data, **settings)
    rows = [client["row_P"] for client in kept(other)] if strategy.name == "l2sgd" else []
    if rows:
        assert_rows_are(other, rows, fedavg.model)
    else:
        assert_equal_states(state(other.model), state(fedavg.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", [QFFL(q=0.0), AFL(lambda_rate=0.0)], ids=lambda strategy: strategy.name)
def test_fairness_that_is_switched_off_is_fedavg_of_clients_of_one_size(tmp_path, strategy, fedavg_by_sgd):
    fair = run(tmp_path, strategy, **SGD)
    assert_equal_states(state(fair.model), state(fedavg_by_sgd.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", [FedRolex((1.0,)), HeteroFL((1.0,))], ids=lambda strategy: strategy.name)
def test_clients_of_full_capacity_are_fedavg_of_clients_of_one_size(tmp_path, strategy, fedavg_by_sgd):
    wide, plain = run(tmp_path, strategy, **SGD), fedavg_by_sgd
    assert_equal_states(state(wide.model), state(plain.model), atol=1e-6, rtol=0)
    assert [report.bytes_up for report in wide.rounds] == [report.bytes_up for report in plain.rounds]


def test_local_is_fedavg_of_one_client(tmp_path):
    data = tiny_federation(num_clients=1)
    fedavg, local = (run(tmp_path, strategy, data, clients_per_round=1) for strategy in (FedAvg(), Local()))
    assert_rows_are(local, [kept(local)[0]["row_P"]], fedavg.model)
    assert_equal_states(state(local.model), state(tiny_expert()))


@pytest.mark.parametrize(("strategy", "start"), [(FedEM, tiny_ensemble), (PFedMM, tiny_multi_head)])
def test_with_nobody_absent_the_absent_do_not_count(tmp_path, strategy, start):
    sizes = [0, 12, 20, 24, 40]
    rows = tiny_federation().pool
    clients = [range(begin, end) for begin, end in pairwise(sizes)]
    results = {}
    for per_round in (4, 2):
        for include_absent in (False, True):
            args = tiny_args(tmp_path / f"{per_round}{include_absent}", rounds=2, clients_per_round=per_round)
            data = FederatedDataset(rows, clients)
            run = FederatedTrainer(start(), args, data, strategy=strategy(include_absent=include_absent))
            run.train()
            results[per_round, include_absent] = state(run.model)
    assert_equal_states(results[4, True], results[4, False])
    name = "models.0.classifier.weight"
    begin = state(start())[name]
    steps = [(results[2, absent][name] - begin).norm() for absent in (True, False)]
    assert 0 < steps[0] < 0.8 * steps[1]


def test_fedem_of_one_model_is_fedavg(tmp_path, fedavg_by_sgd):
    args = tiny_args(tmp_path / "fedem", **SGD)
    fedem = FederatedTrainer(tiny_ensemble(num_models=1), args, tiny_federation(), strategy=FedEM())
    fedem.train()
    assert_equal_states(state(fedem.model.models[0]), state(fedavg_by_sgd.model), atol=1e-6, rtol=0)


def test_pfedmm_of_one_head_is_fedavg(tmp_path, fedavg_by_sgd):
    args = tiny_args(tmp_path / "pfedmm", **SGD)
    pfedmm = FederatedTrainer(tiny_multi_head(num_heads=1), args, tiny_federation(), strategy=PFedMM())
    pfedmm.train()
    fedavg = fedavg_by_sgd.model
    assert_equal_states(state(pfedmm.model.backbone), state(fedavg.bert), atol=1e-6, rtol=0)
    assert_equal_states(state(pfedmm.model.models[0].classifier), state(fedavg.classifier), atol=1e-6, rtol=0)


def test_apfl_of_share_one_is_local_and_of_share_zero_has_no_model_but_w(tmp_path, local_of_everybody):
    only_v, only_w = (run(tmp_path / str(alpha), APFL(alpha=alpha), clients_per_round=4) for alpha in (1.0, 0.0))
    for mine, theirs in zip(kept(only_v), kept(local_of_everybody), strict=True):
        assert torch.equal(mine["v_P"], theirs["row_P"])
    federation = only_w._federation_of_the_last_round()
    for client in range(4):
        assert_equal_states(state(federation.personal_model(client)), state(only_w.model))


@pytest.mark.parametrize("strategy", [L2SGD(mixing_probability=0.0), L2SGD(mixing_probability=0.5, pull=0.0)])
def test_l2sgd_without_mixing_is_local(tmp_path, strategy):
    mixing = [strategy.mixes(round_index) for round_index in range(4)]
    assert strategy.mixing_probability == 0 or 0 < sum(mixing) < 4
    mixed = run(tmp_path / "mixed", strategy, rounds=4, clients_per_round=4)
    local_rounds = [report for report, mixes in zip(mixed.rounds, mixing, strict=True) if not mixes]
    assert all(report.bytes_up == report.bytes_down == 0 for report in local_rounds)

    class SkipRounds(Local):
        """Local training in the rounds in which the coin leaves clients alone."""

        def train_client(self, local, task):
            if not mixing[task.round_index]:
                return super().train_client(local, task)
            local.begin(task.received_P, task.integers, 1)
            payload = local.payload(task.out_P, len(task.dataset), torch.zeros(()), 1)
            return payload, {"row_P": task.received_P.clone()}

    local = run(tmp_path / "local", SkipRounds(), rounds=4, clients_per_round=4)
    for mine, theirs in zip(kept(mixed), kept(local), strict=True):
        torch.testing.assert_close(mine["row_P"], theirs["row_P"], atol=0, rtol=0)


def test_l2sgd_that_always_mixes_fully_keeps_the_common_start(tmp_path):
    mixed = run(tmp_path, L2SGD(mixing_probability=1.0, pull=1.0), clients_per_round=4)
    assert_equal_states(state(mixed.model), state(tiny_expert()), atol=1e-6, rtol=0)
    assert_rows_are(mixed, [client["row_P"] for client in kept(mixed)], mixed.model)


def test_everybody_linked_to_everybody_is_fedavg(tmp_path):
    settings = dict(clients_per_round=4, optim="sgd", learning_rate=0.1)
    linked = run(tmp_path / "linked", Decentralised(edge_probability=1.0), **settings)
    fedavg = run(tmp_path / "fedavg", FedAvg(), **settings)
    assert_equal_states(state(linked.model), state(fedavg.model), atol=1e-6, rtol=0)
    assert_rows_are(linked, [client["row_P"] for client in kept(linked)], fedavg.model, atol=1e-6, rtol=0)


def test_fedavg_plus_evaluates_what_local_training_of_the_global_model_gives(tmp_path, monkeypatch):
    trainer = run(tmp_path, FedAvgPlus())
    before, epochs, train = state(trainer.model), [], LocalTrainer.train

    def watched(self, *args, **kwargs):
        epochs.append(kwargs["epochs"])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "train", watched)
    federation = trainer._federation_of_the_last_round()
    tuned = [state(federation.personal_model(client)) for client in (0, 0, 1)]
    assert_equal_states(tuned[0], tuned[1])
    assert not torch.equal(tuned[0]["classifier.weight"], tuned[2]["classifier.weight"])
    assert_equal_states(state(trainer.model), before)
    assert epochs == [1.0] * 3
