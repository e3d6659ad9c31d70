import json
from pathlib import Path

import pytest
import torch

from hf_fedmoe.models import (
    FedMoEForSequenceClassification,
    FedMoEOutput,
    client_prior,
    dense_mixture,
    gating_entropy,
    load_imbalance,
    select_experts,
)
from hf_fedmoe.models.mixture_fedmoe import log_prior
from tests.tiny_models import make_different, text_batch, tiny_bert


VECTORS = Path(__file__).parents[1] / "data" / "mixture.json"


@pytest.fixture(scope="module")
def vectors() -> dict:
    values = json.loads(VECTORS.read_text())
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in values.items()}


@pytest.fixture(scope="module")
def logits_BSC(vectors) -> torch.Tensor:
    return torch.cat([vectors["P_main_BC"][:, None], vectors["P_routed_BKC"]], dim=1).log() + 3.0


def test_dense_mixture_vectors(vectors, logits_BSC):
    logits_BC = dense_mixture(logits_BSC, vectors["Q_BK"], vectors["alpha"], 1)
    torch.testing.assert_close(logits_BC, vectors["logits_BC"], rtol=0, atol=1e-10)
    torch.testing.assert_close(logits_BC.exp(), vectors["dense_BC"], rtol=0, atol=1e-10)
    loss = torch.nn.functional.nll_loss(logits_BC, vectors["labels_B"].long())
    assert loss.item() == pytest.approx(vectors["cross_entropy"], abs=1e-10)
    entropy = gating_entropy(vectors["Q_BK"])
    assert entropy.item() == pytest.approx(vectors["gating_entropy"], abs=1e-10)
    assert (loss + vectors["beta"] * entropy).item() == pytest.approx(vectors["gate_loss"], abs=1e-10)
    assert load_imbalance(vectors["Q_BK"]).item() == pytest.approx(vectors["balance_kl"], abs=1e-10)


@pytest.mark.parametrize("top_l", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["softmax", "renormalize"])
def test_top_l_vectors(vectors, logits_BSC, top_l, weighting):
    expected = vectors["top_l"][str(top_l)]
    weights_BL, experts_BL = select_experts(vectors["Q_BK"], top_l, weighting)
    assert experts_BL.tolist() == expected["experts"]
    rows_B1 = torch.arange(len(experts_BL))[:, None]
    chosen_BSC = torch.cat([logits_BSC[:, :1], logits_BSC[:, 1:][rows_B1, experts_BL]], dim=1)
    probs_BC = dense_mixture(chosen_BSC, weights_BL, vectors["alpha"], 1).exp()
    expected_BC = torch.tensor(expected[weighting], dtype=torch.float64)
    torch.testing.assert_close(probs_BC, expected_BC, rtol=0, atol=1e-10)


def test_dense_mixture_without_and_with_several_main_experts(vectors, logits_BSC):
    probs_BSC, gate_BK = logits_BSC.softmax(-1), vectors["Q_BK"]
    routed_BC = torch.einsum("bk,bkc->bc", gate_BK, probs_BSC[:, 1:])
    none = dense_mixture(logits_BSC[:, 1:], gate_BK, 0.4, 0).exp()
    torch.testing.assert_close(none, routed_BC, rtol=0, atol=1e-12)
    three_BSC = torch.cat([logits_BSC[:, 1:], logits_BSC[:, 1:]], dim=1)
    three = dense_mixture(three_BSC, gate_BK, 0.4, 3).exp()
    torch.testing.assert_close(three, 0.6 * probs_BSC[:, 1:].mean(1) + 0.4 * routed_BC, rtol=0, atol=1e-12)


def test_mixture_of_logits(vectors, logits_BSC):
    gate_BK = vectors["Q_BK"]
    expected = 0.6 * logits_BSC[:, 0] + 0.4 * torch.einsum("bk,bkc->bc", gate_BK, logits_BSC[:, 1:])
    mixed_BC = dense_mixture(logits_BSC, gate_BK, 0.4, 1, mix="logits")
    torch.testing.assert_close(mixed_BC, expected.log_softmax(-1), rtol=0, atol=1e-12)


def test_extreme_inputs_stay_finite_with_finite_gradients():
    logits_BSC = torch.tensor([[[0.0, 900.0], [900.0, 0.0], [0.0, 1e4]]], requires_grad=True)
    scores_BK = torch.tensor([[0.0, 1e4]], requires_grad=True)
    gate_BK = scores_BK.softmax(-1)
    mixed_BC = dense_mixture(logits_BSC, gate_BK, torch.tensor([0.5]), 1)
    (mixed_BC.sum() + gating_entropy(gate_BK) + load_imbalance(gate_BK)).backward()
    assert mixed_BC.isfinite().all()
    assert logits_BSC.grad.isfinite().all()
    assert scores_BK.grad.isfinite().all()


