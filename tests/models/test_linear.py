import pytest
import torch
from transformers import AutoModel

from hf_fedmoe.models import LinearConfig, LinearForClassification
from tests.without_package import results_without_package


def tiny_linear(num_features: int = 5, num_labels: int = 2) -> LinearForClassification:
    torch.manual_seed(0)
    return LinearForClassification(LinearConfig(num_features=num_features, num_labels=num_labels)).eval()


def vectors() -> torch.Tensor:
    return torch.linspace(-1, 1, 30).view(6, 5)


def test_two_classes_are_the_binary_cross_entropy():
    model, labels = tiny_linear(), torch.tensor([0, 1, 1, 0, 1, 0])
    out = model(vectors(), labels=labels)
    scores_B = vectors() @ model.linear.weight[0] + model.linear.bias
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores_B, labels.float())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logits.softmax(-1)[:, 1], scores_B.sigmoid())
    assert torch.equal(out.logits.argmax(-1), (scores_B > 0).long())
    given = torch.autograd.grad(out.loss, model.linear.weight)[0]
    torch.testing.assert_close(given, torch.autograd.grad(expected, model.linear.weight)[0])
    assert LinearForClassification(LinearConfig()).num_parameters() == 151


def test_more_classes():
    model, labels = tiny_linear(num_labels=4), torch.tensor([0, 1, 2, 3, 1, 0])
    out = model(vectors(), labels=labels)
    scores = torch.cat([torch.zeros(6, 1), vectors() @ model.linear.weight.T + model.linear.bias], dim=1)
    torch.testing.assert_close(out.logits, scores)
    torch.testing.assert_close(out.loss, -scores.log_softmax(1)[torch.arange(6), labels].mean())


def test_starts_as_torch_does():
    weight = tiny_linear(num_features=400, num_labels=9).linear.weight
    assert 0.95 / 20 < weight.abs().max().item() <= 1 / 20
    assert weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.1)


LOAD = """
import json, sys
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print("RESULT", json.dumps(model(torch.linspace(-1, 1, 30).view(6, 5)).logits.tolist()))
"""


@pytest.mark.parametrize("num_labels", [2, 3])
def test_round_trip_is_bit_equal(tmp_path, num_labels):
    model = tiny_linear(num_labels=num_labels)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, LinearForClassification)
    assert torch.equal(loaded(vectors()).logits, model(vectors()).logits)


def test_loads_where_the_package_is_not_installed(tmp_path):
    model = tiny_linear()
    model.save_pretrained(tmp_path)
    [logits] = results_without_package(LOAD, [str(tmp_path)], tmp_path / "cache")
    assert torch.equal(torch.tensor(logits), model(vectors()).logits)


def test_errors_name_field_value_and_remedy():
    with pytest.raises(ValueError, match="`num_features` is 0: pass an integer of at least 1"):
        LinearConfig(num_features=0)
    with pytest.raises(ValueError, match="`num_labels` is 1: pass at least 2 classes"):
        LinearConfig(num_labels=1)
    with pytest.raises(ValueError, match=r"`features` has the shape \(6, 4\), but `num_features` is 5: pass \(batch"):
        tiny_linear()(vectors()[:, :4])
