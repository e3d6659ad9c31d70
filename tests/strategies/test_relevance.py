import json
from pathlib import Path

import pytest
import torch

from hf_fedmoe.strategies import client_mixture, correlate
from hf_fedmoe.strategies.relevance import above_floor, capped


DATA = json.loads((Path(__file__).parents[1] / "data" / "fedmoe_round.json").read_text())


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("correlation", ["sum", "mean", "relevance"])
def test_correlation_and_both_softmaxes_match_the_worked_example(correlation):
    expected = DATA["correlation"][correlation]
    W_Km = correlate(float64(DATA["Q_RK"]), float64(DATA["Py_mR"]), correlation)
    torch.testing.assert_close(W_Km, float64(expected["W_Km"]), atol=1e-10, rtol=0)
    torch.testing.assert_close(W_Km.softmax(1), float64(expected["Wr_Km"]), atol=1e-10, rtol=0)
    mixture_Sm = client_mixture(W_Km, float64(DATA["alpha"]), num_main_experts=1)
    torch.testing.assert_close(mixture_Sm, float64(expected["Wc_Sm"]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("correlation", ["centered", "relevance"])
def test_sharpness_grows_with_the_evidence_only(correlation):
    """Repeating every reserved example n times scales W by sqrt(n), as the noise of n examples falls."""
    Q_RK, P_y_mR = float64(DATA["Q_RK"]), float64(DATA["Py_mR"])
    once = correlate(Q_RK, P_y_mR, correlation)
    four_times = correlate(Q_RK.repeat(4, 1), P_y_mR.repeat(1, 4), correlation)
    torch.testing.assert_close(four_times, 2 * once)


def test_relevance_does_not_reward_plain_skill():
    """A client that is better by the same amount everywhere wins no row."""
    Q_RK, P_y_mR = float64(DATA["Q_RK"]), float64(DATA["Py_mR"]) * 0.5
    skilled = P_y_mR.clone()
    skilled[2] += 0.4
    torch.testing.assert_close(correlate(Q_RK, skilled, "relevance"), correlate(Q_RK, P_y_mR, "relevance"))
    assert (correlate(Q_RK, skilled, "sum")[:, 2] > correlate(Q_RK, P_y_mR, "sum")[:, 2]).all()


def test_temperature_divides():
    Q_RK, P_y_mR = float64(DATA["Q_RK"]), float64(DATA["Py_mR"])
    torch.testing.assert_close(correlate(Q_RK, P_y_mR, "sum", 4.0) * 4, correlate(Q_RK, P_y_mR, "sum"))


def test_an_expert_without_examples_gets_finite_weights():
    Q_RK = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    W_Km = correlate(Q_RK, torch.tensor([[0.2, 0.4], [0.9, 0.1]]), "relevance")
    assert torch.isfinite(W_Km.softmax(1)).all()


def test_mixture_without_main_expert_shares_everything_among_routed_ones():
    mixture_Km = client_mixture(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor(0.5), num_main_experts=0)
    torch.testing.assert_close(mixture_Km.sum(0), torch.ones(2))
    assert mixture_Km[0, 1] == mixture_Km[1, 1] == 0.5


def test_unknown_correlation_lists_the_choices():
    with pytest.raises(ValueError, match=r"`correlation` is 'max': choose one of 'relevance', 'centered'"):
        correlate(torch.ones(2, 2), torch.ones(2, 2), "max")


def test_who_is_above_the_floor_is_told_by_the_mean_probability_of_the_true_class():
    P_y_mR = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.2]])
    sent_1R = torch.tensor([[0.6, 0.4]])
    assert above_floor(P_y_mR, sent_1R, 1.0).tolist() == [True, True, False]
    assert above_floor(P_y_mR, sent_1R, 0.4).tolist() == [True, True, True]
    assert above_floor(P_y_mR, P_y_mR * torch.tensor([[1.1], [1.0], [0.9]]), 1.0).tolist() == [False, True, True]


def test_shares_are_capped_and_the_rest_goes_to_the_others_in_proportion():
    share_Km = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(capped(share_Km, 0.5), torch.tensor([[0.5, 1 / 3, 1 / 6, 0.0], [0.25] * 4]))
    # The second one is above the cap only by what the first one leaves.
    torch.testing.assert_close(capped(share_Km, 0.4)[0], torch.tensor([0.4, 0.4, 0.2, 0.0]))
    assert torch.equal(capped(share_Km, 1.0), share_Km)


def test_a_cap_without_room_for_the_whole_leaves_equal_shares():
    share_Km = torch.tensor([[0.7, 0.2, 0.1, 0.0]])
    torch.testing.assert_close(capped(share_Km, 0.3), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))
    torch.testing.assert_close(capped(share_Km, 1 / 3), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))