def test_entropy_and_imbalance_at_their_bounds():
    uniform, one = torch.full((4, 5), 0.2), torch.eye(5)[[2, 2, 2]]
    assert gating_entropy(uniform).item() == pytest.approx(torch.tensor(5.0).log().item())
    assert gating_entropy(one).item() == 0.0
    assert load_imbalance(uniform).item() == pytest.approx(0.0, abs=1e-6)
    assert load_imbalance(one).item() == pytest.approx(torch.tensor(5.0).log().item())
    assert load_imbalance(torch.eye(5)).item() == pytest.approx(0.0, abs=1e-6)


def test_a_client_tells_by_its_rows_which_expert_suits_it():
    """One step by hand, then its limit: rows that one expert alone finds likely leave the others a row's doubt."""
    P_BKC = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]], dtype=torch.float64)
    gate_BK = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    mains_B1C = torch.zeros(2, 1, 2, dtype=torch.float64)
    output = FedMoEOutput(gate_probs=gate_BK, expert_logits=torch.cat([mains_B1C, P_BKC.log()], 1))
    found_K = client_prior(output, torch.tensor([0, 1]), steps=1)
    share = [0.25 * 0.9 / (0.25 * 0.9 + 0.75 * 0.5), 0.8 / (0.8 + 0.4)]
    assert found_K.tolist() == pytest.approx([(sum(share) + 0.5) / 3, (2.5 - sum(share)) / 3])
    sure_BKC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64).expand(8, 3, 2)
    output = FedMoEOutput(gate_probs=torch.full((8, 3), 1 / 3).double(), expert_logits=sure_BKC.log())
    found_K = client_prior(output, torch.zeros(8, dtype=torch.int64))
    assert found_K.tolist() == pytest.approx([25 / 27, 1 / 27, 1 / 27])
    with pytest.raises(ValueError, match="call the mixture with `output_expert_logits=True`"):
        client_prior(FedMoEOutput(gate_probs=gate_BK), torch.tensor([0, 1]))


@pytest.mark.parametrize("dense", [True, False])
def test_a_prior_weighs_what_the_gate_says(dense):
    model = make_different(FedMoEForSequenceClassification.from_expert(tiny_bert()))
    prior_K = torch.tensor([0.2, 0.0, 0.8])
    with torch.no_grad():
        plain = model(**text_batch(), dense=True).gate_probs
        found = model(**text_batch(), dense=dense, client_prior=prior_K)
    expected_BK = plain * prior_K / (plain * prior_K).sum(1, keepdim=True)
    torch.testing.assert_close(found.gate_probs, expected_BK)
    if not dense:
        assert torch.equal(found.selected_experts[:, 0], expected_BK.argmax(1)) and (found.selected_experts != 1).all()
    each_BK = prior_K.expand(len(plain), 3)
    with torch.no_grad():
        assert torch.equal(model(**text_batch(), dense=dense, client_prior=each_BK).logits, found.logits)
        same = model(**text_batch(), dense=dense, client_prior=torch.full((3,), 1 / 3)).logits
        torch.testing.assert_close(same, model(**text_batch(), dense=dense).logits)


def test_a_text_of_no_tokens_is_refused():
    model = FedMoEForSequenceClassification.from_expert(tiny_bert(), num_routed_experts=2)
    with pytest.raises(ValueError, match=r"`input_ids` has the shape \(1, 0\), nothing to read: leave empty"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.int64))


def test_priors_and_labels_that_are_none_are_refused():
    output = FedMoEOutput(gate_probs=torch.full((2, 3), 1 / 3), expert_logits=torch.zeros(2, 4, 5))
    for labels, message in (
        ([0, 5], "goes from 0 to 5: classes are 0 to 4"),
        ([0, -1], "goes from -1 to 0: classes are 0 to 4"),
        ([0], r"has the shape \(1,\) and the type torch.int64: give one class, a whole number, for each of the 2"),
        ([[0, 1]], r"has the shape \(1, 2\)"),
        ([0.0, 1.0], r"has the shape \(2,\) and the type torch.float32: give one class, a whole number"),
    ):
        with pytest.raises(ValueError, match=f"`labels_B` {message}"):
            client_prior(output, torch.tensor(labels))
    logits_BK = torch.zeros(2, 3)
    for prior in ([1.0], [[0.5, 0.5]], [[1.0, 1.0, 1.0]] * 3, 1.0):
        with pytest.raises(ValueError, match=r"`client_prior` has the shape .* for each of the 3 routed experts"):
            log_prior(torch.tensor(prior), logits_BK)
    for prior in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match=r"`client_prior` is .*: give finite weights of 0 or more"):
            log_prior(torch.tensor(prior), logits_BK)
    assert (logits_BK + log_prior(torch.tensor([0, 0, 2]), logits_BK)).softmax(-1).tolist() == [[0, 0, 1]] * 2
