"""Fed-MoE of groups: who is in which, what is averaged over whom, and who is served by what."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedMoEGroups, client_statistics, fedmoe_groups
from hf_fedmoe.strategies.fedmoe_groups import NOBODY
from hf_fedmoe.strategies.gate_training import ALPHAS, TEMPERATURES
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_gated_experts,
    tiny_mixture,
    tiny_rows,
)


CLIENTS, SIZE = 6, 60


def federation_of_groups() -> FederatedDataset:
    """Six clients: to the odd ones every class is the next one."""
    rows = tiny_rows(CLIENTS * SIZE + 30)
    labels = np.array(rows["label"])
    parts = [np.arange(client * SIZE, (client + 1) * SIZE) for client in range(CLIENTS)]
    for client in range(1, CLIENTS, 2):
        labels[parts[client]] = (labels[parts[client]] + 1) % 3
    rows = rows.remove_columns("label").add_column("label", labels)
    return FederatedDataset(rows, parts, reserved=np.arange(CLIENTS * SIZE, CLIENTS * SIZE + 30))


def prototypes(num_groups: int = 2, **config) -> FedMoEForSequenceClassification:
    return tiny_mixture(num_groups, gate="prototypes", **config)


def make_trainer(tmp_path, strategy=None, data=None, model=None, **changes) -> FederatedTrainer:
    args = tiny_args(tmp_path, **{"clients_per_round": CLIENTS, "rounds": 2, "learning_rate": 1e-2} | changes)
    strategy = strategy or FedMoEGroups(statistics_size=16)
    return FederatedTrainer(model or prototypes(), args, data or federation_of_groups(), strategy)


def trained(*args, **changes):
    run = make_trainer(*args, **changes)
    run.train()
    return run


def test_groups_of_clients_to_whom_labels_mean_something_else_are_found(tmp_path):
    run = trained(tmp_path, rounds=1)
    group_M = run._left[0]["group_M"]
    assert group_M.unique().numel() == 2
    assert (group_M[::2] == group_M[0]).all() and (group_M[1::2] == group_M[1]).all()
    assert sorted(run.rounds[0].metrics[f"expert_{k}_clients"] for k in range(2)) == [3, 3]


def test_a_round_by_hand(tmp_path):
    """The trunk is the mean of all participants, a head that of its group, and nothing else moves."""
    federation = make_trainer(tmp_path)._federation()
    strategy, server = federation.strategy, federation.server
    strategy.setup(server, CLIENTS)
    trained_rows = {}
    train_client = strategy.train_client

    def recording(local, task):
        payload, kept = train_client(local, task)
        trained_rows[task.client] = payload.row_P.clone()
        return payload, kept

    strategy.train_client = recording
    federation.draw = lambda *_: [0, 1, 2, 4]
    federation.run_round(0, 4)
    group_M = server.tensors["group_M"]
    assert (group_M[[3, 5]] == NOBODY).all() and group_M[1] != group_M[0]
    members = {1 + int(group_M[0]): [0, 2, 4], 1 + int(group_M[1]): [1]}
    mean = server.layout.views(torch.stack([trained_rows[c] for c in (0, 1, 2, 4)]).mean(0))
    for s, row_P in enumerate(server.bank_SP):
        head = server.layout.views(torch.stack([trained_rows[c] for c in members.get(s, (0, 1, 2, 4))]).mean(0))
        for name, view in server.layout.views(row_P).items():
            expected = head[name] if name.startswith("classifier.") else mean[name]
            torch.testing.assert_close(view, expected, rtol=1e-5, atol=1e-6)
    before_SP = server.bank_SP.clone()
    federation.draw = lambda *_: [0, 2]
    federation.run_round(1, 2)
    other = 1 + int(group_M[1])
    views, before = server.layout.views(server.bank_SP[other]), server.layout.views(before_SP[other])
    main = server.layout.views(server.bank_SP[0])
    for name, view in views.items():  # nobody of the other group took part: its head stays, its trunk does not
        assert torch.equal(view, before[name] if name.startswith("classifier.") else main[name])


def federation_of_other_inputs() -> FederatedDataset:
    """Six clients: the odd ones' texts have one token at every other place, with the same labels."""
    rows = tiny_rows(CLIENTS * SIZE + 30)
    input_ids = np.array(rows["input_ids"])
    for client in range(1, CLIENTS, 2):
        input_ids[client * SIZE : (client + 1) * SIZE, ::2] = 3
    features = rows.features
    rows = rows.remove_columns("input_ids").add_column("input_ids", input_ids.tolist()).cast(features)
    parts = [np.arange(client * SIZE, (client + 1) * SIZE) for client in range(CLIENTS)]
    return FederatedDataset(rows, parts, reserved=np.arange(CLIENTS * SIZE, CLIENTS * SIZE + 30))


