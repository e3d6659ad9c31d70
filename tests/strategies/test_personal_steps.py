"""One step of each personalised method, by hand or from the worked example."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_fedmoe.models.ensemble.modeling_ensemble import mix_models
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
    Local,
    PFedMe,
    PFedMM,
    Server,
    ServerStep,
    Uploads,
)
from hf_fedmoe.strategies.afl import project_to_simplex
from hf_fedmoe.strategies.clustered import smaller_part
from hf_fedmoe.strategies.decentralised import connected_graph, metropolis_weights
from hf_fedmoe.strategies.fedem import expectation, model_losses
from hf_fedmoe.weights import StateLayout
from tests.strategies.test_fedavg import server_and_uploads
from tests.tiny_client import Slope, row, tiny_local, tiny_server, tiny_task


def expected(data, name):
    return torch.tensor(data[name], dtype=torch.float64)


def close(value, wanted):
    torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0)


def test_qffl_matches_the_worked_example():
    data, server, uploads = server_and_uploads()
    uploads.metrics = [{"start_loss": loss, "learning_rate": data["eta"]} for loss in data["losses_m"]]
    report = QFFL(q=data["q"]).update(server, uploads, ServerStep(server, None, 0, 0))
    close(server.bank_SP[0, :7], expected(data, "qffl_P"))
    assert report["worst_start_loss"] == max(data["losses_m"]) and 0 < report["qffl_step"] < 1


def test_a_loss_without_end_does_not_overflow():
    data, server, uploads = server_and_uploads()
    losses = [3e38, *data["losses_m"][1:]]
    uploads.metrics = [{"start_loss": loss, "learning_rate": data["eta"]} for loss in losses]
    report = QFFL(q=10.0).update(server, uploads, ServerStep(server, None, 0, 0))
    # The one client that counts moves the model all the way.
    close(server.bank_SP[0, :7], expected(data, "clients_mP")[0])
    assert report["qffl_step"] == pytest.approx(1.0)


def test_qffl_reports_the_loss_of_the_received_model(tmp_path):
    strategy = QFFL()
    local = tiny_local(tmp_path, strategy)
    payload, _ = strategy.train_client(local, tiny_task(local, 1.0, [(1.0, 3.0), (2.0, 2.0)]))
    assert payload.metrics["start_loss"] == pytest.approx((4 / 2 + 0) / 2)
    # gradient at 1: ((1 - 3) * 1 + 0) / 2 = -1
    assert payload.row_P[0].item() == pytest.approx(1.1) and payload.metrics["learning_rate"] == 0.1


def test_afl_matches_the_worked_example():
    data, server, uploads = server_and_uploads()
    strategy = AFL(lambda_rate=data["afl_lambda_lr"])
    strategy.setup(server, 4)
    uploads.metrics = [{"start_loss": loss} for loss in data["losses_m"]]
    strategy.update(server, uploads, ServerStep(server, None, 0, 0))
    close(server.tensors["lambda_M"], expected(data, "afl_lambda_after"))
    # The step still had the uniform lambda of before; the next one has the new.
    close(server.bank_SP[0, :7], expected(data, "clients_mP").mean(0))
    strategy.update(server, uploads, ServerStep(server, None, 1, 0))
    close(server.bank_SP[0, :7], expected(data, "afl_lambda_after") @ expected(data, "clients_mP"))


def test_projection_to_the_simplex_by_hand():
    close(project_to_simplex(torch.tensor([0.5, 0.5])), torch.tensor([0.5, 0.5]))
    close(project_to_simplex(torch.tensor([1.0, 0.6, -0.9])), torch.tensor([0.7, 0.3, 0.0]))
    close(project_to_simplex(torch.tensor([5.0, 1.0])), torch.tensor([1.0, 0.0]))
    close(project_to_simplex(torch.tensor([1e30, 1.0])), torch.tensor([1.0, 0.0]))  # beside which a 1 is nothing


def test_l2sgd_matches_the_worked_example():
    data, server, uploads = server_and_uploads()
    strategy = L2SGD(mixing_probability=1.0, pull=data["l2sgd_a"])
    assert strategy.update(server, uploads, ServerStep(server, None, 0, 0)) == {"mixed": 1.0}
    close(server.bank_SP[0, :7], expected(data, "fedavg_P"))
    rows = strategy.synchronise(server, uploads)
    close(torch.stack([rows[client][:7] for client in range(4)]), expected(data, "l2sgd_after_mP"))


def test_l2sgd_sends_nothing_when_the_coin_says_so():
    strategy = L2SGD(mixing_probability=0.3)
    mixed = [strategy.mixes(round_index) for round_index in range(1000)]
    assert 0.25 < np.mean(mixed) < 0.35
    assert [strategy.shared(None, index) is None for index in range(20)] == mixed[:20]
    assert mixed != [L2SGD(mixing_probability=0.3, coin_seed=1).mixes(index) for index in range(1000)]


def test_pfedme_server_matches_the_worked_example():
    data, server, uploads = server_and_uploads()
    PFedMe(beta=data["pfedme_beta"]).update(server, uploads, ServerStep(server, None, 0, 0))
    close(server.bank_SP[0, :7], expected(data, "pfedme_global_P"))


def test_pfedme_client_by_hand(tmp_path):
    strategy = PFedMe(penalty=2.0, inner_steps=2, outer_rate=0.25)
    local = tiny_local(tmp_path, strategy, per_device_train_batch_size=1, num_train_epochs=2)
    payload, kept = strategy.train_client(local, tiny_task(local, 1.0, [(1.0, 3.0)]))
    w = theta = 1.0
    for _ in range(2):  # one batch in each epoch
        for _ in range(2):
            theta -= 0.1 * ((theta - 3) + 2.0 * (theta - w))
        w -= 0.25 * 2.0 * (w - theta)
    assert payload.row_P[0].item() == pytest.approx(w, abs=1e-12)
    assert kept["theta_P"][0].item() == pytest.approx(theta, abs=1e-12)
    assert theta > w > 1.0


@pytest.mark.parametrize("adapt", [False, True])
def test_apfl_client_by_hand(tmp_path, adapt):
    strategy = APFL(alpha=0.25, adapt=adapt, alpha_rate=0.01)
    local = tiny_local(tmp_path, strategy, num_train_epochs=2)
    kept = {"v_P": row(local, 2.0), "alpha": torch.tensor(0.25, dtype=torch.float64)}
    payload, kept = strategy.train_client(local, tiny_task(local, 1.0, [(1.0, 3.0), (3.0, 0.0)], **kept))

    def gradient(w):
        return ((w - 3) * 1 + (3 * w - 0) * 3) / 2

    w, v, alpha = 1.0, 2.0, 0.25
    for _ in range(2):
        at_mixture = gradient(alpha * v + (1 - alpha) * w)
        step = 0.01 * (v - w) * at_mixture if adapt else 0.0
        w, v, alpha = w - 0.1 * gradient(w), v - 0.1 * alpha * at_mixture, alpha - step
    assert payload.row_P[0].item() == pytest.approx(w, abs=1e-12)
    assert kept["v_P"][0].item() == pytest.approx(v, abs=1e-12)
    assert kept["alpha"].item() == pytest.approx(alpha, abs=1e-12)
    assert (alpha != 0.25) == adapt
    task = tiny_task(local, 5.0, [(1.0, 3.0)], **kept)
    model = strategy.personal_model(tiny_server(local, 5.0), local, task)
    assert model.w.item() == pytest.approx(alpha * v + (1 - alpha) * 5.0)


def test_alpha_stays_a_share(tmp_path):
    strategy = APFL(alpha=0.9, adapt=True, alpha_rate=100.0)
    local = tiny_local(tmp_path, strategy)
    _, kept = strategy.train_client(local, tiny_task(local, 0.0, [(1.0, 3.0)], v_P=row(local, 1.0)))
    assert kept["alpha"].item() == 1.0


def test_fedavg_plus_tunes_a_copy(tmp_path):
    strategy = FedAvgPlus(tuning_epochs=2)
    local = tiny_local(tmp_path, strategy)
    server = tiny_server(local, 1.0)
    task = tiny_task(local, 1.0, [(1.0, 3.0)])
    assert strategy.personal_model(server, local, task).w.item() == pytest.approx(3 - 2 * 0.9**2)
    assert server.model.w.item() == 1.0 and task.received_P[0] == 1.0
    assert FedAvg().personal_model(server, local, task) is server.model


def test_local_client_goes_on_from_its_own_model(tmp_path):
    strategy = Local()
    local = tiny_local(tmp_path, strategy)
    server = tiny_server(local, 1.0)
    assert strategy.download(server, 0, row(local, 7.0))[0] == 7.0 and strategy.download(server, 0, None)[0] == 1.0
    task = tiny_task(local, 1.0, [(1.0, 3.0)])
    _, kept = strategy.train_client(local, task)
    assert kept["row_P"][0].item() == pytest.approx(1.2)
    assert strategy.personal_model(server, local, tiny_task(local, 1.0, [(1.0, 3.0)], **kept)).w.item() == 1.2


def test_clusters_split_where_updates_pull_apart():
    _, server, uploads = server_and_uploads()
    strategy = ClusteredFL(eps1=0.4, eps2=0.9, min_size=2)
    strategy.setup(server, 6)
    center_P = server.bank_SP[0].clone()
    uploads.clients = [0, 2, 3, 5]
    uploads.num_examples_m = torch.ones(4, dtype=torch.float64)
    along = torch.zeros(4, 7, dtype=torch.float64)
    along[0, 0], along[1, 0], along[2, 0], along[3, 0] = 1.0, -1.0, 0.8, -0.7
    along[:, 1] = torch.tensor([0.1, 0.0, -0.1, 0.0])
    uploads.rows_mP[:, :7] = center_P[:7] + along
    assert strategy.update(server, uploads, ServerStep(server, None, 0, 0)) == {"clusters": 2.0}
    assert server.tensors["cluster_M"].tolist() in ([0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0])
    for clients, mean in (([0, 3], [0.9, 0.0]), ([2, 5], [-0.85, 0.0])):
        for client in clients:
            received_P = strategy.download(server, client, None)
            close(received_P[:2] - center_P[:2], torch.tensor(mean, dtype=torch.float64))
    close(server.bank_SP[0, :1] - center_P[:1], torch.tensor([0.025], dtype=torch.float64))
    # Neither half is large enough for another split.
    assert strategy.update(server, uploads, ServerStep(server, None, 1, 0)) == {"clusters": 2.0}


@pytest.mark.parametrize("changes", [{"eps1": 0.01}, {"eps2": 1.2}, {"min_size": 4}])
def test_clusters_stay_whole_where_a_condition_fails(changes):
    _, server, uploads = server_and_uploads()
    strategy = ClusteredFL(**{"eps1": 0.4, "eps2": 0.9, "min_size": 2} | changes)
    strategy.setup(server, 4)
    uploads.num_examples_m = torch.ones(4, dtype=torch.float64)
    uploads.rows_mP[:, :7] = server.bank_SP[0, :7]
    uploads.rows_mP[:, 0] += torch.tensor([1.0, -1.0, 0.8, -0.7])
    assert strategy.update(server, uploads, ServerStep(server, None, 0, 0)) == {"clusters": 1.0}


def test_norms_are_euclidean_and_not_the_largest_coordinate():
    _, server, uploads = server_and_uploads()
    strategy = ClusteredFL(eps1=0.4, eps2=1.6)
    strategy.setup(server, 4)
    uploads.num_examples_m = torch.ones(4, dtype=torch.float64)
    uploads.rows_mP[:, :7] = server.bank_SP[0, :7]
    uploads.rows_mP[:, :4] += torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]  # norm 2, coordinates of 1
    assert strategy.update(server, uploads, ServerStep(server, None, 0, 0)) == {"clusters": 2.0}


def test_unseen_client_takes_the_cluster_that_fits_it(tmp_path):
    strategy = ClusteredFL()
    local = tiny_local(tmp_path, strategy)
    server = tiny_server(local, 1.0)
    strategy.setup(server, 2)
    server.tensors["clusters_KP"] = torch.stack([row(local, 1.0), row(local, 3.0)])
    task = tiny_task(local, 1.0, [(1.0, 2.9)])
    task.client = 2
    assert strategy.personal_model(server, local, task).w.item() == 3.0
    task.client = 1
    assert strategy.personal_model(server, local, task).w.item() == 1.0


def test_division_in_two_by_hand():
    similarity = torch.tensor([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.8], [0.1, 0.3, 1, 0.4], [0.2, 0.8, 0.4, 1]])
    assert smaller_part(similarity) == [2]  # 0-1 and 1-3 are joined; across, 0.4 is the highest


def test_weights_of_neighbours_by_hand():
    # A path 0 - 1 - 2: degrees 1, 2, 1.
    linked = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    wanted = torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64) / 3
    torch.testing.assert_close(metropolis_weights(linked), wanted)


@pytest.mark.parametrize("num_clients", [1, 2, 7, 20])
def test_graphs_are_connected_and_weights_doubly_stochastic(num_clients):
    linked = connected_graph(num_clients, 0.5, seed=1)
    assert (linked == linked.T).all() and not linked.diagonal().any()
    weights = metropolis_weights(torch.from_numpy(linked)).double()
    torch.testing.assert_close(weights.sum(0), torch.ones(num_clients).double())
    torch.testing.assert_close(weights.sum(1), torch.ones(num_clients).double())
    assert (weights >= 0).all() and (weights.diagonal() > 0).all()
    reached = torch.linalg.matrix_power(weights, 200)
    torch.testing.assert_close(reached, torch.full_like(reached, 1 / num_clients), atol=1e-6, rtol=0)


def test_neighbours_are_averaged():
    data, server, uploads = server_and_uploads()
    strategy = Decentralised()
    strategy.setup(server, 4)
    path = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    server.tensors["linked_MM"] = path
    # Client 2 is away: 3 has no neighbour left.
    uploads = Uploads([0, 1, 3], uploads.rows_mP[[0, 1, 3]], [{}] * 3, uploads.num_examples_m[[0, 1, 3]])
    assert [strategy.links(server, client, [0, 1, 3]) for client in (0, 1, 3)] == [1, 1, 0]
    strategy.update(server, uploads, ServerStep(server, None, 0, 0))
    rows, clients = strategy.synchronise(server, uploads), expected(data, "clients_mP")
    for client, wanted in ((0, clients[:2].mean(0)), (1, clients[:2].mean(0)), (3, clients[3])):
        torch.testing.assert_close(rows[client][:7], wanted, atol=1e-10, rtol=0)
    close(server.bank_SP[0, :7], clients[[0, 1, 3]].mean(0))


def test_fedem_matches_the_worked_example():
    data = json.loads((Path(__file__).parents[1] / "data" / "pfedmm.json").read_text())
    losses_NM, pi_M = expected(data, "losses_NM"), expected(data, "pi_0")
    q_NM, pi_M = expectation(losses_NM, pi_M)
    close(q_NM, expected(data, "q_1_NM"))
    close(pi_M, expected(data, "pi_1"))
    close((q_NM * losses_NM).sum(1).mean(), expected(data, "m_step_loss"))
    mixed_NC = mix_models(expected(data, "head_probs_NMC").log(), pi_M)
    close(mixed_NC.exp(), expected(data, "prediction_NC"))
    q_NM, pi_M = expectation(losses_NM, pi_M)
    close(q_NM, expected(data, "q_2_NM"))
    close(pi_M, expected(data, "pi_2"))


def test_absent_clients_keep_their_part_of_the_average():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, -2.0]))
    model.register_buffer("mixture_M", torch.tensor([0.5, 0.5]))
    layout = StateLayout.of(model)

    def updated(strategy, num_examples):
        bank_SP = torch.zeros(1, layout.size)
        rows_mP = torch.zeros(2, layout.size)
        for row_P, w in ((bank_SP[0], [1.0, -2.0]), (rows_mP[0], [3.0, 0.0]), (rows_mP[1], [5.0, 6.0])):
            layout.views(row_P)["w"].copy_(torch.tensor(w))
            layout.views(row_P)["mixture_M"].fill_(0.5)
        server = Server(model, model, layout, bank_SP, [{}], num_examples=num_examples)
        uploads = Uploads([4, 1], rows_mP, [{}, {}], torch.tensor([10.0, 30.0]))
        strategy.update(server, uploads, ServerStep(server, None, 0, 0))
        assert layout.views(bank_SP[0])["mixture_M"].tolist() == [0.5, 0.5]
        return layout.views(bank_SP[0])["w"].clone()

    for method in (FedEM, PFedMM):
        # 10 and 30 of 80 examples took part, so that half of the old models stays: 3/8 + 15/8 + 1/2, 0 + 18/8 - 1.
        assert updated(method(include_absent=True), 80).tolist() == [2.75, 1.25]
        assert updated(method(), 80).tolist() == [4.5, 4.5]
        assert torch.equal(updated(method(include_absent=True), 40), updated(method(), 40))


@pytest.mark.parametrize("num_em_steps", [1, 2])
def test_pfedmm_matches_the_worked_example(num_em_steps):
    data = json.loads((Path(__file__).parents[1] / "data" / "pfedmm.json").read_text())
    # Two classes, of which the first has these losses.
    probabilities_NM = (-expected(data, "losses_NM")).exp()
    logits_NMC = torch.stack([probabilities_NM, 1 - probabilities_NM], dim=2).log()
    labels_N = torch.zeros(8, dtype=torch.long)

    class Heads(torch.nn.Module):
        def forward(self, index, labels):
            assert not self.training
            return SimpleNamespace(model_logits=logits_NMC[index])

    batches = [{"index": places, "labels": labels_N[places]} for places in torch.arange(8).split(3)]
    local = SimpleNamespace(
        load=lambda *_: Heads(),
        in_order=lambda *_: iter(batches),
        accelerator=SimpleNamespace(autocast=nullcontext),
    )
    task = SimpleNamespace(received_P=None, integers=None, dataset=None, seed=0, kept={})
    q_NM, pi_M = PFedMM(num_em_steps=num_em_steps).expect(local, task)
    # The model computes its losses in float32.
    torch.testing.assert_close(q_NM.double(), expected(data, f"q_{num_em_steps}_NM"), atol=1e-6, rtol=0)
    torch.testing.assert_close(pi_M.double(), expected(data, f"pi_{num_em_steps}"), atol=1e-6, rtol=0)
    if num_em_steps == 1:
        losses_NM = torch.cat([model_losses(Heads().eval(), batch) for batch in batches])
        assert (q_NM * losses_NM).sum(1).mean().item() == pytest.approx(data["m_step_loss"], abs=1e-6)
        mixed_NC = mix_models(expected(data, "head_probs_NMC").log(), pi_M.double())
        torch.testing.assert_close(mixed_NC.exp(), expected(data, "prediction_NC"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvgPlus(tuning_epochs=0), "`tuning_epochs` is 0"),
        (lambda: PFedMe(penalty=0), "`penalty` is 0"),
        (lambda: PFedMe(inner_steps=0), "`inner_steps` is 0"),
        (lambda: PFedMe(outer_rate=0.1), r"`outer_rate` is 0.1: w goes the share outer_rate \* penalty = 1.5"),
        (lambda: PFedMe(beta=2.0), "`beta` is 2.0"),
        (lambda: APFL(alpha=-0.1), "`alpha` is -0.1"),
        (lambda: APFL(alpha_rate=0), "`alpha_rate` is 0"),
        (lambda: L2SGD(mixing_probability=1.1), "`mixing_probability` is 1.1"),
        (lambda: L2SGD(pull=math.inf), "`pull` is inf"),
        (lambda: QFFL(q=-1), "`q` is -1"),
        (lambda: AFL(lambda_rate=-1), "`lambda_rate` is -1"),
        (lambda: ClusteredFL(eps1=-1), "`eps1` is -1"),
        (lambda: ClusteredFL(min_size=0), "`min_size` is 0"),
        (lambda: FedEM(num_em_steps=0), "`num_em_steps` is 0"),
        (lambda: FedEM().server_models(Slope()), "`model` is a Slope: build an ensemble around it with"),
        (lambda: PFedMM(num_em_steps=0), "`num_em_steps` is 0"),
        (lambda: PFedMM().server_models(Slope()), "`model` is a Slope: give it heads with"),
        (lambda: Decentralised(edge_probability=0), "`edge_probability` is 0"),
        (lambda: connected_graph(30, 0.001, 0), "none of 1000 graphs of 30 clients was connected"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
