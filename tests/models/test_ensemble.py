import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_fedmoe.models import EnsembleConfig, EnsembleForImageClassification, EnsembleForSequenceClassification
from tests.tiny_images import image_batch, tiny_cnn
from tests.tiny_models import TEXT_FAMILIES, VOCAB_SIZE, text_batch, tiny_bert
from tests.without_package import logits_without_package


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_mixture_by_hand(family):
    model = TEXT_FAMILIES[family]()
    model.config.pad_token_id = 1
    ensemble = EnsembleForSequenceClassification.from_classifier(model, num_models=3)
    ensemble.mixture_M.copy_(torch.tensor([0.5, 0.3, 0.2]))
    batch, labels = text_batch(), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        out = ensemble(**batch, labels=labels)
        parts = [member(**batch).logits.softmax(-1) for member in ensemble.models]
    wanted_BC = 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2]
    torch.testing.assert_close(out.logits.exp(), wanted_BC)
    torch.testing.assert_close(out.loss, -wanted_BC.gather(1, labels[:, None]).log().mean())
    assert out.model_logits.shape == (6, 3, 4)


def test_models_share_the_backbone_they_start_from_and_have_heads_of_their_own():
    model = tiny_bert()
    first, again = (EnsembleForSequenceClassification.from_classifier(model, 3, seed=2) for _ in range(2))
    for name, tensor in model.state_dict().items():
        of_models = [member.state_dict()[name] for member in first.models]
        assert torch.equal(of_models[0], tensor)
        equal = [torch.equal(of_models[0], other) for other in of_models[1:]]
        assert equal == [name != "classifier.weight"] * 2
        assert torch.equal(of_models[2], again.models[2].state_dict()[name])
    spread = [member.classifier.weight.std().item() for member in first.models]
    assert max(spread) < 2 * min(spread)
    assert first.models[0].classifier.weight.data_ptr() != model.classifier.weight.data_ptr()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_saved_and_loaded_it_is_the_same(tmp_path, kind):
    if kind == "text":
        ensemble = EnsembleForSequenceClassification.from_classifier(tiny_bert(), 2)
        auto, batch = AutoModelForSequenceClassification, text_batch()
    else:
        ensemble = EnsembleForImageClassification.from_classifier(tiny_cnn(), 2)
        auto, batch = AutoModelForImageClassification, image_batch()
    ensemble.mixture_M.copy_(torch.tensor([0.9, 0.1]))
    ensemble.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(ensemble) and loaded.config.num_models == 2
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, ensemble(**batch).logits)


def test_loads_where_the_package_is_not_installed(tmp_path):
    ensemble = EnsembleForSequenceClassification.from_classifier(tiny_bert(), 2)
    ensemble.save_pretrained(tmp_path / "model")
    input_ids = text_batch(4)["input_ids"]
    [logits] = logits_without_package([tmp_path / "model"], input_ids, tmp_path / "cache")
    assert torch.equal(logits, ensemble(input_ids).logits)


def test_labels_and_padding_are_those_of_the_classifiers():
    model = tiny_bert(3)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.config.label2id = {"bad": 0, "fair": 1, "good": 2}
    config = EnsembleConfig(expert_config=model.config, num_models=4)
    assert config.num_labels == 3 and config.id2label[2] == "good" and config.label2id["fair"] == 1
    assert config.pad_token_id == model.config.pad_token_id and config.expert_config is not model.config
    assert EnsembleForSequenceClassification(config).models[3].config.vocab_size == VOCAB_SIZE


def test_bad_input():
    with pytest.raises(ValueError, match="`num_models` is 0"):
        EnsembleConfig(num_models=0)
    with pytest.raises(ValueError, match="`classifier` is a BertModel, which is not what AutoModelForSequence"):
        EnsembleForSequenceClassification.from_classifier(AutoModel.from_config(tiny_bert().config))
    with pytest.raises(ValueError, match="`classifier` is a SmallCNNForImageClassification"):
        EnsembleForSequenceClassification.from_classifier(tiny_cnn())