@pytest.mark.parametrize(
    ("federation", "same"), [(federation_of_groups, ("classifier",)), (federation_of_other_inputs, ("",))]
)
def test_experts_are_whole_where_inputs_of_groups_differ_and_heads_where_only_labels_do(tmp_path, federation, same):
    runs = [
        trained(tmp_path / str(own), FedMoEGroups(own, statistics_size=16), data=federation(), save_strategy="no")
        for own in (None, same, ("classifier",) if same == ("",) else ("",))
    ]
    first, second, third = (run.model.state_dict() for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, third[name]) for name, tensor in first.items())
    group_M = runs[0]._left[0]["group_M"]
    assert (group_M[::2] == group_M[0]).all() and (group_M[1::2] == 1 - group_M[0]).all()
    distances = [each.metrics["input_distance"] for each in runs[0].rounds]
    assert distances[0] == distances[1] and (distances[0] > 1 if same == ("",) else abs(distances[0]) < 0.1)


def test_statistics_travel_once(tmp_path):
    run = trained(tmp_path, rounds=2)
    first, second = run.rounds
    expert = sum(p.numel() * 4 for p in run.model.experts[0].parameters())
    statistics = (3 + 3 * 16 + 16 * 16) * 8
    assert first.bytes_up == CLIENTS * (expert + statistics) and second.bytes_up == CLIENTS * expert
    start = run._left[0]["start_P"].nbytes
    assert first.bytes_down == CLIENTS * (expert + start) and second.bytes_down == CLIENTS * expert


def test_one_group_is_fedavg(tmp_path):
    strategy = FedMoEGroups(final_expert_epochs=0)
    run = trained(tmp_path / "groups", strategy, model=prototypes(1), rounds=3, clients_per_round=3)
    averaged = trained(tmp_path / "fedavg", FedAvg(), model=tiny_expert(), rounds=3, clients_per_round=3)
    for expert in run.model.experts:
        assert_equal_states(state(expert), state(averaged.model), atol=1e-6, rtol=0)


def test_clients_are_served_by_the_expert_of_their_group_and_a_new_one_by_the_best(tmp_path):
    data = hold_out_client_tests(federation_of_groups(), 0.25, unseen_share=0.34)
    strategy = FedMoEGroups(own=("",), statistics_size=16)
    run = trained(tmp_path, strategy, data, rounds=4, num_train_epochs=2, clients_per_round=data.num_clients)
    federation = run._federation_of_the_last_round()
    group_M = federation.server.tensors["group_M"]
    for client in range(data.num_clients):
        expert = run.model.experts[1 + int(group_M[client])]
        assert_equal_states(state(federation.personal_model(client)), state(expert))
    local, server = federation.local_trainer, federation.server
    for client in range(data.num_clients, CLIENTS):
        own = federation.participants.client_data(client)
        losses = [local.mean_loss(own, row_P, {}, 0) for row_P in server.bank_SP[1:]]
        best = run.model.experts[1 + losses.index(min(losses))]
        assert_equal_states(state(federation.personal_model(client)), state(best))


