"""Personalised methods in whole runs: what they learn, how clients are evaluated."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from hf_fedmoe.federation import client_store
from hf_fedmoe.models import (
    EnsembleForSequenceClassification,
)
from hf_fedmoe.strategies import (
    APFL,
    L2SGD,
    ClusteredFL,
    FedAvg,
    FedAvgPlus,
    FedEM,
    FedRep,
    Local,
    PFedMe,
    PFedMM,
)
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.every_method import METHODS, trained
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_multi_head,
    tiny_rows,
)


def two_kinds(num_clients: int = 6, size: int = 40) -> FederatedDataset:
    """Clients of even number have the labels as they are, those of odd number each the next one."""
    rows = tiny_rows(num_clients * size)
    clients = np.split(np.arange(len(rows)), num_clients)
    labels = np.array(rows["label"])
    odd = np.concatenate(clients[1::2])
    labels[odd] = (labels[odd] + 1) % 3
    rows = rows.remove_columns("label").add_column("label", labels.tolist())
    return hold_out_client_tests(FederatedDataset(rows, clients, num_labels=3), test_share=0.3)


def run_of_two_kinds(output_dir, strategy):
    settings = dict(rounds=5, clients_per_round=6, per_device_train_batch_size=7, num_train_epochs=2)
    trainer = FederatedTrainer(tiny_expert(), tiny_args(output_dir, **settings), two_kinds(), strategy=strategy)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def accuracy_of_one_global_model(tmp_path_factory):
    trainer = run_of_two_kinds(tmp_path_factory.mktemp("fedavg"), FedAvg())
    return trainer.evaluate_clients()["clients_accuracy"]


@pytest.mark.parametrize(
    "strategy",
    [
        Local(),
        FedAvgPlus(),
        FedRep(),
        PFedMe(penalty=0.5, outer_rate=1.0, inner_steps=2),
        APFL(alpha=0.9),
        ClusteredFL(eps1=0.6, eps2=0.8, min_size=3),
    ],
    ids=lambda strategy: strategy.name,
)
def test_personal_models_learn_what_one_global_model_cannot(tmp_path, strategy, accuracy_of_one_global_model):
    trainer = run_of_two_kinds(tmp_path, strategy)
    assert trainer.evaluate_clients()["clients_accuracy"] > accuracy_of_one_global_model + 0.1
    if strategy.name == "clustered":
        found = trainer._federation_of_the_last_round().server.tensors["cluster_M"]
        assert found.tolist() == [0, 1, 0, 1, 0, 1]


def test_clients_are_evaluated_after_a_file_of_one_could_not_be_written(tmp_path, monkeypatch):
    whole = run_of_two_kinds(tmp_path / "whole", Local())
    calls, write = [], client_store.save_file

    def last_fails(*arguments):
        calls.append(1)
        if len(calls) == 5 * 6:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(client_store, "save_file", last_fails)
    settings = dict(rounds=5, clients_per_round=6, per_device_train_batch_size=7, num_train_epochs=2)
    run = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "full", **settings), two_kinds(), strategy=Local())
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert run.evaluate_clients()["clients_accuracy"] == whole.evaluate_clients()["clients_accuracy"]


def test_fedem_finds_which_client_has_which_labels(tmp_path):
    data, settings = two_kinds(), dict(per_device_train_batch_size=7, learning_rate=5e-3)
    even = FederatedDataset(data.pool, data.client_indices[::2], num_labels=3)
    first = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "first", rounds=10, **settings), even)
    first.train()
    # From equal models EM may stay where it is: one leans to either kind.
    ensemble = EnsembleForSequenceClassification.from_classifier(first.model, num_models=2)
    with torch.no_grad():
        ensemble.models[1].load_state_dict(ensemble.models[0].state_dict())
        ensemble.models[1].classifier.weight.copy_(ensemble.models[0].classifier.weight.roll(1, dims=0))
        ensemble.models[1].classifier.bias.copy_(ensemble.models[0].classifier.bias.roll(1, dims=0))
    args = tiny_args(tmp_path / "fedem", rounds=6, clients_per_round=6, **settings)
    trainer = FederatedTrainer(ensemble, args, data, strategy=FedEM())
    trainer.train()
    store = trainer._federation_of_the_last_round().store
    share = [store.get(client)["pi_M"][0].item() for client in range(6)]
    assert min(share[::2]) > 0.8 and max(share[1::2]) < 0.4, share
    # No single model is right on much more than half of the rows.
    assert trainer.evaluate_clients()["clients_accuracy"] > 0.65


def test_a_global_model_is_evaluated_as_it_is(tmp_path):
    data = hold_out_client_tests(tiny_federation(num_clients=3), test_share=0.5)
    for trainer in (
        trained(tmp_path / "fedavg", "fedavg", data),
        FedMoETrainer(tiny_mixture(), tiny_args(tmp_path / "fedmoe", rounds=1), train_dataset=data),
    ):
        trainer.train()
        metrics = trainer.evaluate_clients()
        rows = data.pool.select(np.concatenate(data.client_test_indices))
        assert metrics["clients_accuracy"] == pytest.approx(trainer.evaluate(rows)["eval_accuracy"])


def test_clients_may_be_evaluated_before_and_during_the_run(tmp_path):
    data = hold_out_client_tests(tiny_federation())
    plain = trained(tmp_path / "plain", "pfedme", data)

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "bytes_up" in logs:
                found.append(watched.evaluate_clients()["clients_accuracy"])

    found = []
    watched = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "watched"), data, strategy=PFedMe())
    watched.evaluate_clients()
    watched.add_callback(Watch())
    watched.train()
    assert len(found) == 3 and found[-1] == plain.evaluate_clients()["clients_accuracy"]
    assert_equal_states(state(watched.model), state(plain.model))


def test_clients_of_the_best_round_go_with_its_model(tmp_path):
    data = hold_out_client_tests(tiny_federation())
    settings = dict(learning_rate=5e-2, eval_strategy="steps", eval_steps=1, save_strategy="steps")
    best = trained(
        tmp_path / "best",
        "apfl",
        data,
        rounds=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        **settings,
    )
    chosen = best.state.best_global_step
    assert chosen < 4
    until = trained(tmp_path / "until", "apfl", data, rounds=chosen, learning_rate=5e-2)
    assert best.evaluate_clients() == until.evaluate_clients()
    assert best.client_table == until.client_table
    models = [
        [state(model) for model in map(run._federation_of_the_last_round().personal_model, range(4))]
        for run in (best, until)
    ]
    for mine, theirs in zip(*models, strict=True):
        assert_equal_states(mine, theirs)


def test_clients_without_test_rows(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation())
    with pytest.raises(ValueError, match="no test rows of its clients: hold some out"):
        trainer.evaluate_clients()


def test_unseen_clients_take_part_in_no_round(tmp_path):
    data = hold_out_client_tests(tiny_federation(num_clients=6), unseen_share=0.5)
    trainer = trained(tmp_path, "local", data, rounds=8)
    assert {client for report in trainer.rounds for client in report.clients} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"`clients_per_round` is 4, but there are 3 clients"):
        trained(tmp_path, "local", data, clients_per_round=4)


@pytest.mark.parametrize("scope", ["round", "run"])
def test_pfedmm_teaches_the_backbone_m_times_as_fast(tmp_path, scope):
    data = tiny_federation(num_clients=1)
    settings = dict(rounds=1, clients_per_round=1, per_device_train_batch_size=12, max_grad_norm=0.0)
    settings |= dict(optim="sgd", learning_rate=100.0, lr_scheduler_scope=scope)
    moved = []
    for strategy in (PFedMM(), FedEM()):  # FedEM of the same model has one rate for all
        args = tiny_args(tmp_path / strategy.name, num_train_epochs=1, **settings)
        trainer = FederatedTrainer(tiny_multi_head(3), args, data, strategy=strategy)
        trainer.train()
        start, end = state(tiny_multi_head(3)), state(trainer.model)
        moved.append({name: end[name] - start[name] for name in start})
    assert moved[1]["backbone.encoder.layer.0.output.dense.weight"].abs().max() > 1e-3
    for name in moved[0].keys() - {"mixture_M"}:
        factor = 3 if name.startswith("backbone.") else 1
        torch.testing.assert_close(moved[0][name], factor * moved[1][name], atol=1e-6, rtol=0)


def test_of_what_is_compressed_only_the_shared_part_travels(tmp_path):
    (report,) = trained(tmp_path, "fedrep", rounds=1, upload_compression="bf16").rounds
    body = sum(parameter.numel() for parameter in tiny_expert().bert.parameters())
    assert (report.bytes_down, report.bytes_up) == (2 * body * 4, 2 * body * 2)


def test_what_stays_with_clients_of_pfedmoe(tmp_path):
    trainer = trained(tmp_path, "pfedmoe", rounds=1)
    store = trainer._federation_of_the_last_round().store
    for client in trainer.rounds[0].clients:
        assert {name.split(".")[0] for name in store.get(client)} == {"own", "projection", "header", "gate"}


@pytest.mark.parametrize("method", ["l2sgd", "decentralised"])
def test_updates_from_a_start_that_nobody_knows_are_not_compressed(tmp_path, method):
    with pytest.raises(ValueError, match=f"`upload_compression` is 'int8', but in '{method}' no receiver knows"):
        trained(tmp_path, method, upload_compression="int8")


@pytest.mark.parametrize(("method", "share"), [("local", 0), ("fedavg", 1), ("l2sgd", 1)])
def test_bytes_of_clients_of_a_smaller_rank(tmp_path, method, share):
    data = hold_out_client_tests(tiny_federation())
    strategy = L2SGD(mixing_probability=1.0) if method == "l2sgd" else METHODS[method].strategy()
    args = tiny_args(tmp_path, rounds=1, client_ranks=[1])
    config = LoraConfig(r=2, target_modules=["query"])
    trainer = FederatedTrainer(tiny_expert(), args, data, strategy=strategy, peft_config=config)
    trainer.train()
    # Two layers of 16 x 16, each a row and a column; the head is 3 x 16 + 3.
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == share * 2 * 4 * (2 * (16 + 16) + 51)
