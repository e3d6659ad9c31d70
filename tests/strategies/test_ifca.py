"""IFCA: its limit, a round by hand, clients that find their cluster, and what it refuses."""

import pytest
import torch

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from hf_fedmoe.federation import LocalTrainer
from hf_fedmoe.models import EnsembleForImageClassification, EnsembleForSequenceClassification
from hf_fedmoe.strategies import IFCA, FedAvg
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import Payload
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_ensemble, tiny_expert, tiny_federation
from tests.tiny_images import tiny_image_federation, tiny_processor, tiny_resnet


ONE_ROUND = dict(rounds=1, clients_per_round=4, keep_client_optimizer=False)


def run(output_dir, model, data, strategy=None, **changes):
    trainer = FederatedTrainer(model, tiny_args(output_dir, **changes), data, strategy=strategy or IFCA())
    trainer.train()
    return trainer


def test_of_one_model_it_is_fedavg(tmp_path):
    ifca = run(tmp_path / "ifca", tiny_ensemble(num_models=1), tiny_federation())
    fedavg = run(tmp_path / "fedavg", tiny_expert(), tiny_federation(), FedAvg())
    assert_equal_states(state(ifca.model.models[0]), state(fedavg.model))


def leaning_ensemble(lean: list[int]) -> EnsembleForSequenceClassification:
    """Models alike but for a bias, of which each prefers another class."""
    model = tiny_ensemble(len(lean))
    with torch.no_grad():
        for own, label in zip(model.models, lean, strict=True):
            own.load_state_dict(model.models[0].state_dict())
            own.classifier.bias.copy_(4 * torch.nn.functional.one_hot(torch.tensor(label), 3))
    return model


def federation_by_label() -> FederatedDataset:
    """Four clients, of whom each has rows of one class: 0, 1, 0 and 1; nobody has class 2."""
    pool = tiny_federation().pool
    places = [torch.tensor([row == label for row in pool["label"]]).nonzero()[:, 0] for label in (0, 1)]
    halves = [half.numpy() for own in places for half in own.tensor_split(2)]
    return FederatedDataset(pool, [halves[0], halves[2], halves[1], halves[3]], num_labels=3)


def test_a_round_by_hand(tmp_path):
    """Each model is FedAvg's of those who took it, and the one that nobody took keeps its bits."""
    data = federation_by_label()
    start = leaning_ensemble([1, 2, 0])
    nobodys = state(start.models[1])
    trained = run(tmp_path / "ifca", leaning_ensemble([1, 2, 0]), data, **ONE_ROUND)
    assert_equal_states(state(trained.model.models[1]), nobodys)
    for cluster, clients in ((0, [1, 3]), (2, [0, 2])):
        alone = FederatedDataset(data.pool, [data.client_indices[client] for client in clients], num_labels=3)
        step = dict(optim="sgd", per_device_train_batch_size=64, **ONE_ROUND | {"clients_per_round": 2})
        together = run(tmp_path / f"fedavg-{cluster}", start.models[cluster], alone, FedAvg(), **step)
        again = run(tmp_path / f"ifca-{cluster}", leaning_ensemble([1, 2, 0]), data, **step | {"clients_per_round": 4})
        # One step over all rows: no order of batches, which follows a client's number, is left to differ.
        found, expected = state(again.model.models[cluster]), state(together.model)
        assert_equal_states(found, expected, atol=1e-6, rtol=0)
    logged = trained.state.log_history[0]
    assert [logged[f"cluster_{k}_clients"] for k in range(3)] == [2, 0, 2]


def test_clients_are_served_by_their_cluster(tmp_path):
    data = hold_out_client_tests(federation_by_label(), test_share=0.3)
    trained = run(tmp_path, leaning_ensemble([0, 1]), data, clients_per_round=4)
    assert trained.evaluate_clients()["clients_accuracy"] == 1


def test_what_it_cannot_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"IFCA trains a model for each cluster, `model` is a Bert"):
        run(tmp_path, tiny_expert(), tiny_federation())
    trainer = FederatedTrainer(tiny_ensemble(), tiny_args(tmp_path), tiny_federation(), strategy=IFCA())
    server = trainer._federation().server
    for cluster, fault in ((-1, "it trained cluster -1, of 2"), (2, "it trained cluster 2, of 2"), (1, None)):
        payload = Payload(server.bank_SP[0], tensors={"cluster": torch.tensor(cluster)})
        assert IFCA().upload_fault(server, payload) == fault


def test_each_model_counts_its_own_batches(tmp_path, monkeypatch):
    """Normalisation by a cumulative mean would forget what a model has seen, were it given another one's count."""
    chosen = iter([1, 1, 1])
    monkeypatch.setattr(LocalTrainer, "least_loss", lambda *_: next(chosen))
    trained = FederatedTrainer(
        EnsembleForImageClassification.from_classifier(tiny_resnet(), num_models=2),
        tiny_args(tmp_path, clients_per_round=1, num_train_epochs=1),
        tiny_image_federation(),
        processing_class=tiny_processor(),
        strategy=IFCA(),
    )
    trained.train()
    counted = [{int(t) for name, t in state(own).items() if "num_batches" in name} for own in trained.model.models]
    assert counted == [{0}, {9}]  # three rounds of 12 rows in batches of 4
