"""Each stage of Fed-MoE by itself, against steps written out by hand."""

import pytest
import torch
from transformers import default_data_collator

from hf_fedmoe.data import ReservedSet
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedMoE, FedMoESettings, Server, ServerStep, Uploads, client_mixture, correlate
from hf_fedmoe.strategies.gate_training import GateFit, train_gate
from hf_fedmoe.strategies.server_training import expert_outputs, fine_tune, gate_probabilities, probe
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import StateLayout, copy_module
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_gate,
    tiny_mixture,
)
from tests.tiny_models import tiny_bert


@pytest.fixture
def reserved():
    return ReservedSet(tiny_federation().reserved, default_data_collator, batch_size=8)


def perturbed_server(seed=0, **config):
    """A server whose experts differ, and uploads of three clients that differ more."""
    torch.manual_seed(seed)
    model = tiny_mixture(**config).eval()
    layout = StateLayout.of(model.experts[0])
    worker = copy_module(model.experts[0])
    bank_SP = layout.bank(model.experts)
    noise = torch.randn(bank_SP.shape)
    bank_SP += 0.05 * noise
    rows_mP = bank_SP[:1] + 0.3 * torch.randn(3, layout.size)
    server = Server(model, worker, layout, bank_SP, [{} for _ in model.experts])
    uploads = Uploads([4, 0, 2], rows_mP, [{}] * 3, torch.tensor([1.0, 2.0, 3.0]))
    server.tensors["contribution_SM"] = torch.zeros(len(bank_SP), 5)
    return server, uploads


def settings(**changes):
    fields = dict(correlation="relevance", fusion_warmup=False, main_fusion_rate=0.6, fusion_rate=0.25, gate_epochs=2)
    return FedMoESettings(**fields | changes)


def probe_all(server, uploads, reserved):
    return torch.stack([probe(server.worker, server.layout, row_P, reserved) for row_P in uploads.rows_mP])


def update(strategy, server, uploads, reserved, round_index, seed):
    """The server's part of a round."""
    uploads.probed = [strategy.probe(server, row_P, reserved) for row_P in uploads.rows_mP]
    return strategy.update(server, uploads, ServerStep(server, reserved, round_index, seed))


def test_probe_is_each_clients_probability_of_the_true_class(reserved):
    server, uploads = perturbed_server()
    P_y_mR = probe_all(server, uploads, reserved)
    expert = tiny_expert()
    server.layout.write(uploads.rows_mP[1], expert)
    example = reserved.batch([13])
    label = example.pop("labels").item()
    with torch.no_grad():
        expected = expert(**example).logits.softmax(-1)[0, label]
    torch.testing.assert_close(P_y_mR[1, 13], expected, atol=1e-6, rtol=0)


def test_stage_b_moves_the_experts_by_equation_6(reserved):
    server, uploads = perturbed_server()
    before_SP, outputs = server.bank_SP.clone(), expert_outputs(ServerStep(server, reserved, 0, 0))
    Q_RK = gate_probabilities(server.model, outputs, reserved)
    P_y_mR = probe_all(server, uploads, reserved)
    W_r_Km = correlate(Q_RK, P_y_mR, "relevance").softmax(1)
    assert (W_r_Km[0] - W_r_Km[1]).abs().max() > 1e-3  # the rows differ, so the test can tell experts apart
    update(FedMoE(settings()), server, uploads, reserved, 0, seed=1)
    M = uploads.rows_mP
    torch.testing.assert_close(server.bank_SP[0], 0.4 * before_SP[0] + 0.6 * (M[0] + M[1] + M[2]) / 3)
    for k in range(2):
        fused_P = W_r_Km[k, 0] * M[0] + W_r_Km[k, 1] * M[1] + W_r_Km[k, 2] * M[2]
        torch.testing.assert_close(server.bank_SP[1 + k], 0.75 * before_SP[1 + k] + 0.25 * fused_P, atol=1e-5, rtol=0)
    # The bank is the model: nothing has to be copied back.
    fused = server.layout.views(server.bank_SP[2])
    assert all(torch.equal(tensor, fused[name]) for name, tensor in server.model.routed_experts[1].named_parameters())


