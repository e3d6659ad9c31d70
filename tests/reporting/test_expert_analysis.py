import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_fedmoe.reporting import analyse_experts, plot_gate, scores
from hf_fedmoe.strategies import freeze_common_expert
from tests.tiny_federation import tiny_mixture, tiny_rows


def test_scores_by_hand():
    probabilities_NC = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0]])
    found = scores(probabilities_NC, torch.tensor([0, 1, 1, 1]))
    # Class 0: precision 1/2, recall 1 -> 2/3. Class 1: precision 1, recall 2/3 -> 4/5. Class 2: never -> 0.
    # Of class 0, .9 stands above .2, .6 and .1; of class 1, .8, .4 and .9 above .1. Class 2 has no example.
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 3), "auc": 1.0}


def test_each_row_is_what_it_says():
    torch.manual_seed(0)
    model, rows = tiny_mixture().eval(), tiny_rows(50, seed=3)
    for expert in model.experts:
        expert.classifier.weight.data += torch.randn_like(expert.classifier.weight)
    found = analyse_experts(model, rows, default_data_collator, batch_size=7)
    labels_N = torch.tensor(rows["label"])
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        alone = [(expert(**inputs).logits.argmax(1) == labels_N) for expert in model.experts]
        gate_NK = model(**inputs, dense=True).gate_probs
        top_1 = (model(**inputs, top_l=1).logits.argmax(1) == labels_N).float().mean().item()
        dense = (model(**inputs, dense=True).logits.argmax(1) == labels_N).float().mean().item()
    accuracies = [right.float().mean().item() for right in alone]
    assert found.scores["main_expert"]["accuracy"] == pytest.approx(accuracies[0])
    assert found.scores["expert_1"]["accuracy"] == pytest.approx(accuracies[2])
    assert found.scores["best_expert"]["accuracy"] == pytest.approx(max(accuracies))
    assert found.scores["oracle_expert"]["accuracy"] == pytest.approx(torch.stack(alone).any(0).float().mean().item())
    assert found.scores["top_1"]["accuracy"] == pytest.approx(top_1)
    assert found.scores["dense"]["accuracy"] == pytest.approx(dense)
    np.testing.assert_allclose(found.share_KC[:, 2], gate_NK[labels_N == 2].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.share_KC.sum(0), 1, atol=1e-6)
    assert found.disagreement_SS.diagonal().max() == 0 and found.disagreement_SS.max() > 0


@pytest.mark.parametrize("prepare", [lambda mixture: mixture, freeze_common_expert])
def test_weight_average_of_equal_experts_is_the_expert(prepare):
    found = analyse_experts(prepare(tiny_mixture()).eval(), tiny_rows(30), default_data_collator)
    assert found.scores["weight_average"] == found.scores["main_expert"] == found.scores["uniform_ensemble"]


def test_heat_map_leaves_out_classes_without_examples(tmp_path):
    share_KC = np.array([[0.9, 0.1, 0.3], [0.1, 0.9, 0.7]])
    plot_gate(share_KC[:, :2], ["bad $5, $\\frac", "good"], tmp_path / "two.png")
    share_KC[:, 2] = np.nan
    plot_gate(share_KC, ["bad $5, $\\frac", "good", "never seen"], tmp_path / "three.png")
    assert (tmp_path / "three.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_heat_map_is_a_picture(tmp_path):
    plot_gate(np.array([[0.9, 0.1], [0.1, 0.9]]), ["bad", "good"], tmp_path / "gate.png")
    assert (tmp_path / "gate.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