def test_one_group_of_one_known_client(tmp_path):
    run = trained(tmp_path, model=prototypes(1), rounds=1, clients_per_round=1)
    (client,) = run.rounds[0].clients
    assert run._left[0]["group_M"].tolist() == [0 if c == client else NOBODY for c in range(CLIENTS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sent: sent["gram_dd"].copy_(-1e6 * torch.eye(16)), "its statistics have a variance below 0"),
        (lambda sent: sent["gram_dd"][0, 1].add_(1e6), "its statistics have a variance below 0"),
        (lambda sent: sent["count_C"].neg_(), "its statistics are of .* rows by class, where there are 60"),
        (lambda sent: sent["count_C"].zero_(), r"its statistics are of \[0.0, 0.0, 0.0\] rows by class"),
        (
            lambda sent: sent["gram_dd"].add_(1e40 * torch.eye(16).double()),
            r"its statistics hold 1e\+40, too much to compute",
        ),
        (lambda sent: sent["sum_Cd"].mul_(1e200), "`sum_Cd` holds .*, too much to compute with"),
    ],
)
def test_statistics_that_no_rows_have_are_refused_by_name(tmp_path, change, message):
    class Lies(FedMoEGroups):
        def train_client(self, local, task):
            payload, retained = super().train_client(local, task)
            if task.client == 2 and payload.tensors:
                change(payload.tensors)
            return payload, retained

    run = trained(tmp_path, Lies(statistics_size=16), rounds=1)
    assert list(run.rounds[0].refused) == [2]
    assert re.search(message, run.rounds[0].refused[2]), run.rounds[0].refused
    group_M = run._left[0]["group_M"]
    assert group_M[2] == NOBODY and (group_M[[0, 4]] == group_M[0]).all() and group_M[1] != group_M[0]