def test_contributions_are_the_weights_that_each_client_has_in_each_expert(reserved):
    """The row that fusion gives is the same mixture of all uploads so far: fusion is linear."""
    server, uploads = perturbed_server()
    strategy = FedMoE(settings())
    start_SP = server.bank_SP.clone()
    update(strategy, server, uploads, reserved, 0, seed=1)
    others = Uploads([1, 3], uploads.rows_mP[:2] + 0.1, uploads.integers[:2], uploads.num_examples_m[:2])
    update(strategy, server, others, reserved, 1, seed=2)
    contribution_SM = server.tensors["contribution_SM"]
    rows = {
        4: uploads.rows_mP[0],
        0: uploads.rows_mP[1],
        2: uploads.rows_mP[2],
        1: others.rows_mP[0],
        3: others.rows_mP[1],
    }
    for s in range(3):
        expected_P = sum(contribution_SM[s, client] * row_P for client, row_P in rows.items())
        expected_P = expected_P + (1 - contribution_SM[s].sum()) * start_SP[s]
        torch.testing.assert_close(server.bank_SP[s], expected_P, atol=1e-5, rtol=0)
    assert contribution_SM[0, 1].item() == pytest.approx(0.6 / 2)
    assert contribution_SM[0, 4].item() == pytest.approx(0.4 * 0.6 / 3)


def test_warmed_up_averages_start_as_running_means(reserved):
    server, uploads = perturbed_server()
    strategy = FedMoE(settings(fusion_warmup=True, main_fusion_rate=0.2))
    update(strategy, server, uploads, reserved, 0, seed=1)
    torch.testing.assert_close(server.bank_SP[0], uploads.rows_mP.mean(0))
    second = Uploads(uploads.clients, uploads.rows_mP + 1, uploads.integers, uploads.num_examples_m)
    update(strategy, server, second, reserved, 1, seed=2)
    torch.testing.assert_close(server.bank_SP[0], uploads.rows_mP.mean(0) + 0.5)


def test_the_gate_learns_and_nothing_else_does(reserved):
    server, _ = perturbed_server()
    model, outputs = server.model, expert_outputs(ServerStep(server, reserved, 0, 0))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = train_gate(GateFit(model), outputs, reserved, 3, 1e-2, 0.0, 8, 1e-3, 0.1, seed=0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"gate.weight", "gate.bias", "alpha_logit"}
    assert report["gate_grad_norm"] > 1e-4
    longer = train_gate(GateFit(model), outputs, reserved, 30, 1e-2, 0.0, 8, 0.0, 0.0, seed=1)
    assert longer["gate_loss"] < report["gate_loss"]


