"""The parts of a mixture's answer, beside the model's own forward and sums by hand."""

import pytest
import torch

from hf_fedmoe.demo import explain
from hf_fedmoe.models import FedMoEForSequenceClassification
from tests.tiny_models import make_different, text_batch, tiny_bert


def mixture_of(**config):
    config = {"num_routed_experts": 4, "top_l": 2, "pad_token_id": 1} | config
    return make_different(FedMoEForSequenceClassification.from_expert(tiny_bert(3), **config), 0.5).eval()


def one_row():
    return text_batch(size=1)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("weighting", ["softmax", "renormalize"])
@pytest.mark.parametrize("mains", [1, 2])
def test_with_all_experts_on_it_is_the_models_own_answer(mix, weighting, mains):
    model = mixture_of(mix=mix, top_l_weighting=weighting, num_main_experts=mains)
    with torch.no_grad():
        own = model(**one_row(), output_expert_logits=True)
        assert torch.equal(model(**one_row()).logits, own.logits)
    found = explain(model, one_row(), [True] * (mains + 4))
    assert torch.equal(found.probabilities_C, own.logits[0].softmax(-1))
    assert torch.equal(found.gate_K, own.gate_probs[0])
    assert torch.equal(found.experts_SC, own.expert_logits[0].softmax(-1))
    assert found.weights_S.count_nonzero() == mains + 2 and abs(found.weights_S.sum() - 1) < 1e-6


def test_weights_and_experts_make_the_answer_when_probabilities_are_mixed():
    model = mixture_of(top_l_weighting="renormalize")
    for off in range(5):
        found = explain(model, one_row(), [index != off for index in range(5)])
        assert found.weights_S[off] == 0
        torch.testing.assert_close(found.weights_S @ found.experts_SC, found.probabilities_C)


def test_a_routed_expert_that_is_off_leaves_its_share_to_the_others():
    model = mixture_of(top_l_weighting="renormalize")
    full = explain(model, one_row(), [True] * 5)
    off = int(full.gate_K.argmax())
    found = explain(model, one_row(), [True, *(k != off for k in range(4))])
    left_K = full.gate_K.clone()
    left_K[off] = 0
    left_K /= left_K.sum()
    torch.testing.assert_close(found.gate_K, left_K)
    chosen = left_K.argsort(descending=True)[:2]
    share = left_K[chosen] / left_K[chosen].sum()
    alpha = model.alpha.item()
    by_hand = (1 - alpha) * full.experts_SC[0] + alpha * share @ full.experts_SC[1 + chosen]
    torch.testing.assert_close(found.probabilities_C, by_hand)
    assert (found.probabilities_C - full.probabilities_C).abs().max() > 1e-3


def test_the_main_expert_off_leaves_the_routed_ones():
    model = mixture_of(top_l=1)
    full = explain(model, one_row(), [True] * 5)
    found = explain(model, one_row(), [False, True, True, True, True])
    best = int(full.gate_K.argmax())
    torch.testing.assert_close(found.probabilities_C, full.experts_SC[1 + best])
    assert found.weights_S.tolist() == [0.0, *(float(k == best) for k in range(4))]


def test_of_two_main_experts_the_one_left_has_their_weight():
    model = mixture_of(top_l=1, num_main_experts=2)
    found = explain(model, one_row(), [False, True, True, True, True, True])
    assert found.weights_S[0] == 0 and found.weights_S[1] == pytest.approx(1 - model.alpha.item())
    torch.testing.assert_close(found.weights_S @ found.experts_SC, found.probabilities_C)


def test_no_routed_expert_on_leaves_the_main_ones():
    found = explain(mixture_of(num_main_experts=2), one_row(), [True, True, False, False, False, False])
    torch.testing.assert_close(found.probabilities_C, found.experts_SC[:2].mean(0))
    assert found.weights_S.tolist() == [0.5, 0.5, 0, 0, 0, 0] and found.gate_K.tolist() == [0] * 4


def test_fewer_experts_than_the_gate_chooses_share_its_part():
    found = explain(mixture_of(top_l=3), one_row(), [True, False, True, False, False])
    assert found.gate_K.tolist() == [0, 1, 0, 0] and found.weights_S.count_nonzero() == 2


@pytest.mark.parametrize(
    ("on", "message"),
    [([False] * 5, "All experts are switched off, and nobody is left to answer"), ([True] * 4, "`on` has 4 entries")],
)
def test_nobody_left_is_an_error(on, message):
    with pytest.raises(ValueError, match=message):
        explain(mixture_of(), one_row(), on)
