"""Processes that train a gate together take the steps of one."""

import threading

import pytest
import torch
from transformers import default_data_collator

from hf_fedmoe.data import ReservedSet
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.models.mixture_fedmoe import dense_mixture
from hf_fedmoe.strategies.gate_training import CapturedGateFit, GateFit, calibrated, train_gate
from hf_fedmoe.strategies.server_training import ExpertOutputs
from tests.eager_graphs import EagerGraph, stand_in
from tests.tiny_federation import assert_equal_states, state, tiny_expert, tiny_gate, tiny_rows
from tests.tiny_models import make_different


COUNT = 3


class Thread:
    """A process of three, as far as a gate's training needs one: what all hand in is added up."""

    barrier = threading.Barrier(COUNT, timeout=30)
    handed_in = [None] * COUNT

    def __init__(self, index):
        self.index, self.count = index, COUNT

    def all_reduce_(self, tensor):
        self.handed_in[self.index] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(sum(self.handed_in))
        self.barrier.wait()


def mixture():
    model = FedMoEForSequenceClassification.from_expert(tiny_expert(), gate=tiny_gate(2), num_routed_experts=2)
    for seed, expert in enumerate(model.experts):
        make_different(expert, 0.3, seed)
    return model


# A last batch of 1 row, of 2 and of 6: some processes have none of it.
@pytest.mark.parametrize("batch_size", [7, 10, 8])
def test_three_processes_end_like_one(batch_size):
    rows = tiny_rows(22)
    reserved = ReservedSet(rows, default_data_collator, 8)
    with torch.no_grad():
        logits = [mixture().expert_outputs(inputs)[0] for inputs in reserved.inputs]
    cached = ExpertOutputs(torch.cat(logits), None)
    settings = (cached, reserved, 2, 1e-2, 0.01, batch_size, 0.1, 0.3, 5)
    alone = mixture()
    report = train_gate(GateFit(alone), *settings)
    models, reports = [mixture() for _ in range(COUNT)], [None] * COUNT

    def run(index):
        reports[index] = train_gate(GateFit(models[index], Thread(index)), *settings)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    before = state(mixture())
    for index in range(COUNT):
        assert reports[index] == pytest.approx(report, rel=1e-4)
        # A key has no gradient but for rounding, which Adam divides by itself.
        assert_equal_states(state(models[index]), state(alone), rtol=1e-4, atol=1e-4)
        changed = {name for name, tensor in state(models[index]).items() if not torch.equal(tensor, before[name])}
        assert "alpha_logit" in changed and all(name.startswith(("gate.", "alpha_logit")) for name in changed)


def gates_on_features(monkeypatch):
    """Two mixtures alike and what their gates learn from, with a stand-in for graphs."""
    stand_in(monkeypatch)
    models = [FedMoEForSequenceClassification.from_expert(tiny_expert(), num_routed_experts=2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    reserved = ReservedSet(tiny_rows(22), default_data_collator, 8)
    generator = torch.Generator().manual_seed(0)
    logits_RSC = torch.randn(22, 3, models[0].config.num_labels, generator=generator)
    features_RH = torch.randn(22, models[0].gate.in_features, generator=generator)
    return models, reserved, ExpertOutputs(logits_RSC, features_RH)


def test_captured_steps_are_the_plain_ones_round_after_round(monkeypatch):
    (plain, captured), reserved, cached = gates_on_features(monkeypatch)
    fit = CapturedGateFit(captured)
    for seed in range(3):
        settings = (cached, reserved, 4, 1e-2, 0.01, 8, 0.1, 0.3, seed)
        expected, found = train_gate(GateFit(plain), *settings), train_gate(fit, *settings)
        assert found == pytest.approx(expected, rel=1e-5)
    assert_equal_states(state(plain), state(captured), rtol=0, atol=1e-6)
    # Two shapes of batches and the optimizer's step, for all rounds.
    assert len(EagerGraph.made) == 3


def test_other_weights_of_the_objective_are_captured_anew(monkeypatch):
    (plain, captured), reserved, cached = gates_on_features(monkeypatch)
    fit = CapturedGateFit(captured)
    for entropy_weight in (0.1, 5.0):
        settings = (cached, reserved, 4, 1e-2, 0.0, 8, entropy_weight, 0.0, 0)
        expected, found = train_gate(GateFit(plain), *settings), train_gate(fit, *settings)
        assert found == pytest.approx(expected, rel=1e-5)
    assert_equal_states(state(plain), state(captured), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.95), (3.0, 0.65), (5.0, 0.2)])
def test_calibration_finds_the_temperature_and_alpha_that_labels_were_drawn_by(temperature, alpha):
    generator = torch.Generator().manual_seed(0)
    logits_RSC = 3 * torch.randn(40_000, 3, 4, generator=generator)
    scores_RKN = 6 * torch.randn(40_000, 2, 2, generator=generator)
    Q_RK = (scores_RKN / temperature).logsumexp(-1).softmax(-1)
    P_RC = dense_mixture(logits_RSC, Q_RK, torch.tensor([alpha]), 1).exp()
    labels_R = torch.multinomial(P_RC, 1, generator=generator)[:, 0]
    assert calibrated(mixture(), logits_RSC, scores_RKN, labels_R) == (temperature, alpha)
