import math

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    MobileNetV2Config,
)

from hf_fedmoe.models import (
    EnsembleForSequenceClassification,
    MultiHeadConfig,
    MultiHeadForImageClassification,
    MultiHeadForSequenceClassification,
    SmallCNNConfig,
)
from hf_fedmoe.weights import StateLayout, copy_module
from tests.tiny_images import IMAGE_FAMILIES, image_batch, tiny_cnn
from tests.tiny_models import TEXT_FAMILIES, text_batch, tiny_bert
from tests.without_package import logits_without_package


def with_head(classifier, model, index):
    """The classifier with the weights of one of the heads."""
    missing, unexpected = classifier.load_state_dict(model.models[index].state_dict(), strict=False)
    assert not unexpected and all(name.startswith(f"{classifier.base_model_prefix}.") for name in missing)
    return classifier


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *IMAGE_FAMILIES])
def test_the_mixture_by_hand_and_the_backbone_runs_once(family):
    if family in TEXT_FAMILIES:
        kind, classifier, batch = MultiHeadForSequenceClassification, TEXT_FAMILIES[family](), text_batch()
        classifier.config.pad_token_id = 1
    else:
        kind, classifier, batch = MultiHeadForImageClassification, IMAGE_FAMILIES[family](), image_batch(6)
    model = kind.from_classifier(classifier, num_heads=3)
    model.mixture_M.copy_(torch.tensor([0.5, 0.3, 0.2]))
    labels, calls = torch.tensor([0, 1, 2, 3, 0, 1]), []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = model(**batch, labels=labels)
        assert len(calls) == 1
        hook.remove()
        logits_BMC = torch.stack([with_head(classifier, model, index)(**batch).logits for index in range(3)], 1)
    torch.testing.assert_close(out.model_logits, logits_BMC)
    parts = logits_BMC.softmax(-1)
    wanted_BC = 0.5 * parts[:, 0] + 0.3 * parts[:, 1] + 0.2 * parts[:, 2]
    torch.testing.assert_close(out.logits.exp(), wanted_BC)
    torch.testing.assert_close(out.loss, -wanted_BC.gather(1, labels[:, None]).log().mean())


def test_the_first_head_is_the_given_one_and_the_others_are_drawn():
    bert = tiny_bert()
    model, again = (MultiHeadForSequenceClassification.from_classifier(bert, 3, seed=2) for _ in range(2))
    weights = [head.classifier.weight for head in model.models]
    assert torch.equal(weights[0], bert.classifier.weight) and weights[0] is not bert.classifier.weight
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], again.models[2].classifier.weight)
    for name, tensor in bert.bert.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)
    fresh = MultiHeadForSequenceClassification(MultiHeadConfig(expert_config=bert.config, num_heads=2))
    assert not torch.equal(fresh.models[0].classifier.weight, fresh.models[1].classifier.weight)


def test_a_copy_has_a_backbone_of_its_own_and_keeps_no_features():
    model = MultiHeadForImageClassification.from_classifier(tiny_cnn(), 2)
    copy = copy_module(model)
    with torch.no_grad():
        before = model(**image_batch()).logits
        for parameter in copy.backbone.parameters():
            parameter.zero_()
        assert torch.equal(model(**image_batch()).logits, before)
        assert not torch.equal(copy(**image_batch()).logits, before)
        assert not torch.equal(model(**image_batch(seed=1)).logits, before)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_saved_and_loaded_it_is_the_same(tmp_path, kind):
    if kind == "text":
        model = MultiHeadForSequenceClassification.from_classifier(tiny_bert(), 2)
        auto, batch = AutoModelForSequenceClassification, text_batch()
    else:
        model = MultiHeadForImageClassification.from_classifier(tiny_cnn(), 2)
        auto, batch = AutoModelForImageClassification, image_batch()
    model.mixture_M.copy_(torch.tensor([0.9, 0.1]))
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.num_heads == loaded.config.num_models == 2
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_loads_where_the_package_is_not_installed(tmp_path):
    model = MultiHeadForSequenceClassification.from_classifier(tiny_bert(), 2)
    model.save_pretrained(tmp_path / "model")
    input_ids = text_batch(4)["input_ids"]
    [logits] = logits_without_package([tmp_path / "model"], input_ids, tmp_path / "cache")
    assert torch.equal(logits, model(input_ids).logits)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SmallCNNConfig(num_labels=62, padding=0), 2_532_410),
        (MobileNetV2Config(num_labels=10), 2_262_302),
    ],
    ids=["emnist", "cifar10"],
)
def test_sizes_of_the_paper(config, size):
    with torch.device("meta"):
        model = MultiHeadForImageClassification(MultiHeadConfig(expert_config=config, num_heads=3))
    assert model.num_parameters() == size
    # What travels is that and running statistics, once.
    statistics = sum(buffer.numel() for name, buffer in model.named_buffers() if "running" in name)
    assert sum(math.prod(slot.shape) for slot in StateLayout.of(model).slots) == size + statistics + 3


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="`num_heads` is 0"):
        MultiHeadConfig(num_heads=0)
    with pytest.raises(ValueError, match="`classifier` is a SmallCNNForImageClassification"):
        MultiHeadForSequenceClassification.from_classifier(tiny_cnn())
    ensemble = EnsembleForSequenceClassification.from_classifier(tiny_bert(), 2)
    with pytest.raises(ValueError, match="that of a 'classifier_ensemble', which consists of classifiers itself"):
        MultiHeadForSequenceClassification.from_classifier(ensemble)
    monkeypatch.setattr(BertForSequenceClassification, "base_model_prefix", "")
    with pytest.raises(ValueError, match="that of BertForSequenceClassification, which has no backbone of its own"):
        MultiHeadForSequenceClassification.from_classifier(tiny_bert())