def test_cached_outputs_train_the_gate_as_recomputed_ones_do(reserved):
    trained = []
    for recompute in (False, True):
        server, _ = perturbed_server()
        model, outputs = server.model, expert_outputs(ServerStep(server, reserved, 0, 0))
        generator = torch.Generator().manual_seed(5)
        optimizer = torch.optim.AdamW(
            [{"params": [*model.gate.parameters()]}, {"params": [model.alpha_logit]}], lr=1e-2, weight_decay=0.0
        )
        if recompute:
            config = model.config
            config.entropy_weight, config.balance_weight = 0.01, 0.1
            for parameter in [p for expert in model.experts for p in expert.parameters()]:
                parameter.requires_grad_(False)
            for indices in torch.randperm(len(reserved), generator=generator).split(8):
                model.train()
                model(**reserved.batch(indices)).loss.backward()
                torch.nn.utils.clip_grad_norm_([*model.gate.parameters(), model.alpha_logit], 1.0)
                optimizer.step()
                optimizer.zero_grad()
        else:
            train_gate(GateFit(model), outputs, reserved, 1, 1e-2, 0.0, 8, 0.01, 0.1, seed=5)
        trained.append((model.gate.weight.detach(), model.alpha.detach()))
    torch.testing.assert_close(trained[0][0], trained[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(trained[0][1], trained[1][1], atol=1e-5, rtol=0)


def test_entropy_of_the_gate_falls_with_beta(reserved):
    entropies = []
    for beta in (0.0, 0.1, 1.0):
        server, _ = perturbed_server()
        outputs = expert_outputs(ServerStep(server, reserved, 0, 0))
        train_gate(GateFit(server.model), outputs, reserved, 20, 1e-2, 0.0, 8, beta, 0.0, seed=0)
        Q_RK = gate_probabilities(server.model, outputs, reserved)
        entropies.append(-(Q_RK * Q_RK.clamp_min(1e-12).log()).sum(1).mean().item())
    assert entropies[0] > entropies[1] > entropies[2]


def test_balance_keeps_all_experts_in_use(reserved):
    """Entropy alone collapses the gate onto one expert; the balance term spreads the examples again."""
    shares = []
    for balance_weight in (0.0, 2.0):
        server, _ = perturbed_server()
        outputs = expert_outputs(ServerStep(server, reserved, 0, 0))
        train_gate(GateFit(server.model), outputs, reserved, 60, 1e-2, 0.0, 8, 1.0, balance_weight, seed=0)
        shares.append(gate_probabilities(server.model, outputs, reserved).mean(0).min().item())
    assert shares[0] < 0.05 < 0.3 < shares[1]


def test_paper_synchronisation_moves_participants_by_equation_13(reserved):
    server, uploads = perturbed_server()
    strategy = FedMoE(settings(synchronisation="after_round"))
    strategy.setup(server, num_clients=5)
    initial_P = server.bank_SP[0].clone()
    update(strategy, server, uploads, reserved, 0, seed=1)
    outputs = expert_outputs(ServerStep(server, reserved, 0, 0))
    W_Km = correlate(
        gate_probabilities(server.model, outputs, reserved),
        probe_all(server, uploads, reserved),
        "relevance",
    )
    W_c_Sm = client_mixture(W_Km, server.model.alpha.detach(), 1)
    rows = strategy.synchronise(server, uploads)
    assert rows.keys() == {4, 0, 2}
    for place, client in enumerate(uploads.clients):
        mixture_P = sum(W_c_Sm[s, place] * server.bank_SP[s] for s in range(3))
        torch.testing.assert_close(rows[client], 0.25 * uploads.rows_mP[place] + 0.75 * mixture_P, atol=1e-5, rtol=0)
    # A client that never took part still has the common start; one that did has what it kept.
    assert torch.equal(strategy.download(server, 3, None), initial_P)
    assert strategy.download(server, 4, rows[4]) is rows[4]


def test_without_synchronisation_clients_go_on_from_their_own_models(reserved):
    server, uploads = perturbed_server()
    strategy = FedMoE(settings(synchronisation="none"))
    strategy.setup(server, num_clients=5)
    initial_P = server.bank_SP[0].clone()
    update(strategy, server, uploads, reserved, 0, seed=1)
    rows = strategy.synchronise(server, uploads)
    assert all(torch.equal(rows[client], row_P) for client, row_P in zip((4, 0, 2), uploads.rows_mP, strict=True))
    assert strategy.download(server, 4, rows[4]) is rows[4]
    assert torch.equal(strategy.download(server, 3, None), initial_P) and not torch.equal(initial_P, server.bank_SP[0])


def test_download_mixture_uses_the_last_known_column(reserved):
    server, uploads = perturbed_server()
    strategy = FedMoE(settings(synchronisation="download_mixture"))
    strategy.setup(server, num_clients=5)
    assert torch.equal(strategy.download(server, 4, None), server.bank_SP[0])
    update(strategy, server, uploads, reserved, 0, seed=1)
    column_S = server.tensors["mixture_SM"][:, 4]
    assert column_S.sum().item() == pytest.approx(1)
    torch.testing.assert_close(strategy.download(server, 4, None), column_S @ server.bank_SP)
    assert torch.equal(strategy.download(server, 3, None), server.bank_SP[0])


def test_a_mixture_without_main_expert_starts_clients_from_the_mean_of_experts(reserved):
    server, uploads = perturbed_server(num_main_experts=0, gate=tiny_bert(2))
    torch.testing.assert_close(FedMoE(settings()).download(server, 0, None), server.bank_SP.mean(0))
    report = update(FedMoE(settings()), server, uploads, reserved, 0, seed=1)
    assert report["gate_grad_norm"] > 0


def test_clients_start_from_a_tuned_copy_while_the_experts_stay_as_they_are(reserved):
    (plain, uploads), (tuned, _) = perturbed_server(), perturbed_server()
    update(FedMoE(settings()), plain, uploads, reserved, 0, seed=1)
    strategy = FedMoE(settings(download_epochs=2, expert_learning_rate=1e-3))
    assert torch.equal(strategy.download(tuned, 0, None), tuned.bank_SP[0])
    update(strategy, tuned, uploads, reserved, 0, seed=1)
    assert torch.equal(tuned.bank_SP, plain.bank_SP)
    assert_equal_states(state(tuned.model), state(plain.model))
    by_hand = copy_module(plain.model.experts[0])
    fine_tune(by_hand, reserved, 2, 1e-3, 0.0, 32, seed=1)
    start_P = strategy.download(tuned, 0, None)
    assert torch.equal(start_P, plain.layout.read(by_hand)) and not torch.equal(start_P, plain.bank_SP[0])


def test_experts_are_fine_tuned_on_what_the_gate_sends_them(reserved):
    server, uploads = perturbed_server()
    plain, tuned = (perturbed_server()[0] for _ in range(2))
    update(FedMoE(settings()), plain, uploads, reserved, 0, seed=1)
    report = update(FedMoE(settings(expert_epochs=1, expert_learning_rate=1e-3)), tuned, uploads, reserved, 0, seed=1)
    assert report["expert_loss"] > 0
    moved_S = (tuned.bank_SP - plain.bank_SP).abs().amax(1)
    assert (moved_S > 1e-4).all()
    assert server.bank_SP.shape == tuned.bank_SP.shape


@pytest.mark.parametrize("gate", ["main_features", "model"])
def test_bf16_is_that_of_the_servers_models_too(gate, tmp_path):
    def run(bf16):
        model = FedMoEForSequenceClassification.from_expert(
            tiny_expert(), gate=tiny_gate(2) if gate == "model" else gate, num_routed_experts=2
        )
        args = tiny_args(tmp_path, rounds=1, bf16=bf16)
        run = FederatedTrainer(model, args, tiny_federation(), FedMoE(FedMoESettings(expert_epochs=1)))
        run.train()
        return run

    half = run(True)
    federation = half._federation()
    found = expert_outputs(federation.step(0))
    inputs = federation.participants.reserved.inputs[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = [expert(**inputs).logits.float() for expert in half.model.experts]
    assert torch.equal(found.logits_RSC[: len(logits[0])], torch.stack(logits, dim=1))
    (mine,), (theirs,) = half.rounds, run(False).rounds
    for name in ("gate_loss", "expert_loss"):
        assert mine.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-2)
        assert mine.metrics[name] != theirs.metrics[name]
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())


# Uploads that have no weight, and weights that are bounded


def test_who_comes_back_worse_than_it_was_sent_has_no_weight(reserved):
    server, uploads = perturbed_server()
    before_SP = server.bank_SP.clone()
    mean_m = probe_all(server, uploads, reserved).mean(1)
    sent = probe(server.worker, server.layout, server.bank_SP[0], reserved).mean()
    floor = (mean_m.sort().values[:2].mean() / sent).item()  # above the worst, below the second
    good = [place for place in range(3) if place != mean_m.argmin()]
    report = update(FedMoE(settings(reserved_floor=floor)), server, uploads, reserved, 0, seed=1)
    assert report["clients_below_floor"] == 1.0
    M = uploads.rows_mP[good]
    torch.testing.assert_close(server.bank_SP[0], 0.4 * before_SP[0] + 0.6 * (M[0] + M[1]) / 2)
    assert server.tensors["contribution_SM"][:, uploads.clients[mean_m.argmin()]].tolist() == [0.0] * 3
    torch.testing.assert_close(server.tensors["contribution_SM"].sum(1), torch.tensor([0.6, 0.25, 0.25]))


def test_a_round_in_which_nobody_has_weight_leaves_the_experts_as_they_are(reserved):
    server, uploads = perturbed_server()
    before_SP = server.bank_SP.clone()
    report = update(FedMoE(settings(reserved_floor=100.0)), server, uploads, reserved, 0, seed=1)
    assert report["clients_below_floor"] == 3.0 and report["gate_loss"] > 0
    assert torch.equal(server.bank_SP, before_SP) and not server.tensors["contribution_SM"].any()


def test_no_client_is_more_of_an_expert_than_the_cap(reserved):
    server, uploads = perturbed_server()
    sharp = settings(max_expert_share=0.4, correlation="sum")
    update(FedMoE(sharp), server, uploads, reserved, 0, seed=1)
    taken_Sm = server.tensors["contribution_SM"][:, uploads.clients]
    torch.testing.assert_close(taken_Sm.sum(1), torch.tensor([0.6, 0.25, 0.25]))
    assert taken_Sm[1:].max() <= 0.25 * 0.4 + 1e-6 and taken_Sm[1:].max() > 0.25 * 0.39


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reserved_floor": 0.0}, "`reserved_floor` is 0.0: give more than 0"),
        (
            {"reserved_floor": 1.0, "synchronisation": "none"},
            "`reserved_floor` is 1.0, but with `synchronisation` = 'n",
        ),
        ({"max_expert_share": 1.5}, "`max_expert_share` is 1.5: give a share above 0"),
        ({"max_expert_share": True}, "`max_expert_share` is True: give a number"),
    ],
)
def test_bounds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes).resolve_preset()
