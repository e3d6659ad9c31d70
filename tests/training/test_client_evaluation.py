"""Personalised methods in whole runs: what travels, what survives a failing client, how clients are evaluated."""

import csv

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_fedmoe.data import AUGMENTATIONS, FederatedDataset, ImageCollator, hold_out_client_tests
from hf_fedmoe.models import (
    EnsembleForImageClassification,
    EnsembleForSequenceClassification,
    MultiHeadForImageClassification,
)
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
    PFedMoE,
)
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_multi_head,
    tiny_pfedmoe,
    tiny_rows,
)
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor, tiny_resnet


METHODS = {
    "fedavg": FedAvg,
    "local": Local,
    "fedavg_plus": FedAvgPlus,
    "fedem": FedEM,
    "pfedmm": PFedMM,
    "pfedmoe": tiny_pfedmoe,
    "fedrep": FedRep,
    "pfedme": PFedMe,
    "apfl": lambda: APFL(adapt=True),
    "l2sgd": L2SGD,
    "qffl": QFFL,
    "afl": AFL,
    "clustered": lambda: ClusteredFL(eps1=100.0, eps2=0.0, min_size=1),
    "decentralised": Decentralised,
    "fedrolex": lambda: FedRolex((1.0, 0.5)),
    "heterofl": lambda: HeteroFL((0.5, 1.0)),
}
# Methods that train what has no adapter.
WHOLE_MODELS = ("fedem", "pfedmm", "pfedmoe", "fedrolex", "heterofl")


def two_kinds(num_clients: int = 6, size: int = 40) -> FederatedDataset:
    """Clients of even number have the labels as they are, those of odd number each the next one."""
    rows = tiny_rows(num_clients * size)
    clients = np.split(np.arange(len(rows)), num_clients)
    labels = np.array(rows["label"])
    odd = np.concatenate(clients[1::2])
    labels[odd] = (labels[odd] + 1) % 3
    rows = rows.remove_columns("label").add_column("label", labels.tolist())
    return hold_out_client_tests(FederatedDataset(rows, clients, num_labels=3), test_share=0.3)


def start(method):
    return {"fedem": tiny_ensemble, "pfedmm": tiny_multi_head}.get(method, tiny_expert)()