def test_what_it_needs_is_said_before_the_run(tmp_path, monkeypatch):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, **changes)

    refused("Groups have the experts of a mixture, `model` is a BertForSequence", model=tiny_expert())
    refused("`num_main_experts` is 0, but the mean", model=tiny_gated_experts())
    refused("`model` has adapters: leave `peft_config` out", model=tiny_mixture(peft_config=LoraConfig(r=2)))
    refused(
        "There are 4 clients for `num_routed_experts` = 5 groups",
        model=prototypes(5),
        data=tiny_federation(),
        clients_per_round=4,
    )
    refused(r"`own` is \('head',\), with which no tensor of a Bert", strategy=FedMoEGroups(own=("head",)))
    with monkeypatch.context() as patch:
        patch.setattr(client_statistics, "classification_head", lambda model: None)
        refused("BertForSequenceClassification has no linear layer with `num_labels` = 3 outputs: take a model")
    refused("`gate` is 'main_features' with 1 prototypes of each expert, but", model=tiny_mixture())
    for name, value in (("statistics_size", 0), ("final_expert_epochs", -1), ("expert_batch_size", 0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}: give at least"):
            FedMoEGroups(**{name: value})
    with pytest.raises(ValueError, match="`statistics_size` is True: give a whole number"):
        FedMoEGroups(statistics_size=True)
    with pytest.raises(ValueError, match="`own` is 'classifier': give a list of texts"):
        FedMoEGroups("classifier")
    with pytest.raises(ValueError, match="`expert_learning_rate` is 0: give more"):
        FedMoEGroups(expert_learning_rate=0)
    assert not FedMoEGroups(calibrates=False, final_expert_epochs=0).needs_reserved_set()
    assert FedMoEGroups(final_expert_epochs=0).needs_reserved_set()
    assert FedMoEGroups(calibrates=False).needs_reserved_set()


def test_the_gate_is_the_likelihood_of_groups_in_the_features_of_the_start(tmp_path):
    """Whatever the experts learn: the gate reads what the start made of an input."""
    start = prototypes()
    run = trained(tmp_path, FedMoEGroups(statistics_size=16, calibrates=False), rounds=3)
    tensors, model = run._left[0], run.model
    for name, tensor in state(model.gate).items():
        assert torch.equal(tensor, state(start.gate)[name]) == (name != "classifier.weight"), name
    group_M, count_MC, sum_MCd = (tensors[name] for name in ("group_M", "count_MC", "sum_MCd"))
    member_KM = torch.nn.functional.one_hot(group_M).T.double()
    weights_Nd, bias_N = client_statistics.prototype_scores(
        member_KM @ count_MC, torch.einsum("km,mcd->kcd", member_KM, sum_MCd), tensors["gram_dd"]
    )
    batch = {name: torch.tensor(federation_of_groups().reserved[:8][name]) for name in ("input_ids", "attention_mask")}
    features_Bd = client_statistics.head_features(start.gate.eval(), client_statistics.head_of(start.gate), batch, 16)
    expected_BK = (features_Bd.double() @ weights_Nd.T + bias_N).unflatten(1, (2, 3)).logsumexp(-1).softmax(-1)
    with torch.no_grad():
        found_BK = model.eval()(**batch).gate_probs
    torch.testing.assert_close(found_BK.double(), expected_BK, rtol=0, atol=1e-4)
    assert model.alpha.item() == pytest.approx(0.5) and expected_BK.std(0).min() > 1e-3


def test_temperature_and_alpha_are_the_best_of_a_few(tmp_path):
    run = trained(tmp_path, rounds=2, num_train_epochs=2)
    temperature, alpha = (run.rounds[-1].metrics[name] for name in ("gate_temperature", "alpha"))
    assert temperature in TEMPERATURES and any(alpha == pytest.approx(each) for each in ALPHAS)
    reserved = run._federation_of_the_last_round().participants.reserved

    def loss() -> float:
        with torch.no_grad():
            logits = [run.model(**inputs, dense=True).logits for inputs in reserved.inputs]
        return torch.nn.functional.cross_entropy(torch.cat(logits), reserved.labels_R).item()

    run.model.eval()
    best = loss()
    for other in ALPHAS:
        run.model.alpha_logit.data.fill_(torch.tensor(other).logit())
        assert loss() > best - 1e-6
    run.model.alpha_logit.data.fill_(torch.tensor(alpha).logit())
    head = client_statistics.head_of(run.model.gate)
    weight, bias = head.weight.data.clone(), run.model.gate_bias_N.data.clone()
    for other in TEMPERATURES:
        head.weight.data.copy_(weight * temperature / other)
        run.model.gate_bias_N.data.copy_(bias * temperature / other)
        assert loss() > best - 1e-6


def test_experts_learn_from_the_reserved_set_at_the_end(tmp_path):
    plain = trained(tmp_path / "plain", FedMoEGroups(statistics_size=16, final_expert_epochs=0))
    tuned = trained(tmp_path / "tuned", FedMoEGroups(statistics_size=16))
    assert_equal_states(state(plain.model.gate), state(tuned.model.gate))
    reserved = plain._federation_of_the_last_round().participants.reserved
    for before, after in zip(plain.model.experts, tuned.model.experts, strict=True):
        losses = []
        for expert in (before, after):
            with torch.no_grad():
                logits = torch.cat([expert.eval()(**inputs).logits for inputs in reserved.inputs])
            losses.append(torch.nn.functional.cross_entropy(logits, reserved.labels_R).item())
        assert losses[1] < losses[0]


def test_at_the_end_experts_learn_from_examples_of_their_groups(tmp_path, monkeypatch):
    """Weighs by p(group | input) p(label | input, group): whose labels mean the same."""
    weights = []

    def keep(step, given, *settings):
        weights.extend(given)
        with torch.no_grad():
            outputs = [
                step.server.model(**inputs, dense=True, output_expert_logits=True) for inputs in step.reserved.inputs
            ]
        gate_RK = torch.cat([found.gate_probs for found in outputs])
        P_RKC = torch.cat([found.expert_logits[:, 1:] for found in outputs]).softmax(-1)
        likely_RK = gate_RK * P_RKC[torch.arange(len(P_RKC)), :, step.reserved.labels_R]
        share_RK = likely_RK / likely_RK.sum(1, keepdim=True)
        weights.append(share_RK / share_RK.mean(0))
        return []

    monkeypatch.setattr(fedmoe_groups, "fine_tune_experts", keep)
    trained(tmp_path, num_train_epochs=3)
    main, *routed, expected_RK = weights
    assert main is None
    torch.testing.assert_close(torch.stack(routed, 1), expected_RK, rtol=1e-4, atol=1e-5)
    assert expected_RK.std(0).min() > 1e-3