def trained(output_dir, method, data=None, **changes):
    data = data or hold_out_client_tests(tiny_federation(), test_share=0.25, unseen_share=0.25)
    strategy = METHODS[method]()
    trainer = FederatedTrainer(start(method), tiny_args(output_dir, **changes), data, strategy=strategy)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_every_method_evaluates_each_client(tmp_path, method):
    trainer = trained(tmp_path, method)
    before = state(trainer.model)
    metrics = trainer.evaluate_clients()
    assert trainer.evaluate_clients() == metrics  # evaluation changes nothing
    assert_equal_states(state(trainer.model), before)
    assert [(row.client, row.unseen, row.test_size) for row in trainer.client_table] == [
        (0, False, 3),
        (1, False, 3),
        (2, False, 3),
        (3, True, 3),
    ]
    seen = [row.accuracy for row in trainer.client_table[:3]]
    assert metrics["clients_accuracy"] == pytest.approx(np.mean(seen)) and metrics["clients_worst"] == min(seen)
    assert metrics["clients_unseen_accuracy"] == trainer.client_table[3].accuracy
    with (tmp_path / "client_metrics.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [*seen, trainer.client_table[3].accuracy]
    assert trainer.state.log_history[-1]["clients_bottom_decile"] == metrics["clients_bottom_decile"]


@pytest.mark.parametrize("method", ["local", "fedavg_plus", "fedrep", "pfedme", "apfl", "clustered"])
def test_personal_models_learn_what_one_global_model_cannot(tmp_path, method):
    settings = dict(rounds=10, clients_per_round=6, per_device_train_batch_size=7, num_train_epochs=2)
    strategies = {
        "pfedme": lambda: PFedMe(penalty=0.5, outer_rate=1.0, inner_steps=2),
        "apfl": lambda: APFL(alpha=0.9),
        "clustered": lambda: ClusteredFL(eps1=0.6, eps2=0.8, min_size=3),
    }
    accuracy = {}
    for name, make in (("fedavg", FedAvg), (method, strategies.get(method, METHODS[method]))):
        args = tiny_args(tmp_path / name, **settings)
        trainer = FederatedTrainer(start(name), args, two_kinds(), strategy=make())
        trainer.train()
        accuracy[name] = trainer.evaluate_clients()["clients_accuracy"]
    assert accuracy[method] > accuracy["fedavg"] + 0.1, accuracy
    if method == "clustered":
        found = trainer._federation_of_the_last_round().server.tensors["cluster_M"]
        assert found.tolist() == [0, 1, 0, 1, 0, 1]


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


@pytest.mark.parametrize(
    ("method", "share"),
    [("local", 0), ("fedavg_plus", 1), ("pfedme", 1), ("apfl", 1), ("qffl", 1), ("afl", 1), ("clustered", 1)],
)
def test_what_travels(tmp_path, method, share):
    (report,) = trained(tmp_path, method, rounds=1).rounds
    whole = 2 * sum(parameter.numel() for parameter in tiny_expert().parameters()) * 4
    assert report.bytes_up == report.bytes_down == share * whole


def test_of_fedem_all_models_travel_and_the_mixture_does_not(tmp_path):
    trainer = trained(tmp_path, "fedem", rounds=1)
    models = 2 * sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == 2 * models * 4
    assert trainer.model.mixture_M.tolist() == [0.5, 0.5]
    federation = trainer._federation_of_the_last_round()
    kept = [federation.store.get(client) for client in trainer.rounds[0].clients]
    for client, tensors in zip(trainer.rounds[0].clients, kept, strict=True):
        assert tensors["pi_M"].sum().item() == pytest.approx(1) and (tensors["pi_M"] != 0.5).all()
        assert torch.equal(federation.personal_model(client).mixture_M, tensors["pi_M"])


def test_of_pfedmm_the_backbone_travels_once_and_the_mixture_does_not(tmp_path):
    trainer = trained(tmp_path, "pfedmm", rounds=1)
    head = sum(parameter.numel() for parameter in tiny_expert().classifier.parameters())
    all_modules = sum(parameter.numel() for parameter in tiny_expert().parameters()) + head
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == 2 * all_modules * 4
    assert trainer.model.mixture_M.tolist() == [0.5, 0.5]
    federation = trainer._federation_of_the_last_round()
    for client in trainer.rounds[0].clients:
        pi_M = federation.store.get(client)["pi_M"]
        assert pi_M.sum().item() == pytest.approx(1) and (pi_M != 0.5).all()
        assert torch.equal(federation.personal_model(client).mixture_M, pi_M)


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


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_of_fedrep_only_the_body_travels(tmp_path, compression):
    trainer = trained(tmp_path, "fedrep", rounds=1, upload_compression=compression)
    body = sum(parameter.numel() for name, parameter in tiny_expert().named_parameters() if name.startswith("bert."))
    head = sum(parameter.numel() for parameter in tiny_expert().classifier.parameters())
    assert body + head == sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert trainer.rounds[0].bytes_down == 2 * body * 4
    assert trainer.rounds[0].bytes_up == 2 * body * (2 if compression == "bf16" else 4)
    # What nobody sent, nobody changed.
    start, end = state(tiny_expert()), state(trainer.model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all(name.startswith("bert.") for name in changed)


def test_of_pfedmoe_only_the_shared_extractor_travels(tmp_path):
    trainer = trained(tmp_path, "pfedmoe", rounds=1)
    expert = tiny_expert()
    body = sum(p.numel() for p in expert.parameters()) - sum(p.numel() for p in expert.classifier.parameters())
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == 2 * body * 4
    start, end = state(tiny_expert()), state(trainer.model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and not any(name.startswith("classifier") for name in changed)
    store = trainer._federation_of_the_last_round().store
    for client in trainer.rounds[0].clients:
        assert {name.split(".")[0] for name in store.get(client)} >= {"own", "header", "gate"}
        assert not any(name.startswith("shared") for name in store.get(client))


def test_l2sgd_travels_in_the_rounds_that_mix(tmp_path):
    trainer = trained(tmp_path, "l2sgd", rounds=6)
    whole = 2 * sum(parameter.numel() for parameter in tiny_expert().parameters()) * 4
    mixes = [trainer.strategy.mixes(round_index) for round_index in range(6)]
    assert 0 < sum(mixes) < 6
    for report, mixed in zip(trainer.rounds, mixes, strict=True):
        assert report.bytes_up == report.bytes_down == mixed * whole


def test_neighbours_send_to_each_other(tmp_path):
    data = hold_out_client_tests(tiny_federation(num_clients=5))
    trainer = trained(tmp_path, "decentralised", data, rounds=1, clients_per_round=5)
    linked = trainer._federation_of_the_last_round().server.tensors["linked_MM"]
    one = sum(parameter.numel() for parameter in tiny_expert().parameters()) * 4
    assert 8 <= int(linked.sum()) < 20
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == int(linked.sum()) * one


@pytest.mark.parametrize("method", ["l2sgd", "decentralised"])
def test_updates_from_a_start_that_nobody_knows_are_not_compressed(tmp_path, method):
    with pytest.raises(ValueError, match=f"`upload_compression` is 'int8', but in '{method}' no receiver knows"):
        trained(tmp_path, method, upload_compression="int8")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedavg"])
def test_failing_clients_are_survived(tmp_path, method):
    data = hold_out_client_tests(tiny_federation(num_clients=4))
    strategy = METHODS[method]()
    train_client = strategy.train_client

    def broken(local, task):
        payload, kept = train_client(local, task)
        if task.client == 0:
            raise OSError("battery empty")
        if task.client == 1:
            payload.row_P[0] = float("nan")
            kept = {name: tensor * float("nan") for name, tensor in kept.items()}
        return payload, kept

    strategy.train_client = broken
    args = tiny_args(tmp_path, rounds=2, clients_per_round=4)
    trainer = FederatedTrainer(start(method), args, data, strategy=strategy)
    trainer.train()
    # Local sends nothing that could be refused; it keeps nothing of such a training either.
    for report in trainer.rounds:
        assert "battery empty" in report.refused[0] and "not finite" in report.refused[1]
        assert not {2, 3} & report.refused.keys()
    assert all(torch.isfinite(tensor).all() for tensor in state(trainer.model).values())
    store = trainer._federation_of_the_last_round().store
    assert store.get(0) == store.get(1) == {}
    strategy.train_client = train_client
    assert np.isfinite(list(trainer.evaluate_clients().values())).all()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedavg"])
def test_normalisation_layers_and_augmentation(tmp_path, method):
    data = hold_out_client_tests(tiny_image_federation(), unseen_share=0.25)
    evaluated, models = [], []
    for folder in ("first", "second"):
        trainer = FederatedTrainer(
            image_model(method),
            tiny_args(tmp_path / folder, rounds=2),
            data,
            strategy=image_strategy(method),
            processing_class=tiny_processor(),
            train_data_collator=ImageCollator(tiny_processor(), AUGMENTATIONS["photographs"]),
        )
        trainer.train()
        assert not any(report.refused for report in trainer.rounds)
        evaluated.append(trainer.evaluate_clients())
        federation = trainer._federation_of_the_last_round()
        models.append([state(trainer.model), *(state(federation.personal_model(client)) for client in range(4))])
    assert evaluated[0] == evaluated[1]
    for first, second in zip(*models, strict=True):
        assert_equal_states(first, second)
        variances = [tensor for name, tensor in first.items() if name.endswith("running_var")]
        assert variances and all((variance > 0).all() for variance in variances)


def image_strategy(method):
    if method == "pfedmoe":
        return PFedMoE([tiny_cnn().config, tiny_resnet().config], gate_input_size=3 * 8 * 8)
    return METHODS[method]()


def image_model(method):
    torch.manual_seed(5)
    if method == "fedem":
        return EnsembleForImageClassification.from_classifier(tiny_resnet(), num_models=2)
    if method == "pfedmm":
        return MultiHeadForImageClassification.from_classifier(tiny_resnet(), num_heads=2)
    return tiny_resnet()


@pytest.mark.parametrize("fusion", ["svd", "factors", "ffa"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in WHOLE_MODELS])
def test_clients_of_adapters(tmp_path, method, fusion):
    data = hold_out_client_tests(tiny_federation(), unseen_share=0.25)
    args = tiny_args(tmp_path, rounds=2, lora_fusion=fusion)
    trainer = FederatedTrainer(
        tiny_expert(), args, data, strategy=METHODS[method](), peft_config=LoraConfig(r=2, target_modules=["query"])
    )
    trainer.train()
    assert not any(report.refused for report in trainer.rounds)
    metrics = trainer.evaluate_clients()
    assert trainer.evaluate_clients() == metrics and np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize(("method", "share"), [("local", 0), ("fedavg", 1), ("l2sgd", 1)])
def test_bytes_of_clients_of_a_smaller_rank(tmp_path, method, share):
    data = hold_out_client_tests(tiny_federation())
    strategy = L2SGD(mixing_probability=1.0) if method == "l2sgd" else METHODS[method]()
    args = tiny_args(tmp_path, rounds=1, client_ranks=[1])
    config = LoraConfig(r=2, target_modules=["query"])
    trainer = FederatedTrainer(tiny_expert(), args, data, strategy=strategy, peft_config=config)
    trainer.train()
    # Two layers of 16 x 16, each a row and a column; the head is 3 x 16 + 3.
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == share * 2 * 4 * (2 * (16 + 16) + 51)
